"""Scores a counter on a split: with true marks, and counting by itself, beside baselines that never look."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.shards import ShardCache
from schemas.errors import UserError
from schemas.files import replacing_file, write_text
from training.assistant import encoder_of
from training.checkpoint import checkpoint_of
from training.counting.counter import Counter, threshold_of
from training.counting.data import CountingPrompt, ImageData, load_images
from training.counting.metrics import Guided, coord_scores, count_scores, score
from training.counting.model import CountingSmolVLM
from training.counting.rollout import Rollout, Subject, roll_out
from training.counting.validation import at_once, guide
from training.evaluate import Reports, cache_of, require_its_features, table_rows
from training.model import load_checkpoint
from training.runs import counting_recipe

FEW = (1, 20)
"""Counts, both included, of the pictures that are also scored apart, as ``up_to_20``."""

TABLE = {
    "count MAE": ("count", "mae"),
    "count RMSE": ("count", "rmse"),
    "exact": ("count", "exact"),
    "next point": ("coord", "median_error"),
    "done too early": ("done", "false_positive"),
    "marks F1": ("marks", "f1"),
}
"""The columns of the table a user sees first."""

PREDICTIONS = pa.schema(
    [
        ("session_id", pa.string()),
        ("goal", pa.string()),
        ("count", pa.int64()),
        ("predicted", pa.int64()),
        ("marks", pa.list_(pa.struct([("x", pa.float64()), ("y", pa.float64())]))),
        ("done", pa.list_(pa.float64())),
        ("errors", pa.list_(pa.float64())),
    ]
)
"""A row an image: its own marks in -1..1 with the probability of being done before each and after the last; and with
true marks, the distances to the next object, as shares of the side."""


@dataclass(frozen=True)
class Scored:
    """An image that was counted in."""

    image: ImageData
    guided: Guided
    rollout: Rollout

    @property
    def count(self) -> int:
        return len(self.image.points)

    @property
    def predicted(self) -> int:
        return len(self.rollout.marks)  # it has ended where it believed to be done, or may make no more


def evaluate(
    run: Path,
    shards: str | Path | None,
    *,
    split: str = "test",
    checkpoint: str = "best_joint",
    device: str = "cpu",
) -> tuple[dict[str, Any], list[Scored]]:
    """Let a checkpoint count in all images of a split, and score it.

    Args:
        run: a folder made by `dst train`.
        shards: the cache; None takes the one it was trained on.

    Returns:
        The scores, and the images in order of id. Both are also written into the run, as `Reports` names them:
        ``metrics.json``, and ``predictions.parquet`` (`PREDICTIONS`).

    Raises:
        UserError: not a run of counting, a cache of another model, a split without images; for a model that has marks
            drawn in, a picture that is gone.
    """
    folder = checkpoint_of(run, checkpoint)
    recipe = counting_recipe(run, "this evaluation")
    cache = ShardCache(shards or cache_of(run))
    model = load_checkpoint(CountingSmolVLM, folder).to(device)
    threshold = threshold_of(model.config)
    require_its_features(cache, model.config)
    images = load_images(cache, split, recipe.model.marks, recipe.data.blind)
    training = load_images(ShardCache(cache_of(run)), "train", recipe.model.marks)
    prompt = CountingPrompt.of(folder)
    if recipe.model.marks == "drawn" and not recipe.data.blind:
        counter = Counter(model, prompt, encoder_of(folder, model, device, model.config.tiles))
        subjects = _on_pictures(counter, images)
    else:
        subjects = [_as_cached(image) for image in images]
    guided, _ = guide(model, prompt, images, recipe)
    rollouts = roll_out(model, prompt, subjects, until=threshold, at_once=at_once(recipe))
    scored = [Scored(*each) for each in zip(images, guided, rollouts, strict=True)]
    about = {
        "run": str(run),
        "checkpoint": checkpoint,
        "split": split,
        "images": len(images),
        "objects": sum(each.count for each in scored),
        "cut_off": sum(each.rollout.done[-1] < threshold for each in scored),
        "marks": recipe.model.marks,
        "blind": recipe.data.blind,
        "seed": recipe.train.seed,
        "versions": {name: version(name) for name in ("dst", "torch", "transformers")},
    }
    metrics = _with_few(scored, partial(_scores, threshold))
    metrics |= {"baselines": _baselines(training, scored), "about": about}
    reports = Reports(run, checkpoint, split)
    _write_predictions(reports.file("predictions.parquet"), scored, about)
    write_text(reports.file("metrics.json"), json.dumps(metrics, indent=2) + "\n")
    return metrics, scored


def _as_cached(image: ImageData) -> Subject:
    return Subject(image.goal, lambda marks: image.features())


def _on_pictures(counter: Counter, images: Sequence[ImageData]) -> list[Subject]:
    """Images whose own marks are drawn in: they have to be encoded anew after each."""
    places = [Path(image.labels.meta["uri"]) for image in images]
    gone = [place for place in places if not place.is_file()]
    if gone:
        raise UserError(
            f"{len(gone)} pictures are not there, such as {gone[0]}, and model.marks=drawn counts on the pictures "
            "themselves; start dst where the cache was made"
        )
    return [counter.subject(place, image.goal) for place, image in zip(places, images, strict=True)]


def _with_few(
    scored: Sequence[Scored], scores_of: Callable[[Sequence[Scored]], dict[str, Any]]
) -> dict[str, Any]:
    """The scores of all images; beside them those of the images of `FEW` objects, where there are such."""
    first, last = FEW
    few = [each for each in scored if first <= each.count <= last]
    return scores_of(scored) | ({f"up_to_{last}": scores_of(few)} if few else {})


def _scores(threshold: float, scored: Sequence[Scored]) -> dict[str, Any]:
    guided, points, rollouts = zip(*((s.guided, s.image.points, s.rollout) for s in scored), strict=True)
    return score(guided, points, rollouts, threshold)


def _baselines(training: Sequence[ImageData], scored: Sequence[Scored]) -> dict[str, Any]:
    """What one gets without looking, by always saying what is usual in the training part: ``count`` and ``coord``, as
    of the model."""
    counts = [len(image.points) for image in training]
    points = np.concatenate([image.points for image in training])
    usual: dict[str, Callable[..., Any]] = {"training_mean": np.mean, "training_median": np.median}
    found = {}
    for name, middle in usual.items():
        number, place = float(middle(counts)), middle(points, axis=0) if len(points) else np.zeros(2)
        found[name] = _with_few(scored, partial(_always, number, place))
    return found


def _always(number: float, place: NDArray[np.floating], scored: Sequence[Scored]) -> dict[str, Any]:
    """Scores of always the same count, and the same next object ``[2]``."""
    points = np.concatenate([each.image.points for each in scored]).astype(np.float64)
    return {
        "count": count_scores([number] * len(scored), [each.count for each in scored]),
        "coord": coord_scores(np.linalg.norm(points - place, axis=-1) / 2),
    }


def _write_predictions(path: Path, scored: Sequence[Scored], about: dict[str, Any]) -> None:
    rows = [
        {
            "session_id": each.image.session_id,
            "goal": each.image.goal,
            "count": each.count,
            "predicted": each.predicted,
            "marks": [{"x": x, "y": y} for x, y in each.rollout.marks],
            "done": each.rollout.done,
            "errors": each.guided.errors.tolist(),
        }
        for each in scored
    ]
    schema = PREDICTIONS.with_metadata({"about": json.dumps(about)})
    with replacing_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")


def markdown_table(metrics: dict[str, Any]) -> str:
    """The scores beside the baselines as a table in Markdown, and of what."""
    lines = [["", *TABLE], ["---"] * (len(TABLE) + 1)]
    lines += [[name, *map(said, values)] for name, values in named_rows(metrics)]
    about = metrics["about"]
    told = f"{about['images']} {about['split']} images of {about['objects']} objects"
    rows = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    return f"{rows}\n{told}; errors of the next point are shares of the image's side.\n"


def named_rows(metrics: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """The rows of the table, on all images, and where some are crowded or empty, on the others alone."""
    first, last = FEW
    rows = table_rows(metrics, TABLE)
    few = metrics.get(f"up_to_{last}")
    if few is not None and few["count"]["by_count"] != metrics["count"]["by_count"]:
        parts = {name: scores[f"up_to_{last}"] for name, scores in metrics["baselines"].items()}
        apart = few | {"baselines": parts}
        if "blind" in metrics:
            apart["blind"] = metrics["blind"][f"up_to_{last}"]
        rows += [(f"{name}, {first} to {last} objects", values) for name, values in table_rows(apart, TABLE)]
    return [(name.replace("_", " "), values) for name, values in rows]


def said(value: float | None) -> str:
    """A score in a table."""
    return "–" if value is None else f"{value:.3f}"
