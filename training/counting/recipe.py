"""The settings of a counting run: what its recipe may say, and what each value buys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from training.recipe import (
    AnyRecipe,
    AnyTask,
    BackboneSettings,
    Count,
    LoadingSettings,
    NotNegative,
    Objective,
    SomeTasks,
    TrainSettings,
)

Encoding = Literal["mark_tokens", "token_embed", "drawn"]
CoordLoss = Literal["three_stage", "three_stage_c1"]
Target = Literal["next", "nearest"]


class CountingModelSettings(BackboneSettings):
    """The backbone, how an image enters it, and how the marks do."""

    visual_adapter: Literal["identity", "project"] = "identity"  # project: a trained layer for random towers
    marks: Encoding = (
        "mark_tokens"  # one pass learns from every number of marks; the others take one pass each
    )


class CountingDataSettings(LoadingSettings):
    """How images are batched."""

    batch_images: Count = 32  # of a step, over all ranks and accumulation steps
    images_at_once: Count | None = None  # of one pass on one device; none: as many as a step has for it
    mark_noise: NotNegative = 0.0  # deviation of shown marks from true ones, as a share of the image's side
    max_marks: Count = 100  # a rollout stops there, whatever the done head says


class CoordTask(AnyTask):
    """Where the next object is."""

    loss: CoordLoss = "three_stage_c1"  # three_stage: the original's, which is not monotone
    target: Target = "next"  # nearest: the closest object that has no mark, in any order
    metric: str = "val/coord_error"  # median distance; a loss that is not monotone chooses badly
    patience: Count | None = 5


class DoneTask(AnyTask):
    """Whether all objects are marked."""

    shares: Annotated[tuple[NotNegative, NotNegative, NotNegative], Field()] = (
        0.5,  # of labels with all N marks
        0.25,  # with all but one
        0.25,  # with any number: a head that never sees the middle of a count stops early
    )
    metric: str = "val/loss_done"
    patience: Count | None = 5

    @field_validator("shares")
    @classmethod
    def _shares_are_of_one(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError("must add up to 1: with all marks, with all but one, with any number")
        if shares[0] == 0:
            raise ValueError("the first must be above 0: without all marks there is no end to learn")
        return shares


class CountingTasks(SomeTasks[AnyTask]):
    """The two tasks, a head each."""

    coord: CoordTask = CoordTask()
    done: DoneTask = DoneTask()


class CountingTrainSettings(TrainSettings):
    """Objective, length, and what it runs in."""

    objective: Objective = "independent"  # an optimizer a task: losses of any scale do not meet
    weight_decay: NotNegative = 0.005  # half of what one optimizer has: each of the two decays the trunk
    eval_every: Count | None = None  # at the end of each epoch


class CountingRecipe(AnyRecipe):
    """A whole counting run."""

    best = "best_joint"
    best_by = "val/count_mae"
    family: Literal["counting"] = "counting"
    model: CountingModelSettings = CountingModelSettings()
    data: CountingDataSettings = CountingDataSettings()
    tasks: CountingTasks = CountingTasks()
    train: CountingTrainSettings = CountingTrainSettings()
