"""Runs of counting on the command line: scores against what the corpus says, pictures, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_count import COUNTS, counting_cache, little, write_pictures
from typer.testing import CliRunner

from cli import app
from pipeline.stills import draw_marks
from schemas.errors import UserError
from training.counting.counter import Counter
from training.counting.evaluate import evaluate
from training.counting.terminal import evaluate_and_tell
from training.evaluate import Reports
from training.recipe import load_recipe
from training.trainer import train


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("fsc147"))


@pytest.fixture(scope="module")
def run(pictures: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three steps; what is evaluated lies in it."""
    out = tmp_path_factory.mktemp("out")
    train(counting_cache(pictures, tiny_model, out), little("train.steps=3"), out / "run", device="cpu")
    return out / "run"


@pytest.fixture(scope="module")
def metrics(run: Path) -> dict[str, Any]:
    """Of all the training part, as it is large enough to have counts of all kinds."""
    result = dst("evaluate", "--run", run, "--split", "train", "--device", "cpu")
    assert (result.exit_code, result.exception) == (0, None), result.output
    for name in ("metrics.json", "predictions.parquet", "scores.md", "report.html", "counts.png"):
        assert Reports(run, "best_joint", "train").file(name).is_file()
    found: dict[str, Any] = json.loads((run / "metrics-best_joint-train.json").read_text())
    return found


