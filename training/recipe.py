"""The settings of a training run: what a recipe file may say, and what each value buys."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from schemas.config import Strict, load_config
from schemas.errors import UserError


class ModelSettings(Strict):
    """Which backbone, and how a tick enters it."""

    init: str | None = None  # a hub name or a folder; none takes the checkpoint the cache was made with
    visual_adapter: Literal["identity", "fuse"] = "fuse"
    visual_tokens: int = Field(1, ge=1)  # a tick in the sequence; with fuse 1 an hour is 7,200 tokens


class DataSettings(Strict):
    """How windows are cut and batched."""

    window_ticks: int = Field(64, ge=1)
    max_plan_steps: int = Field(24, ge=1)  # a longer plan shows the steps around the current one
    memory_turns: int = Field(2, ge=0)  # utterances before a window that are repeated in it
    batch_windows: int = Field(8, ge=1)
    max_seq_len: int = Field(2048, ge=64)  # windows are packed into rows of up to so many tokens
    state_noise: float = Field(0.03, ge=0, le=1)  # chance that a step's starting state is shown wrongly
    blind: bool = False  # features are zeroed: shows what the labels alone give away


class HeadLoss(Strict):
    """The loss of one head and its weight in the sum."""

    loss: Literal["cross_entropy", "balanced", "focal"]
    weight: float = Field(1.0, ge=0)
    gamma: float = Field(2.0, ge=0)  # focal only
    alpha: tuple[float, ...] | None = None  # focal only: one weight a class

    @model_validator(mode="after")
    def _alpha_is_for_focal(self) -> HeadLoss:
        if self.alpha is not None and self.loss != "focal":
            raise ValueError(f"alpha belongs to the focal loss, not to {self.loss}")
        return self


class LossSettings(Strict):
    speaking: HeadLoss = HeadLoss(loss="balanced")  # its threshold on val is flat, so it travels well
    dst_update: HeadLoss = HeadLoss(loss="balanced")
    response: HeadLoss = HeadLoss(loss="cross_entropy")
    dst_state: HeadLoss = HeadLoss(loss="cross_entropy")


class TrainSettings(Strict):
    """Optimiser and length."""

    steps: int = Field(2000, ge=1)
    lr: float = Field(5e-5, gt=0)  # of the backbone
    head_lr: float = Field(5e-4, gt=0)  # of adapter and heads, which start from nothing
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    eval_every: int = Field(200, ge=1)
    seed: int = 0


class Recipe(Strict):
    """A whole training run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    losses: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()


def load_recipe(name: str | None, overrides: list[str]) -> Recipe:
    """A recipe by the name of a packaged one, or a YAML file; none gives the defaults.

    Raises:
        UserError: no such recipe, or one that does not hold.
    """
    if name is None:
        return load_config(Recipe, None, overrides)
    if Path(name).is_file():
        return load_config(Recipe, Path(name), overrides)
    packaged = resources.files("training.recipes")
    with resources.as_file(packaged / f"{name}.yaml") as path:
        if not path.is_file():
            known = sorted(
                file.name.removesuffix(".yaml") for file in packaged.iterdir() if file.name.endswith("yaml")
            )
            raise UserError(f"no recipe {name!r}; give a YAML file or one of {', '.join(known)}")
        return load_config(Recipe, path, overrides)
