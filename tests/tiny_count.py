"""What tests of counting share: small pictures in FSC147's layout, their caches, a recipe of a few steps, its parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.prepare import prepare
from pipeline.shards import ShardCache
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.records import Marks
from training.counting.batch import CountingBatch
from training.counting.data import CountingPrompt, ImageData, load_images
from training.counting.family import CountingSteps, build_counter
from training.counting.model import CountingSmolVLM
from training.counting.recipe import CountingRecipe
from training.objectives import OBJECTIVES, Objective
from training.recipe import any_recipe
from training.trainer import _accelerator

COUNTS = {"train": (3, 0, 1, 5, 2, 8, 4, 1, 6), "val": (2, 0, 4, 5), "test": (1, 3)}
"""Objects in each picture."""

ENCODINGS = ("mark_tokens", "token_embed", "drawn")
CATEGORIES = ("red discs", "blue bars", "wheels")
SMALL = (
    "train.strategy=alternating",  # that of all objectives
    "train.steps=6",
    "train.warmup_steps=2",
    "train.lr=1e-3",
    "train.eval_every=null",
    "data.mark_noise=0",
    "data.batch_images=4",
    "data.max_marks=9",
)


def write_pictures(folder: Path) -> Path:
    """Pictures of noise with squares, each square an object; those of a split are named by it and numbered."""
    pictures = folder / "images_384_VarV2"
    pictures.mkdir(parents=True)
    annotations: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    categories = []
    for split, counts in COUNTS.items():
        for number, count in enumerate(counts):
            rng = np.random.default_rng([len(split), number])
            height, width = (100, 140) if number % 2 else (140, 100)
            pixels = rng.integers(0, 120, (height, width, 3), np.uint8)
            points = rng.uniform((4, 4), (width - 4, height - 4), (count, 2)).round(1).tolist()
            for x, y in points:
                pixels[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] = (250, 60, 60)
            name = f"{split}{number}.jpg"
            Image.fromarray(pixels).save(pictures / name, quality=95)
            annotations[name] = {"H": height, "W": width, "points": points}
            splits.setdefault(split, []).append(name)
            categories.append(f"{name}\t{CATEGORIES[number % 3]}\n")
    (folder / "annotation_FSC147_384.json").write_text(json.dumps(annotations))
    (folder / "Train_Test_Val_FSC_147.json").write_text(json.dumps(splits))
    (folder / "ImageClasses_FSC147.txt").write_text("".join(categories))
    return folder


def counting_cache(pictures: Path, model: Path, out: Path, marks: Marks = "none") -> Path:
    """Label tables and features of these pictures, both under ``out``; the cache's folder."""
    prepare("fsc147", pictures, out / "labels", Clock(2.0), marks=marks)
    summary = cache_features(
        out / "labels", out / "shards", Here(VisionEncoder(model, "cpu")), CacheOptions(workers=1)
    )
    assert summary.failures == []
    return out / "shards"


def little(*changes: str) -> CountingRecipe:
    """The counting recipe with six steps of four pictures or less, three to an epoch."""
    recipe = any_recipe("counting", [*SMALL, *changes])
    assert isinstance(recipe, CountingRecipe)
    return recipe


def images_of(shards: Path, recipe: CountingRecipe, split: str = "train") -> list[ImageData]:
    return load_images(ShardCache(shards), split, recipe.model.marks, recipe.data.blind)


def counter_of(shards: Path, recipe: CountingRecipe) -> tuple[CountingSmolVLM, CountingPrompt]:
    """A fresh model, the same each time."""
    return build_counter(recipe, ShardCache(shards))


def next_by_hand(out: dict[str, torch.Tensor], marks: Any) -> tuple[float, float]:
    """The likeliest of the places of a row, four a token, that are a sixth of a token's width or more from all marks;
    where none is, the likeliest."""
    width = 2 / math.sqrt(out["places"].shape[1] / 4)
    found = []
    for at, place in zip(out["at"][0].tolist(), out["places"][0].clamp(-1, 1).double().tolist(), strict=True):
        is_taken = any(math.dist(place, mark) < width / 6 for mark in marks)
        found.append((not is_taken, at, tuple(place)))
    x, y = max(found)[2]
    return x, y


def objective_of(shards: Path, recipe: CountingRecipe) -> Objective:
    """A fresh model and the objective that trains it."""
    accelerator = _accelerator(recipe, "cpu", Path())
    return OBJECTIVES[recipe.train.objective](accelerator, counter_of(shards, recipe)[0], recipe)


def some_passes(shards: Path, recipe: CountingRecipe, number: int) -> list[list[CountingBatch]]:
    """The passes of a run's first steps."""
    _, prompt = counter_of(shards, recipe)
    steps = iter(CountingSteps(images_of(shards, recipe), prompt, recipe))
    found = [next(steps) for _ in range(number)]
    return [step.passes for step in found]  # type: ignore[union-attr]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
