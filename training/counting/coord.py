"""Where the next object is: how likely at each of a few places of each image token, and which place is answered."""

from __future__ import annotations

import math

import torch
from torch import nn

PLACES = 4
"""Places of an image token, for as many objects that share it."""

TAKEN = 1 / 6
"""A place that is nearer to a mark than this share of a token's width is that mark's."""


class CoordHead(nn.Module):
    """Where the next object is: at which place of which image token, and how far that is from the token's middle.

    A place that is read off a hidden state alone has to be learned for each part of the image anew, and one that is a
    mean of several lies between two objects while it is not known which comes next.
    """

    REACH = 0.25  # of half a side an offset of 1 is: a token of a grid of 8 is as wide

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, PLACES * width, bias=False)  # the softmax would take it out again
        self.offset = nn.Linear(width, PLACES * 2)
        self.scale = width**-0.5

    def forward(
        self, hidden: torch.Tensor, image: torch.Tensor, centres: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[B, S, H]`` and those of the image's tokens ``[B, T, H]``, whose middles are ``[T, 2]``.

        Returns:
            Of the P = ``PLACES`` T places, each token's after the other's, the logarithm of the probability that it is
            there, ``[B, S, P]``, and where they are, ``[B, P, 2]``.
        """
        keys, offsets = (
            layer(image).unflatten(-1, (PLACES, -1)).flatten(1, 2) for layer in (self.key, self.offset)
        )
        scores = self.query(hidden) @ keys.transpose(1, 2) * self.scale
        return scores.log_softmax(-1), centres.repeat_interleave(PLACES, 0) + self.REACH * offsets


def are_taken(places: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Which places ``[..., P, 2]`` of an image are those of its mark ``[..., 2]``: bool ``[..., P]``."""
    width = 2 / math.isqrt(places.shape[-2] // PLACES)
    return (places.clamp(-1, 1) - marks[..., None, :]).norm(dim=-1) < TAKEN * width


def taken_before(
    places: torch.Tensor,
    marks: torch.Tensor,
    row_of_mark: torch.Tensor,
    row_of_read: torch.Tensor,
    marked: torch.Tensor,
) -> torch.Tensor:
    """Which places have a mark, where an image is looked at after some of its marks: bool ``[R, P]``.

    Args:
        places: of B images, ``[B, P, 2]``.
        marks: of all images, ``[M, 2]``, in order of images and of marking.
        row_of_mark: the image of each, int64 ``[M]``.
        row_of_read: the image that is looked at, int64 ``[R]``.
        marked: after how many of its marks, int64 ``[R]``.
    """
    number = torch.arange(len(marks), device=marks.device)
    number = number - torch.searchsorted(row_of_mark, row_of_mark)  # of a mark in its image
    never = len(marks)
    numbers = torch.where(are_taken(places[row_of_mark], marks), number[:, None], never)
    taken_by = torch.full(places.shape[:2], never, device=marks.device)
    taken_by = taken_by.scatter_reduce(0, row_of_mark[:, None].expand_as(numbers), numbers, "amin")
    return taken_by[row_of_read] < marked[:, None]


def next_places(at: torch.Tensor, places: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The likeliest place that has no mark, or where all have one, the likeliest: ``[R, 2]`` in -1..1.

    Args:
        at: logarithms of the probability of each, ``[R, P]``.
        places: ``[R, P, 2]``.
        taken: whether it has a mark, ``[R, P]``.
    """
    free = at.masked_fill(taken & ~taken.all(-1, keepdim=True), -torch.inf)
    chosen = free.argmax(-1)[:, None, None].expand(-1, -1, 2)
    return places.gather(1, chosen)[:, 0].clamp(-1, 1)