def dst(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def mistake(*arguments: object) -> str:
    """The one sentence that a wrong command ends with."""
    result = dst(*arguments)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    return line.removeprefix("error: ")


def with_config(run: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a run whose model's configuration says something else."""
    shutil.copytree(run, copy)
    config = copy / "checkpoints/best_joint/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return copy


def true_places(pictures: Path, name: str) -> list[list[float]]:
    """Points of a picture in reading order, in -1..1, from the corpus' own file."""
    about = json.loads((pictures / "annotation_FSC147_384.json").read_text())[name]
    ordered = sorted(about["points"], key=lambda point: (point[1] // 50, point[0]))
    return [[2 * x / about["W"] - 1, 2 * y / about["H"] - 1] for x, y in ordered]


# ---- dst evaluate


def test_counts_are_scored_against_the_corpus(run: Path, metrics: dict[str, Any]) -> None:
    table = pl.read_parquet(run / "predictions-best_joint-train.parquet")
    assert table["session_id"].to_list() == [f"fsc147/train{n}" for n in range(9)]
    assert table["count"].to_list() == list(COUNTS["train"])
    assert table["marks"].list.len().to_list() == table["predicted"].to_list()
    assert table["done"].list.len().to_list() == [count + 1 for count in table["predicted"]]
    assert table["errors"].list.len().to_list() == list(COUNTS["train"])
    off = np.array(table["predicted"].to_list()) - COUNTS["train"]
    assert metrics["count"]["mae"] == pytest.approx(sum(abs(off)) / 9)
    assert metrics["count"]["rmse"] == pytest.approx((sum(off**2) / 9) ** 0.5)
    assert metrics["count"]["exact"] == pytest.approx(sum(off == 0) / 9)
    errors = [error for row in table["errors"].to_list() for error in row]
    assert metrics["coord"]["median_error"] == pytest.approx(np.median(errors))
    some = [at for at, count in enumerate(COUNTS["train"]) if count]  # one picture is empty
    assert metrics["up_to_20"]["count"]["mae"] == pytest.approx(sum(abs(off[some])) / 8)
    assert metrics["up_to_20"]["coord"] == metrics["coord"]
    about = metrics["about"]
    assert (about["images"], about["objects"], about["checkpoint"], about["split"]) == (
        *(9, 30),
        *("best_joint", "train"),
    )
    assert (about["blind"], about["marks"]) == (False, "mark_tokens")


def test_what_it_marks_is_what_a_counter_marks(run: Path, pictures: Path, tmp_path: Path) -> None:
    """Of the same picture, away from the cache; and errors are those of its places with true marks before."""
    calm = with_config(run, tmp_path / "calm", max_marks=5)
    weights = calm / "checkpoints/best_joint/model.safetensors"
    tensors = load_file(weights)
    for name in (
        "coord_head.offset.weight",
        "coord_head.offset.bias",
    ):  # else some places lie beyond the border
        tensors[name] = tensors[name] * 0.1
    save_file(tensors, weights, metadata={"format": "pt"})
    evaluate(calm, None, split="train")
    counter, marked, errors = Counter.load(calm), 0, 0
    for row in pl.read_parquet(calm / "predictions-best_joint-train.parquet").to_dicts():
        name = row["session_id"].removeprefix("fsc147/") + ".jpg"
        picture = pictures / "images_384_VarV2" / name
        with Image.open(picture) as image:
            size = np.array(image.size)
        counted = counter.count(picture, row["goal"])
        assert counted.count == row["predicted"]
        marks = np.array([(mark["x"], mark["y"]) for mark in row["marks"]]).reshape(-1, 2)
        np.testing.assert_allclose(np.reshape(counted.marks, (-1, 2)), (marks + 1) / 2 * size, atol=0.05)
        marked += len(marks)
        places = np.array(true_places(pictures, name))
        for number, error in enumerate(row["errors"]):
            shown = ((places[:number] + 1) / 2 * size).tolist()
            place = 2 * np.array(counter.predict_coordinates(picture, shown, row["goal"])) / size - 1
            assert error == pytest.approx(np.hypot(*(place - places[number])) / 2, abs=1e-4)
            errors += 1
    assert marked > 5
    assert errors == sum(COUNTS["train"])


def test_baselines_say_what_is_usual_in_the_training_part(run: Path, pictures: Path) -> None:
    found, _ = evaluate(run, None, split="val")
    counts, train_counts = COUNTS["val"], COUNTS["train"]
    mean = sum(train_counts) / 9
    scores = found["baselines"]["training_mean"]["count"]
    assert scores["mae"] == pytest.approx(sum(abs(mean - n) for n in counts) / 4)
    assert scores["rmse"] == pytest.approx((sum((mean - n) ** 2 for n in counts) / 4) ** 0.5)
    assert scores["by_count"]["0"] == {"images": 1, "mae": pytest.approx(mean)}
    few = found["baselines"]["training_mean"]["up_to_20"]["count"]
    assert few["mae"] == pytest.approx(sum(abs(mean - n) for n in counts if n) / 3)
    scores = found["baselines"]["training_median"]["count"]
    assert scores["mae"] == pytest.approx((1 + 3 + 1 + 2) / 4)  # of 0 1 1 2 3 4 5 6 8 it is 3
    points = [p for n in range(9) for p in true_places(pictures, f"train{n}.jpg")]
    centre = [sum(each) / len(points) for each in zip(*points, strict=True)]
    away = sorted(
        np.hypot(x - centre[0], y - centre[1]) / 2
        for n in range(4)
        for x, y in true_places(pictures, f"val{n}.jpg")
    )
    assert len(away) == 11
    assert found["baselines"]["training_mean"]["coord"]["median_error"] == pytest.approx(away[5], abs=1e-6)


def test_the_page_needs_nothing_else(run: Path, metrics: dict[str, Any]) -> None:
    page = (run / "report-best_joint-train.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 1 + 9
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    mae = f"{metrics['count']['mae']:.3f}"
    assert f"<td>model</td><td>{mae}</td>" in page
    assert f"| model | {mae} |" in (run / "scores-best_joint-train.md").read_text()
    told = re.findall(r"fsc147/train\d, [^:<]*: (\d+) counted, (\d+) there</figcaption>", page)
    off = [abs(int(predicted) - int(count)) for predicted, count in told]
    assert off == sorted(off, reverse=True)
    assert sorted(int(count) for _, count in told) == sorted(COUNTS["train"])


def test_the_blind_control_stands_beside(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = json.loads((run / "run.json").read_text())["shards"]
    train(shards, little("train.steps=1", "data.blind=true"), tmp_path / "blind", device="cpu")
    found = evaluate_and_tell(Reports(run, "best_joint", "test"), None, "cpu", blind=tmp_path / "blind")
    control, scored = evaluate(tmp_path / "blind", None)
    assert found["blind"]["count"] == control["count"]
    assert "baselines" not in found["blind"]
    assert not np.any(scored[0].image.features())
    lines = [line for line in capsys.readouterr().out.splitlines() if "0." in line]
    rows = [" ".join(word for word in line.split() if word.isalpha()) for line in lines]
    assert rows[:4] == ["model", "blind", "training mean", "training median"]


def test_marks_that_are_drawn_are_rolled_out_on_the_pictures(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(pictures, tmp_path / "own")
    shards = counting_cache(own, tiny_model, tmp_path, "drawn")
    changes = ("train.steps=2", "model.marks=drawn", "data.max_marks=3")
    train(shards, little(*changes), tmp_path / "run", device="cpu")
    never = with_config(tmp_path / "run", tmp_path / "never", done_threshold=2.0)
    counter = Counter.load(never)
    _, scored = evaluate(never, None, split="test")
    for each in scored:
        counted = counter.count(Path(each.image.labels.meta["uri"]), each.image.goal)
        assert (counted.count, each.predicted) == (3, 3)
        assert each.rollout.done == pytest.approx(counted.done, abs=1e-4)
    (own / "images_384_VarV2/test1.jpg").unlink()
    line = mistake("evaluate", "--run", tmp_path / "run", "--device", "cpu")
    assert "1 pictures are not there, such as" in line
    assert "test1.jpg" in line
    train(shards, little(*changes, "data.blind=true"), tmp_path / "blind", device="cpu")
    evaluate(tmp_path / "blind", None, split="test")  # which looks at none
    with pytest.raises(UserError, match="is a blind control"):
        Counter.load(tmp_path / "blind")


def test_pictures_that_cannot_be_read_are_left_out_of_the_page(
    run: Path, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(pictures, tmp_path / "own")
    shards = counting_cache(own, tiny_model, tmp_path)
    (own / "images_384_VarV2/test1.jpg").unlink()
    copy = shutil.copytree(run, tmp_path / "run")
    result = dst("evaluate", "--run", copy, "--shards", shards, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "1 images have no picture in the report: " in result.stderr
    page = (copy / "report-best_joint-test.html").read_text()
    assert page.count("(the picture cannot be read)") == 1
    assert page.count("image/jpeg") == 1


def test_what_an_evaluation_refuses(run: Path, tmp_path: Path) -> None:
    fixed = ("evaluate", "--run", run, "--device", "cpu")
    for option in (("--mode", "free"), ("--embedding", "bag-of-words")):
        assert "is a run of counting, which says no words" in mistake(*fixed, *option)
    assert "has no checkpoint 'best'" in mistake(*fixed, "--checkpoint", "best")
    assert "no image of the split 'tset'" in mistake(*fixed, "--split", "tset")
    other = with_config(run, tmp_path / "other", tiles=2)
    assert "made with --tiles 1, the model was trained on" in mistake("evaluate", "--run", other)
    other = with_config(run, tmp_path / "young", done_threshold=None)
    assert "the checkpoint has no threshold" in mistake("evaluate", "--run", other)


# ---- dst count


def test_count_writes_the_numbered_marks(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = shutil.copy(pictures / "images_384_VarV2/train5.jpg", tmp_path / "some discs.jpg")
    fixed = ("count", "--run", run, "--image", picture, "--what", "wheels", "--device", "cpu")
    counted = Counter.load(run).count(picture, "wheels")
    result = dst(*fixed)
    assert result.exit_code == 0, result.output
    out = Path("out/pictures/some discs-counted.png")
    assert result.stdout == f"{counted.count} wheels; each with its number in {out}\n"
    with Image.open(picture) as plain, Image.open(out) as drawn:
        scale = 960 / max(plain.size)
        assert drawn.size == tuple(round(side * scale) for side in plain.size)
        large = np.asarray(plain.convert("RGB").resize(drawn.size, Image.Resampling.LANCZOS))
        places = [(x * scale, y * scale) for x, y in counted.marks]
        assert np.array_equal(np.asarray(drawn), draw_marks(large, places, len(places)))
    before = out.read_bytes()
    assert dst(*fixed, "--out", tmp_path / "new/other.png").exit_code == 0
    assert (tmp_path / "new/other.png").read_bytes() == before
    # whatever this little model counts: its pictures have 4 tokens, so that more than 3 crowd
    crowded = ["crowd several to one of the 4 tokens" in line for line in result.stderr.splitlines()]
    assert crowded == [True] * (counted.count > 3)
    unknown = dst(*(each if each != "wheels" else "wheel" for each in fixed))
    assert "'wheel' is none of the categories it was trained on; nearest: wheels" in unknown.stderr


def test_count_tells_when_it_is_unsure(run: Path, pictures: Path, tmp_path: Path) -> None:
    """It never believes to be done, and marks more than the 64 tokens have room for."""
    other = with_config(run, tmp_path / "other", done_threshold=2.0, max_marks=9)
    picture = pictures / "images_384_VarV2/val0.jpg"
    out = tmp_path / "out.png"
    fixed = ("count", "--image", picture, "--what", "wheels", "--out", out, "--device", "cpu", "--run")
    tokens = Counter.load(other).model.config.cached_tokens
    result = dst(*fixed, other)
    assert result.stdout.startswith("9 wheels; ")
    assert "there may be more: it ended at 9 marks" in result.stderr
    most = int(0.8 * tokens)
    for marks, told in ((most, False), (most + 1, True)):
        crowd = with_config(run, tmp_path / f"{marks}", done_threshold=2.0, max_marks=marks)
        assert ("cache pictures with more (--tiles)" in dst(*fixed, crowd).stderr) == told


def test_what_count_refuses(run: Path, pictures: Path, tmp_path: Path) -> None:
    picture = pictures / "images_384_VarV2/val0.jpg"
    fixed = ("count", "--run", run, "--what", "wheels", "--device", "cpu", "--image")
    (tmp_path / "text.jpg").write_text("no picture")
    gone = tmp_path / "gone.jpg"
    assert mistake(*fixed, gone) == f"{gone} is not there; give a whole JPEG, PNG, WebP or BMP picture"
    assert "text.jpg holds no JPEG" in mistake(*fixed, tmp_path / "text.jpg")
    assert "is not a PNG" in mistake(*fixed, picture, "--out", tmp_path / "out.jpg")
    shutil.copy(pictures / "images_384_VarV2/val0.jpg", tmp_path / "same.png")
    assert "is the picture itself" in mistake(*fixed, tmp_path / "same.png", "--out", tmp_path / "same.png")
    assert "give a whole JPEG" in mistake(*fixed, Path("."))
    for nothing in ((), ("--what", " ")):
        line = mistake(*fixed[:3], *nothing, "--image", picture, "--out", tmp_path / "out.png")
        assert "categories, such as " in line
        assert "name the one to count" in line
    assert "is not a run" in mistake("count", "--run", tmp_path, "--what", "x", "--image", picture)
    young = with_config(run, tmp_path / "young", done_threshold=None)
    arguments = ("--what", "wheels", "--image", picture, "--out", tmp_path / "out.png")
    assert "the checkpoint has no threshold" in mistake("count", "--run", young, *arguments)
    vision = json.loads((run / "checkpoints/best_joint/config.json").read_text())["vision"]
    towerless = with_config(run, tmp_path / "towerless", vision=vision | {"model": str(tmp_path / "gone")})
    assert "which cannot be had now" in mistake("count", "--run", towerless, *arguments)
    dialog = shutil.copytree(run, tmp_path / "dialog")
    (dialog / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("tiny", []).model_dump(mode="json")))
    assert "is a run of the dialog model" in mistake("count", "--run", dialog, *arguments)
    assert not (tmp_path / "out.png").exists()


# ---- what is for the dialog model


def test_commands_of_the_dialog_model_say_so(run: Path) -> None:
    for arguments in (
        ("compare", run, run),
        ("stream", "--run", run, "--video", "v.mp4", "--plan", "p.yaml", "--device", "cpu"),
    ):
        assert f"{run} is a run of counting, and dst {arguments[0]} needs one of the dialog" in mistake(
            *arguments
        )


# ---- the demo


def test_the_demo_of_counting(tmp_path: Path) -> None:
    """All its stages on next to nothing; what it names at the end is there, the report last."""
    result = dst(
        "demo", "--family", "counting", "--out", tmp_path / "demo", "--sessions", "7", "--steps", "1"
    )
    assert result.exit_code == 0, result.output
    places = [line.split() for line in result.stdout.split("Where things lie:\n")[1].splitlines()]
    assert [name for name, _ in places] == [
        "labels",
        "features",
        "scores",
        "curves",
        "model",
        "counted",
        "report",
    ]
    assert all(Path(place).exists() for _, place in places)
    scores = json.loads(Path(dict(places)["scores"]).read_text())
    assert scores["about"]["split"] == "test"
    assert scores["blind"].keys() == scores.keys() - {"about", "baselines", "blind"}
