"""FSC147: pictures of many objects of one category, each object marked by a point.

Licence: MIT for code and annotations; the pictures were gathered from the web, for research. Layout under the corpus'
root or its folder ``data``, where the table of categories may be absent or have gaps::

    annotation_FSC147_384.json          name: {points: [[x, y], ...], ...}
    Train_Test_Val_FSC_147.json         split: [name, ...]
    ImageClasses_FSC147.txt             name TAB category
    images_384_VarV2/<name>

A picture is one session, its category the goal. Points are in pixels of the files in ``images_384_VarV2``, whose size
is read from themselves: ``H`` and ``W`` of the annotations are those of larger originals. The splits ``val_coco`` and
``test_coco`` are parts of others, and not read. An object that is marked twice is counted twice, as in the official
counts.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_manifests import load_manifest
from pipeline.sources.common import read_json, safe_id
from pipeline.sources.tables import table_rows
from pipeline.stills import KINDS, is_picture
from schemas.errors import UserError
from schemas.records import Picture, Point, Rejects, Split
from schemas.states import SourceRow

LEVELS: tuple[str, ...] = ()
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}  # by key of the file
_PARTS_OF_SPLITS = ("val_coco", "test_coco")
_IMAGES_A_UNIT = 64
_UNKNOWN = "objects"
_LYING = (5, 6, 7, 8)  # EXIF orientations of pictures that a viewer turns by a quarter


class _Image(NamedTuple):
    """A picture that is in a split; ``points`` are as the file has them."""

    name: str
    split: Split
    category: str | None
    points: list[Any]


@dataclass(frozen=True)
class _Unit:
    """Some pictures, one after the other."""

    root: Path
    annotations: Path
    images: tuple[_Image, ...]


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The pictures in order of their names; see `common.Corpus`."""
    manifest = load_manifest("fsc147")
    found = {kind: manifest.find(root, kind) for kind in ("annotations", "splits", "categories")}
    missing = [kind for kind in ("annotations", "splits") if not found[kind]]
    if missing:
        raise manifest.nothing_found(root, missing)
    [annotations], [splits] = found["annotations"], found["splits"]
    annotated, split_of = _table(annotations, rejects), _read_splits(splits, rejects)
    categories: dict[str, str] = {}
    for path in found["categories"]:
        categories = _read_categories(path, annotated, rejects)
    images: dict[str, _Image] = {}
    for name in sorted(annotated.keys() | split_of.keys()):
        split, annotation = split_of.get(name), annotated.get(name)
        if name not in annotated:
            rejects.add(splits, name, "no annotation")
        elif name not in split_of:
            rejects.add(annotations, name, "in no split")
        elif not isinstance(annotation, dict) or not isinstance(annotation.get("points"), list):
            rejects.add(annotations, name, "no points")
        elif split and _picture_id(name) in images:
            rejects.add(annotations, name, "second image of one id", images[_picture_id(name)].name)
        elif split:
            images[_picture_id(name)] = _Image(name, split, categories.get(name), annotation["points"])
    ordered = tuple(images.values())
    starts = range(0, len(ordered), _IMAGES_A_UNIT)
    return [_Unit(root, annotations, ordered[start : start + _IMAGES_A_UNIT]) for start in starts]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Picture]:
    """The pictures of a unit that are there."""
    for image in unit.images:
        path = load_manifest("fsc147").path(unit.root, f"images_384_VarV2/{image.name}")
        size = _size(path, SourceRow(str(unit.annotations), image.name), rejects)
        if size is None:
            continue
        if image.category is None:
            rejects.notes[f"images without a category, whose goal is now {_UNKNOWN!r}"] += 1
        yield Picture(
            picture_id=_picture_id(image.name),
            path=path,
            width=size[0],
            height=size[1],
            split=image.split,
            category=image.category or _UNKNOWN,
            points=tuple(_points(image, size, unit.annotations, rejects)),
        )


def _picture_id(name: str) -> str:
    return safe_id("fsc147", Path(name).stem)


def _table(path: Path, rejects: Rejects) -> dict[str, Any]:
    """A JSON file that is one object."""
    table = read_json(path, rejects)
    if not isinstance(table, dict):
        raise UserError(f"{path} is not a table by name but {str(table)[:40]!r}; fetch it again")
    return table


def _read_splits(path: Path, rejects: Rejects) -> dict[str, Split | None]:
    """The split of each picture, None where it is in two: a reject already."""
    split_of: dict[str, Split | None] = {}
    for key, names in _table(path, rejects).items():
        if key in _PARTS_OF_SPLITS:
            continue
        if key not in _SPLITS or not isinstance(names, list):
            rejects.add(path, key, "not a split")
            continue
        for number, name in enumerate(names, 1):
            before = split_of.get(name) if isinstance(name, str) else None
            if not isinstance(name, str):
                rejects.add(path, f"{key}, row {number}", "not a name", name)
            elif name not in split_of:
                split_of[name] = _SPLITS[key]
            elif before == _SPLITS[key]:
                rejects.add(path, f"{key}, row {number}", "second row of one image", name)
            else:
                rejects.add(path, f"{key}, row {number}", "in two splits", name)
                split_of[name] = None
    return split_of


def _read_categories(path: Path, annotated: Collection[str], rejects: Rejects) -> dict[str, str]:
    categories: dict[str, str] = {}
    for number, (name, category, *others) in table_rows(path, "\t", 2, rejects):
        if any(others):
            rejects.add(path, f"row {number}", "too many columns", f"{2 + len(others)} of 2")
        elif not category:
            rejects.add(path, f"row {number}", "no category", name)
        elif name in categories:
            rejects.add(path, f"row {number}", "second row of one image", name)
        elif name not in annotated:
            rejects.add(path, f"row {number}", "no annotation", name)
        else:
            categories[name] = category
    return categories


def _size(path: Path, row: SourceRow, rejects: Rejects) -> tuple[int, int] | None:
    """Width and height in pixels of the upright picture, which need only the file's header."""
    from PIL import ExifTags, Image

    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        rejects.add(*row, "image is not there", path)
        return None
    if not is_picture(str(path)):  # else the cache would take it for a video
        rejects.add(*row, "not a JPEG, PNG, WebP or BMP", path)
        return None
    try:
        with Image.open(path, formats=KINDS) as image:
            width, height = image.size
            lies = image.getexif().get(ExifTags.Base.Orientation) in _LYING
            return (height, width) if lies else (width, height)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        rejects.add(path, "header", "image cannot be opened", error)
        return None


def _points(image: _Image, size: tuple[int, int], file: Path, rejects: Rejects) -> Iterator[Point]:
    for number, value in enumerate(image.points, 1):
        row = SourceRow(str(file), f"{image.name}, point {number}")
        pair = _pair(value)
        if pair is None:
            rejects.add(*row, "not a point", str(value)[:80])
        elif not all(0 <= place <= end for place, end in zip(pair, size, strict=True)):
            rejects.add(*row, "outside the image", f"{pair[0]:g}, {pair[1]:g} of {size[0]} x {size[1]}")
        else:
            yield Point(*pair, row)


def _pair(value: Any) -> tuple[float, float] | None:
    """Two finite numbers, None where it is anything else."""
    if not (
        isinstance(value, list) and len(value) == 2 and all(type(each) in (int, float) for each in value)
    ):
        return None
    try:
        x, y = map(float, value)
    except OverflowError:
        return None
    return (x, y) if math.isfinite(x) and math.isfinite(y) else None
