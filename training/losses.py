"""Losses that divide by the labels there are, wherever those labels lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

LossName = Literal["cross_entropy", "balanced", "focal"]

IGNORE = -100
"""Label of a position or pair that no loss looks at."""


@dataclass(frozen=True)
class LossParts:
    """Sums of a loss over groups of labels, and how many labels (or what weight of them) each group has.

    Kept apart so that sums of several batches and machines are divided once, by all their labels.
    ``sums`` float32 ``[G]`` carries the gradient, ``counts`` float32 ``[G]`` does not.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    def mean(self, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over the groups that have labels of each group's mean; 0, still in the graph, where none has.

        Args:
            counts: labels by group over all batches and machines of a step; None means these parts are all.
        """
        counts = self.counts if counts is None else counts
        groups = (counts > 0).sum().clamp(min=1)
        divisor = counts.where(counts > 0, counts.new_ones(()))
        return (self.sums / divisor).sum() / groups


def label_counts(
    name: LossName, labels: torch.Tensor, classes: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The ``counts`` of `loss_parts`, known before any logits: float32 ``[classes]`` for ``balanced``, else ``[1]``.

    Args:
        labels, weights: as of `loss_parts`.
        classes: C.
    """
    import torch

    flat = labels.reshape(-1)
    kept = flat != IGNORE
    wanted = flat[kept]
    weight = (
        torch.ones(len(wanted), device=flat.device) if weights is None else weights.reshape(-1)[kept].float()
    )
    if name == "balanced":
        return torch.zeros(classes, device=flat.device).index_add(0, wanted, weight)
    return weight.sum()[None]


def loss_parts(
    name: LossName,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    gamma: float = 2.0,
    alpha: tuple[float, ...] | None = None,
) -> LossParts:
    """Loss of one head over its labelled positions; the others are dropped before anything is computed.

    - ``cross_entropy``: one group, every label counts the same.
    - ``balanced``: one group a class, so that the mean of the class means is taken.
    - ``focal``: ``-alpha[y] * (1 - p[y]) ** gamma * log p[y]`` (Lin et al., 2017), one group.

    Args:
        logits: ``[..., C]``, any floating type; computed in float32.
        labels: int64 ``[...]`` in ``0..C-1``, or `IGNORE` where there is none.
        weights: float ``[...]``, how much each label counts, in sum and divisor; None counts each once.
        gamma: how much focal loss turns away from what is already right.
        alpha: weight of each class in focal loss; None weighs all with 1.

    Raises:
        ValueError: an unknown name, or as many alphas as there are not classes.
    """
    import torch

    classes = logits.shape[-1]
    flat, wanted = logits.reshape(-1, classes), labels.reshape(-1)
    kept = wanted != IGNORE
    flat, wanted = flat[kept].float(), wanted[kept]
    values = -torch.log_softmax(flat, dim=-1).gather(-1, wanted[:, None])[:, 0]
    if name == "focal":
        if alpha is not None and len(alpha) != classes:
            raise ValueError(f"focal loss needs {classes} alphas, one a class, not {len(alpha)}")
        class_weight = torch.tensor(alpha or (1.0,) * classes, device=flat.device)[wanted]
        values = class_weight * (1 - (-values).exp()).clamp(min=0) ** gamma * values
    elif name not in ("cross_entropy", "balanced"):
        raise ValueError(f"unknown loss {name!r}")
    if weights is not None:
        values = values * weights.reshape(-1)[kept].float()
    counts = label_counts(name, labels, classes, weights)
    if name == "balanced":
        return LossParts(values.new_zeros(classes).index_add(0, wanted, values), counts)
    return LossParts(values.sum()[None], counts)
