"""The command line as a user meets it: help, short forms, and mistakes that get one sentence."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from click.testing import Result
from conftest import rows_of
from typer.testing import CliRunner

from cli import app
from pipeline.devices import choose_device
from pipeline.shards import ShardCache
from schemas.tables import TABLES

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def mistake(*arguments: object) -> str:
    """Run something wrong: exit status 2, one line on stderr and nothing else there."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception  # not a traceback
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line.removeprefix("error: ")


def in_one_line(text: str) -> str:
    return " ".join(text.split())


# ---- help


def test_commands_are_there() -> None:
    wanted = {
        "sample",
        "prepare",
        "init-model",
        "cache-features",
        "verify",
        "train",
        "runs",
        "evaluate",
        "demo",
    }
    assert wanted <= set(COMMANDS)
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    text = in_one_line(result.stdout)
    example = text.split("Example: ")[1].split(" Options:")[0]
    assert example.startswith(f"dst {command}")
    # the example holds only options that there are
    options = [word.split("=")[0] for word in example.split() if word.startswith("--")]
    assert options
    assert all(option in text.split(" Options:")[1] for option in options)


def test_help_imports_nothing_heavy() -> None:
    """So that it comes at once: the help of all, and of each command."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli import app\n"
        "for arguments in (['--help'], *([name, '--help'] for name in sys.argv[1:])):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments\n"
        "print(' '.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "typer" in imported
    heavy = {"torch", "transformers", "huggingface_hub", "av", "pyarrow", "polars", "scipy", "matplotlib"}
    assert not imported & heavy


def test_the_installed_command() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import cli; cli.app()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert {"cli", "typer"} <= modules
    assert not {"torch", "transformers"} & modules
    assert "cache-features" in done.stdout


# ---- mistakes


def test_no_corpus(tmp_path: Path) -> None:
    root, out = tmp_path / "nowhere", tmp_path / "labels"
    line = mistake("prepare", "--root", root, "--out", out)
    assert f"{root} is not a folder" in line
    assert "dst sample --source assembly101" in line
    (tmp_path / "empty").mkdir()
    line = mistake("prepare", "--root", tmp_path / "empty", "--out", out)
    assert str(tmp_path / "empty") in line
    assert not out.exists() or not any(out.iterdir())


def test_unknown_names(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "'assembly102'; known: assembly101" in mistake("prepare", "--source", "assembly102", "--out", out)
    assert "'assembly102'; known: assembly101" in mistake("sample", "--source", "assembly102", "--out", out)
    assert "'huge'; choose one of tiny, " in mistake("init-model", "--preset", "huge", "--out", out)
    line = mistake("prepare", "--root", corpus, "--out", out, "--view", "C1")
    assert "C1" in line
    line = mistake("prepare", "--root", corpus, "--out", out, "--level", "stepp")
    assert "stepp" in line
    line = mistake("prepare", "--root", corpus, "--out", out, "--dialogs", tmp_path / "none")
    assert f"{tmp_path / 'none'} is not there" in line
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("hz", ["0", "-2", "nan", "inf"])
def test_tick_hz_must_be_a_rate(corpus: Path, tmp_path: Path, hz: str) -> None:
    line = mistake("prepare", "--root", corpus, "--out", tmp_path / "out", "--tick-hz", hz)
    assert "--tick-hz must be above 0 and at most 1000" in line
    assert not (tmp_path / "out").exists()


def test_sample_needs_room(tmp_path: Path) -> None:
    assert "--sessions 5 is too few" in mistake("sample", "--out", tmp_path / "new", "--sessions", "5")
    (tmp_path / "mine.txt").write_text("keep me")
    assert "is not empty" in mistake("sample", "--out", tmp_path, "--sessions", "18")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("cache-features", "train"):
        line = mistake(command, "--gpu", "0")
        assert "no GPU 0 here" in line
        assert "--device cpu" in line
        assert "use --device cpu" in mistake(command, "--device", "cuda")
        assert "'tpu'; use cpu or cuda" in mistake(command, "--device", "tpu")
    assert "--device cpu" in mistake("evaluate", "--run", "out/none", "--gpu", "0")


def test_settings(tmp_path: Path) -> None:
    assert "did you mean 'steps'?" in mistake("train", "--recipe", "tiny", "--set", "train.step=5")
    assert "did you mean 'train'?" in mistake("train", "--set", "trian.steps=5")
    assert "train.steps" in mistake("train", "--set", "train.steps=many")
    assert "is not of the form key=value" in mistake("train", "--set", "train.steps")
    line = mistake("train", "--recipe", "small")
    assert "no recipe 'small'; give a YAML file or one of counting, independent, " in line
    assert " tiny" in line
    assert "tasks.speaking.loss" in mistake("train", "--set", "tasks.speaking.loss=hinge")
    assert "all weights are 0" in mistake(
        "train", *(f"--set=tasks.{t}.weight=0" for t in ("speaking", "dst_update", "response", "dst_state"))
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [steps: 5\n")
    assert f"{broken} is not YAML" in mistake("train", "--recipe", broken)
    broken.write_text("train:\n  stepz: 5\n")
    line = mistake("train", "--recipe", broken)
    assert line.startswith(f"{broken}: ")
    assert "did you mean 'steps'?" in line


def test_a_value_that_is_not_yaml() -> None:
    line = mistake("train", "--set", "train.steps=[5")
    assert "'train.steps=[5'" in line
    assert "YAML" in line


def test_no_cache(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--set", f"model.init={tiny_model}", "--out", tmp_path / "run", "--device", "cpu")
    line = mistake("train", "--shards", tmp_path, "--recipe", "tiny", *arguments)
    assert f"{tmp_path} holds no cache.json" in line
    assert "dst cache-features" in line


def test_shards_of_another_model(shards: Path, tmp_path: Path) -> None:
    """A checkpoint of another width, and none: nothing is written."""
    config = json.loads((Path(ShardCache(shards).fingerprint.model) / "config.json").read_text())
    config["text_config"]["hidden_size"] = 192
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider/config.json").write_text(json.dumps(config))
    fixed = ("train", "--shards", shards, "--out", tmp_path / "run", "--device", "cpu", "--recipe", "tiny")
    line = mistake(*fixed, "--set", f"model.init={tmp_path / 'wider'}")
    assert f"{shards} holds features of width 128, the model {tmp_path / 'wider'} has 192" in line
    assert "model.init" in line
    line = mistake(*fixed, "--set", f"model.init={tmp_path / 'gone'}")
    assert f"'{tmp_path / 'gone'}' is neither a local folder nor could it be fetched" in line
    assert not (tmp_path / "run").exists()


def test_more_visual_tokens_than_the_cache_has(shards: Path, tmp_path: Path) -> None:
    fixed = ("train", "--shards", shards, "--out", tmp_path / "run", "--device", "cpu", "--recipe", "tiny")
    line = mistake(*fixed, "--set", "model.visual_tokens=5")
    assert f"model.visual_tokens is 5, and a tick of {shards} has 4 tokens" in line
    assert not (tmp_path / "run").exists()


def test_a_cache_without_a_validation_part(labels: Path, tiny_model: Path, tmp_path: Path) -> None:
    """What relabelling has left without val sessions is not trained on: nothing would choose a checkpoint."""
    sessions = [row for row in rows_of(labels / "assembly101", "sessions") if row["split"] == "train"][:2]
    chosen, videos = ({row[key] for row in sessions} for key in ("session_id", "video_id"))
    folder = tmp_path / "labels" / "assembly101"
    folder.mkdir(parents=True)
    for name, schema in TABLES.items():
        of = {"videos": ("video_id", videos), "rejects": ("reason", set())}.get(name, ("session_id", chosen))
        rows = [row for row in rows_of(labels / "assembly101", name) if row[of[0]] in of[1]]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")
    out = tmp_path / "shards"
    command = ("cache-features", "--labels", tmp_path / "labels", "--out", out, "--model", tiny_model)
    assert run(*command, "--device", "cpu").exit_code == 0
    line = mistake("train", "--shards", out, "--recipe", "tiny", "--out", tmp_path / "run", "--device", "cpu")
    assert f"{out} has no session of the split 'val' (there are: train)" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/latest").mkdir(parents=True)
    (tmp_path / "run/log.jsonl").write_text('{"step": 1}\n')
    fixed = ("train", "--shards", shards, "--recipe", "tiny", "--out", tmp_path / "run", "--device", "cpu")
    line = mistake(*fixed)
    assert f"{tmp_path / 'run'} holds a run already" in line
    assert "--resume" in line
    assert (tmp_path / "run/log.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_one_speaks(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 3, "epoch": 1, "train/loss": 1.0, "val/speaking_f1": 0.25, "val/combined": 0.5}

    def quick(
        *_: object, on_start: Callable[[int], None], on_step: Callable[[Any], None], **__: object
    ) -> Any:
        on_start(2)
        on_step(row)
        return row

    monkeypatch.setattr("training.trainer.train", quick)
    monkeypatch.setenv("RANK", rank)
    result = run("train", "--out", tmp_path / "my run", "--resume", "--device", "cpu")
    assert (result.exit_code, result.exception) == (0, None)
    if rank == "1":
        assert result.output == ""
    else:
        assert result.stderr.splitlines() == [
            "going on after step 2",
            "epoch 1, step 3: combined 0.500, speaking_f1 0.250",
        ]
        assert (
            f"best at step 3 (val combined 0.500) in {tmp_path / 'my run/checkpoints/best'}" in result.stdout
        )
        told = result.stdout.split("next: ")[1].split("; beside other runs: ")
        assert [shlex.split(each)[-1] for each in told] == [str(tmp_path / "my run"), str(tmp_path)]


def test_a_mistake_of_all_processes_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process than the main one waits for the launcher to end it, and speaks when it does not."""
    wrong = ("prepare", "--root", tmp_path / "nowhere")
    told = mistake(*wrong)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("pipeline.ending.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    result = run(*wrong)
    assert (result.exit_code, result.output) == (2, "")
    waited: list[float] = []
    monkeypatch.setattr("pipeline.ending.time.sleep", waited.append)
    result = run(*wrong)
    assert (result.exit_code, result.stderr) == (2, f"rank 3: error: {told}\n")
    [seconds] = waited
    assert seconds > 0


def test_the_device_is_told_by_the_main_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for rank, told in (("0", "no GPU found: using the CPU\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert choose_device(None, None) == "cpu"
        assert capsys.readouterr().out == told


def test_what_comes_next_can_be_pasted(corpus: Path, tmp_path: Path) -> None:
    """Also where a folder's name has blanks and more."""
    out = tmp_path / "my labels; $HOME"
    lines = run("prepare", "--root", corpus, "--out", out).stdout.splitlines()
    [told] = [line.split("next: ")[1] for line in lines if "next: " in line]
    assert shlex.split(told) == ["dst", "cache-features", "--labels", str(out)]
    [told] = [line.split("what they hold: ")[1] for line in lines if "what they hold: " in line]
    assert shlex.split(told) == ["dst", "inspect", str(out / "assembly101")]


def test_not_a_run(shards: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", shards):
        line = mistake("evaluate", "--run", folder, "--device", "cpu")
        assert f"{folder} is not a run" in line
        assert "dst train" in line


def test_demo_removes_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert "is not empty and not an earlier demo" in mistake("demo", "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_demo_tells_a_mistake_before_it_begins(tmp_path: Path) -> None:
    assert "train.steps" in mistake("demo", "--out", tmp_path / "demo", "--steps", "0")
    assert not (tmp_path / "demo").exists()


def test_a_model_that_cannot_be_had(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is no checkpoint, a name the hub does not know, a name that is none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fixed = ("--labels", labels, "--out", tmp_path / "shards", "--device", "cpu", "--model")
    (tmp_path / "model").mkdir()
    assert f"{tmp_path / 'model'} is a folder without config.json" in mistake(
        "cache-features", *fixed, tmp_path / "model"
    )
    for name in ("nobody/such-a-model", str(tmp_path / "no-folder"), "a name, certainly"):
        line = mistake("cache-features", *fixed, name)
        assert f"{name!r} is neither a local folder nor could it be fetched" in line
        assert "dst init-model" in line
        assert all(
            told in line for told in ("--model", "--set model.init=")
        )  # of both commands that take one
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert "is not a SmolVLM checkpoint" in mistake("cache-features", *fixed, tmp_path / "model")
    assert not (tmp_path / "shards").exists()


def test_a_model_folder_with_a_broken_file(tiny_model: Path, labels: Path, tmp_path: Path) -> None:
    fixed = ("--labels", labels, "--out", tmp_path / "shards", "--device", "cpu", "--model")
    weights = (tiny_model / "model.safetensors").read_bytes()
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for name, text, reason in (
        ("config.json", b"{ not json", "is not JSON"),
        ("preprocessor_config.json", b"{ not json", "is not JSON"),
        ("preprocessor_config.json", b"{}", "lacks image_mean"),
        ("model.safetensors", b"nothing", "is not whole"),
        ("model.safetensors", weights[: len(weights) // 2], "is not whole"),  # a download that broke off
    ):
        whole = (model / name).read_bytes()
        (model / name).write_bytes(text)
        assert f"{model / name} {reason}" in mistake("cache-features", *fixed, model)
        (model / name).write_bytes(whole)
    assert not (tmp_path / "shards").exists()


def test_no_labels(tiny_model: Path, tmp_path: Path) -> None:
    line = mistake("cache-features", "--labels", tmp_path / "none", "--model", tiny_model, "--device", "cpu")
    assert f"{tmp_path / 'none'} holds no label tables; run 'dst prepare" in line


def test_tokens_that_do_not_fit(labels: Path, tiny_model: Path, tmp_path: Path) -> None:
    fixed = ("--labels", labels, "--out", tmp_path / "shards", "--model", tiny_model, "--device", "cpu")
    line = mistake("cache-features", *fixed, "--tokens-per-frame", "3")
    assert "--tokens-per-frame 3 does not fit the 2x2 grid; use 4, 1" in line
    assert "--tokens-per-frame 0" in mistake("cache-features", *fixed, "--tokens-per-frame", "0")


def test_debug_shows_where(tmp_path: Path) -> None:
    result = run("--debug", "prepare", "--root", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "UserError"


def test_a_process_ends_with_status_2(tmp_path: Path) -> None:
    """Not only inside the test's runner."""
    code = "import cli; cli.app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", "--root", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")
    assert list(tmp_path.iterdir()) == []


# ---- what works, and what fails half way


def test_prepare_tells_what_it_wrote(corpus: Path, tmp_path: Path) -> None:
    result = run("prepare", "--root", corpus, "--out", tmp_path / "labels")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines()]
    for name in TABLES:
        assert [name, str(len(rows_of(tmp_path / "labels/assembly101", name)))] in lines
    splits = [row["split"] for row in rows_of(tmp_path / "labels/assembly101", "sessions")]
    for split in ("train", "val", "test"):
        assert [split, str(splits.count(split))] in lines
    assert "next: dst cache-features" in result.stdout


def test_init_model_writes_what_can_be_cached(tiny_model: Path, tmp_path: Path) -> None:
    result = run("init-model", "--out", tmp_path / "model")
    assert result.exit_code == 0
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (tiny_model / weights).read_bytes()


def test_a_failing_video_gives_status_1(labels: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of two videos one is missing: the other is cached, the list is told; the video back, all is well."""
    videos = sorted(rows_of(labels / "assembly101", "videos"), key=lambda row: row["video_id"])[:2]
    gone, there = videos
    away = tmp_path / "gone.mp4"
    sessions = [
        r
        for r in rows_of(labels / "assembly101", "sessions")
        if r["video_id"] in {v["video_id"] for v in videos}
    ]
    chosen = {row["session_id"] for row in sessions}
    folder = tmp_path / "labels" / "assembly101"
    folder.mkdir(parents=True)
    for name, schema in TABLES.items():
        rows = {"videos": [gone | {"uri": str(away)}, there], "sessions": sessions, "rejects": []}.get(name)
        if rows is None:
            rows = [row for row in rows_of(labels / "assembly101", name) if row["session_id"] in chosen]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")

    out = tmp_path / "shards"
    command = ("cache-features", "--labels", tmp_path / "labels", "--out", out, "--model", tiny_model)
    result = run(*command, "--device", "cpu")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    failed = [gone["video_id"], *(r["session_id"] for r in sessions if r["video_id"] == gone["video_id"])]
    told = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert [line.split(": ")[1] for line in told] == failed
    assert told[0].endswith(f"{away} is not there")
    assert f"{len(failed)} failed, all listed in {out / 'ledger'}" in in_one_line(result.stderr)
    ledger = {path.stem: json.loads(path.read_text()) for path in (out / "ledger").iterdir()}
    listed = [ledger[stem]["failures"] for stem in ("vision-00000", "labels-00000")]
    assert [failure["id"] for failures in listed for failure in failures] == failed
    cached = sorted(r["session_id"] for r in sessions if r["video_id"] == there["video_id"])
    assert ShardCache(out).session_ids == cached

    assert run(*command, "--device", "cpu").exit_code == 1  # as long as it is so
    shutil.copy(gone["uri"], away)
    result = run(*command, "--device", "cpu", "--retry-failed")
    assert (result.exit_code, result.exception) == (0, None)
    assert result.stderr == ""
    assert f"then dst train --shards {out}" in in_one_line(result.stdout)
    assert ShardCache(out).session_ids == sorted(chosen)
