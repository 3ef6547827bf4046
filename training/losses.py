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
    """Sums of a loss over groups of labels, and the number of labels in each group.

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
        return (self.sums / counts.clamp(min=1)).sum() / groups


def loss_parts(
    name: LossName,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
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
    log_p = torch.log_softmax(flat, dim=-1).gather(-1, wanted[:, None])[:, 0]
    if name == "balanced":
        member = torch.nn.functional.one_hot(wanted, classes).to(log_p.dtype)
        return LossParts(-(log_p[:, None] * member).sum(0), member.sum(0))
    values = -log_p
    if name == "focal":
        if alpha is not None and len(alpha) != classes:
            raise ValueError(f"focal loss needs {classes} alphas, one a class, not {len(alpha)}")
        weight = torch.tensor(alpha or (1.0,) * classes, device=flat.device)[wanted]
        values = weight * (1 - log_p.exp()).clamp(min=0) ** gamma * values
    elif name != "cross_entropy":
        raise ValueError(f"unknown loss {name!r}")
    return LossParts(values.sum()[None], torch.tensor([float(len(values))], device=flat.device))
