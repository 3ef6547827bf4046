"""Writes pictures of many objects of one category in FSC147's official layout.

A picture shows shapes of one kind and one look, each turned its own way, on a plain, graded or clouded ground of a
colour that stands out against them. Points are the centres of the shapes, in the order in which they were laid.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.workers import in_order
from schemas.files import replacing_file, write_text

LEAST_SESSIONS = 7

_HEIGHT, _WIDEST = 384, 640
_SHARE_WIDE = 0.25  # enough for a model to learn that pictures differ in shape
_VAL_PERCENT = _TEST_PERCENT = 15
_USUAL, _CROWDED = (1, 20), (21, 60)  # objects in a picture, both ends included
_ONE_CROWDED_IN = 12  # enough in each split to tell how long counts go, too few to move the mean by much
_ONE_EMPTY_IN = 30  # there are none officially, but a counter must know when there is nothing to mark
_SIZES = (14.0, 40.0)  # diameter in pixels
_FILLED = 0.3  # most of a picture that its objects cover: else no place is found for the last
_APART, _TOUCHING = 1.2, 0.9  # least distance of two centres, in diameters
_SHARE_TOUCHING = 0.06  # of the objects, which may come as near as that
_FINE = 4  # drawn so many times larger, for smooth edges
_QUALITY = 90
_CONTRAST = 110  # least distance of the ground's colour to those of the shapes, of at most 442
_BOXES = 3  # examples of an object's box that a picture's annotation has

_Colour = tuple[int, int, int]
# What fills a shape: two colours, of which the second is the stripes or the dots.
_LOOKS: dict[str, tuple[_Colour, _Colour]] = {
    "red": ((205, 40, 40), (205, 40, 40)),
    "blue": ((45, 80, 210), (45, 80, 210)),
    "green": ((40, 140, 60), (40, 140, 60)),
    "yellow": ((245, 220, 60), (245, 220, 60)),
    "white": ((250, 250, 250), (250, 250, 250)),
    "black": ((20, 20, 25), (20, 20, 25)),
    "striped": ((235, 120, 30), (70, 30, 90)),
    "dotted": ((70, 40, 120), (200, 150, 235)),
}
_GROUNDS: tuple[_Colour, ...] = (
    *((120, 120, 120), (200, 190, 170), (90, 105, 90)),
    *((150, 175, 195), (60, 60, 75), (185, 150, 120)),
)


def _star(arms: int, inner: float) -> list[tuple[float, float]]:
    """Corners on the unit circle, and between each two one on a circle of radius ``inner``."""
    turns = [math.pi * corner / arms for corner in range(2 * arms)]
    radii = (1.0, inner)
    return [
        (radii[at % 2] * math.sin(turn), -radii[at % 2] * math.cos(turn)) for at, turn in enumerate(turns)
    ]


# Corners in the unit circle; a disc and a ring have none.
_SHAPES: dict[str, list[tuple[float, float]]] = {
    "discs": [],
    "rings": [],
    "squares": _star(2, 1.0),
    "triangles": _star(3, 0.5),
    "hexagons": _star(3, 1.0),
    "stars": _star(5, 0.45),
    "crosses": _star(4, 0.35),
    "bars": [(-0.9, -0.4), (0.9, -0.4), (0.9, 0.4), (-0.9, 0.4)],
}


@dataclass(frozen=True)
class _Plan:
    """One picture, before it is drawn: ``points`` are ``(x, y)`` in its pixels."""

    path: Path
    seed: tuple[int, int]
    width: int
    shape: str
    look: str
    diameter: float
    points: list[tuple[float, float]]


def write_pictures(
    out: Path, sessions: int, seed: int, on_plan: Callable[[int], None], on_file: Callable[[], None]
) -> None:
    """See `corpus.write_sample`. A category may be in all splits: what is to be learnt is to count."""
    splits = _splits(sessions, seed)
    plans = {
        number: _plan(out / "images_384_VarV2" / f"{number}.jpg", (seed, number), place)
        for names in splits.values()
        for place, number in enumerate(names)
    }
    ordered = [plans[number] for number in sorted(plans)]
    write_text(out / "annotation_FSC147_384.json", json.dumps({p.path.name: _annotation(p) for p in ordered}))
    names = {split: [f"{number}.jpg" for number in numbers] for split, numbers in splits.items()}
    write_text(out / "Train_Test_Val_FSC_147.json", json.dumps(names, indent=4))
    categories = "".join(f"{plan.path.name}\t{plan.look} {plan.shape}\n" for plan in ordered)
    write_text(out / "ImageClasses_FSC147.txt", categories)
    on_plan(len(ordered))
    for _ in in_order(_draw, None, ordered, os.cpu_count() or 1):
        on_file()


def _splits(sessions: int, seed: int) -> dict[str, list[int]]:
    """The numbers of the pictures of each split, from 1 on, in a shuffled order."""
    numbers = (np.random.default_rng(seed).permutation(sessions) + 1).tolist()
    test, val = sessions * _TEST_PERCENT // 100, sessions * _VAL_PERCENT // 100
    return {
        "test": numbers[:test],
        "val": numbers[test : test + val],
        "train": numbers[test + val :],
    }


def _plan(path: Path, seed: tuple[int, int], place: int) -> _Plan:
    """Decide what a picture shows. Its place in its split decides whether it is crowded or empty: each has some."""
    rng = np.random.default_rng(seed)
    low, high = _CROWDED if place % _ONE_CROWDED_IN == 1 else _USUAL
    count = 0 if place % _ONE_EMPTY_IN == 3 else int(rng.integers(low, high + 1))
    width = int(rng.integers(_HEIGHT + 1, _WIDEST + 1)) if rng.random() < _SHARE_WIDE else _HEIGHT
    room = math.sqrt(_FILLED * width * _HEIGHT / (math.pi / 4 * max(count, 1)))
    diameter = round(float(rng.uniform(_SIZES[0], min(_SIZES[1], room))), 2)
    return _Plan(
        path=path,
        seed=seed,
        width=width,
        shape=str(rng.choice(list(_SHAPES))),
        look=str(rng.choice(list(_LOOKS))),
        diameter=diameter,
        points=_places(rng, count, width, diameter),
    )


def _places(rng: np.random.Generator, count: int, width: int, diameter: float) -> list[tuple[float, float]]:
    """Centres of objects that are whole in the picture."""
    corner, size = diameter / 2, np.array([width - diameter, _HEIGHT - diameter])
    places = np.zeros((0, 2))
    while len(places) < count:
        gap = diameter * (_TOUCHING if rng.random() < _SHARE_TOUCHING else _APART)
        place = corner + rng.random(2) * size
        if (np.hypot(*(places - place).T) >= gap).all():
            places = np.vstack([places, place.round(2)])
    return [(x, y) for x, y in places.tolist()]


def _annotation(plan: _Plan) -> dict[str, object]:
    """As the official file has it; height and width are those of an original twice as large."""
    half = plan.diameter / 2
    boxes = [
        [[x - half, y - half], [x - half, y + half], [x + half, y + half], [x + half, y - half]]
        for x, y in plan.points[:_BOXES]
    ]
    return {
        "H": 2 * _HEIGHT,
        "W": 2 * plan.width,
        "box_examples_coordinates": [[[round(c, 2) for c in corner] for corner in box] for box in boxes],
        "points": plan.points,
    }


def _draw(_: None, plan: _Plan) -> None:
    """Write a picture; the same plan gives the same bytes."""
    rng = np.random.default_rng([*plan.seed, 1])
    ground = _ground(rng, plan)
    fill = _fill(plan)
    covered = np.asarray(_mask(rng, plan), np.float32)[..., None] / 255
    picture = ground + (fill - ground) * covered + rng.normal(0, 3, (_HEIGHT, plan.width, 1))
    with replacing_file(plan.path) as temporary:
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(temporary, "JPEG", quality=_QUALITY)


def _ground(rng: np.random.Generator, plan: _Plan) -> NDArray[np.float32]:
    """What lies behind the shapes, float32 ``[H, W, 3]``."""
    apart = [each for each in _GROUNDS if min(math.dist(each, own) for own in _LOOKS[plan.look]) > _CONTRAST]
    colour = np.array(apart[int(rng.integers(len(apart)))], np.float32)
    kind = rng.integers(3)
    if kind == 0:
        return np.broadcast_to(colour, (_HEIGHT, plan.width, 3))
    cells = rng.uniform(-22, 22, (2, 2) if kind == 1 else (7, 9)).astype(np.float32)
    shade = Image.fromarray(cells).resize((plan.width, _HEIGHT), Image.Resampling.BICUBIC)
    return colour + np.asarray(shade)[..., None]


def _fill(plan: _Plan) -> NDArray[np.float32]:
    """What the shapes are cut out of, float32 ``[H, W, 3]``."""
    first, second = (np.array(colour, np.float32) for colour in _LOOKS[plan.look])
    y, x = np.mgrid[:_HEIGHT, : plan.width]
    pattern = ((x + y) // 4) % 2 if plan.look == "striped" else (x % 6 < 3) & (y % 6 < 3)
    return np.where(pattern[..., None] > 0, second, first)


def _mask(rng: np.random.Generator, plan: _Plan) -> Image.Image:
    """The shapes, white on black, with smooth edges."""
    mask = Image.new("L", (plan.width * _FINE, _HEIGHT * _FINE))
    draw = ImageDraw.Draw(mask)
    radius = plan.diameter / 2 * _FINE
    for x, y in plan.points:
        centre = (x * _FINE, y * _FINE)
        turn = float(rng.uniform(0, 2 * math.pi))
        if corners := _SHAPES[plan.shape]:
            draw.polygon(_turned(corners, turn, radius, centre), fill=255)
        else:
            draw.circle(centre, radius, fill=255)
            if plan.shape == "rings":
                draw.circle(centre, radius / 2, fill=0)
    return mask.reduce(_FINE)


def _turned(
    corners: Sequence[tuple[float, float]], turn: float, radius: float, centre: tuple[float, float]
) -> list[tuple[float, float]]:
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    return [(centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y) for x, y in corners]
