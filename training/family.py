"""What the engine asks of a family of tasks, so that one engine trains them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator

from training.recipe import AnyTask
from training.runlog import Row
from training.steps import Position, Steps

Counts = dict[str, torch.Tensor]
"""Labels of each task, by the groups of its loss: float32 ``[G]``."""


class AnyBatch(Protocol):
    """What one pass computes."""

    @property
    def names(self) -> list[str]:
        """Of what is in it, for messages."""

    @property
    def padding(self) -> float:
        """Share of the positions that hold nothing."""

    def to(self, device: torch.device | str) -> Self: ...


class Family(Protocol):
    """The data and the scores of a run.

    Attributes:
        tokenizer: saved beside the model.
        chosen: values of the model's config that a validation chooses.
        scores: what a validation measures.
        data_key: changes when the data does, not when its cache is moved.
        notes: what the user should know before it starts, a sentence each.
    """

    tokenizer: Any
    chosen: tuple[str, ...]
    scores: tuple[str, ...]
    data_key: str
    notes: tuple[str, ...]

    def steps(self, start: Position, rank: int, ranks: int) -> Steps[Any]:
        """All steps from a position on, without end, as one rank sees them."""

    def validate(self, model: Any, accelerator: Accelerator, between: Callable[[], None]) -> Row:
        """Scores on the validation part, with what is chosen there.

        Args:
            between: called before each pass; where it raises `Interrupted`, nothing is changed.
        """


class AnyModel(Protocol):
    """What a model tells of itself, beside being a module.

    Attributes:
        own_parts: how parameters begin that one task alone has.
        new_parts: how those begin that the backbone's checkpoint does not have.
    """

    own_parts: Mapping[str, str]
    new_parts: tuple[str, ...]

    def count_labels(self, batch: Any, tasks: Mapping[str, Any]) -> Counts:
        """The labels of one batch, which are known before the model has seen it."""

    def task_losses(
        self,
        outputs: Mapping[str, torch.Tensor],
        batch: Any,
        tasks: Mapping[str, AnyTask],
        totals: Counts,
    ) -> dict[str, torch.Tensor]:
        """Each task's share of its mean loss over all labels of a step, and what else is to be logged beside them."""


def summed(counts: Sequence[Counts]) -> Counts:
    """The labels of several batches."""
    return {name: torch.stack([each[name] for each in counts]).sum(0) for name in counts[0]}
