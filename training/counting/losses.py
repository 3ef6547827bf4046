"""Losses of the two heads of counting; each divides by the weight of its labels, wherever those lie."""

from __future__ import annotations

import torch

from training.counting.recipe import CoordLoss
from training.losses import LossParts

NEAR, FAR = 0.05, 0.1
"""Where the stages of the coordinate loss meet, in distances |dx| + |dy| of an image of side 2."""


def coord_values(name: CoordLoss, distance: torch.Tensor) -> torch.Tensor:
    """Loss of each distance d = |dx| + |dy|, in units of which an image is two wide and two high.

    - ``three_stage``: ``10 d**2`` below 0.05, ``d**2`` below 0.1, else ``0.2 d + 0.01``. It falls to a tenth at 0.05,
      so that a smaller loss may be a greater distance: it cannot tell which checkpoint is better.
    - ``three_stage_c1``: ``10 d**2`` below 0.05, else ``d - 0.025``: value and slope are continuous.

    Args:
        distance: float ``[...]``, not negative.
    """
    if name == "three_stage":
        far = torch.where(distance < FAR, distance**2, 0.2 * distance + 0.01)
        return torch.where(distance < NEAR, 10 * distance**2, far)
    return torch.where(distance < NEAR, 10 * distance**2, distance - 0.025)


SOFTNESS = 0.1
"""Differences of the loss of two places that are large: a place whose loss is as much greater is a third as good."""


def over_places(values: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    """Loss of places that are the right one with probabilities p: ``-s log(sum p exp(-value / s))``, s = 0.1.

    Minus the logarithm of a mixture's likelihood, in units of the loss (Bishop, "Mixture density networks", 1994).
    Where one place has all probability it is that place's loss. The loss of the mean place is least between two
    objects, and the mean of the losses teaches next to nothing of a place that is thought unlikely.

    Args:
        values: loss of each place, ``[..., P]``.
        log_probabilities: ``[..., P]``.

    Returns:
        ``[...]``, from the least value to the mean by p.
    """
    return -SOFTNESS * (log_probabilities - values / SOFTNESS).logsumexp(-1)


def nearest_unmarked(
    predicted: torch.Tensor, points: torch.Tensor, is_unmarked: torch.Tensor
) -> torch.Tensor:
    """The unmarked point of each row that lies closest by |dx| + |dy|; no gradient goes through the choice.

    Args:
        predicted: ``[R, 2]``.
        points: ``[R, P, 2]``.
        is_unmarked: bool ``[R, P]``; a row with none gets its first point.

    Returns:
        ``[R, 2]``.
    """
    distance = (points - predicted.detach()[:, None]).abs().sum(-1).masked_fill(~is_unmarked, torch.inf)
    chosen = distance.argmin(-1)
    return points[torch.arange(len(points), device=points.device), chosen]


def weighted(values: torch.Tensor, weights: torch.Tensor) -> LossParts:
    """Values ``[R]`` and how much each counts ``[R]``; those of weight 0 are left out before anything is summed."""
    kept = weights > 0
    return LossParts((values[kept] * weights[kept]).sum()[None], weights.sum()[None])
