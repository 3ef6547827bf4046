"""Pictures: a file to RGB pixels, and marks drawn on it one after the other. What imports this need not load torch."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from pipeline.decode import TickFrame
from pipeline.ledger import key_of
from pipeline.streams import DecodeError
from schemas.clock import Clock
from schemas.records import video_parts

Point = Sequence[float]
"""x and y in pixels of the upright picture."""

RADIUS = 12
"""Pixels of the picture's file; a mark is a disc around its point."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
KINDS = ("JPEG", "PNG", "WEBP", "BMP")  # of the many of Pillow, some of which start other programs
_GREEN = np.array([0, 255, 0], np.uint16)
_TENTHS = 6  # of a mark's colour; the others are the picture's
_INK = 0
_WHITE = (255, 255, 255, 255)
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
)  # what Pillow's readers raise


def is_picture(uri: str) -> bool:
    """Whether a video is a picture, by the ending of its file's name.

    So one that is gone or broken is still known as a picture, nothing has to be fetched or opened to count them, and
    no video is taken for one. Which kind of picture a file holds is seen in the file, whatever it is called.
    """
    parts = video_parts(uri)
    return len(parts) == 1 and Path(parts[0]).suffix.lower() in _SUFFIXES


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """The pixels of a picture, RGB uint8 ``[H, W, 3]``.

    It is turned upright as its EXIF orientation asks, as viewers and the tools that make annotations show it. What is
    transparent lies on white. Of 16 bits the upper 8 are taken.

    Raises:
        DecodeError: the file is not there, or is no whole picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # of half as many pixels as are refused
            with Image.open(path, formats=KINDS) as image:
                return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DecodeError(f"{path} is not there") from None
    except UnidentifiedImageError:
        raise DecodeError(f"{path} holds no JPEG, PNG, WebP or BMP picture") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DecodeError(f"{path} claims more than {most:,} pixels; make it smaller") from None
    except _BROKEN as error:
        told = " ".join(str(error).split())
        raise DecodeError(f"{path} cannot be read as a picture ({told})") from None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # Pillow would cut off at 255
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    return np.array(image.convert("RGB"))


def picture_ticks(
    path: str | Path,
    clock: Clock,
    last_tick: int,
    rotation_deg: int = 0,
    marks: Sequence[Point] | None = None,
) -> Iterator[TickFrame]:
    """A picture as a video: tick 0 is the picture; with ``marks``, tick k is the picture with the first k of them.

    Args:
        last_tick: stop after it, if there are so many.
        rotation_deg: counter-clockwise, after the marks have been drawn.

    Raises:
        DecodeError: as `read_picture`.
    """
    picture = read_picture(path)
    marks = marks or ()
    for tick in range(min(last_tick, len(marks)) + 1):
        if tick > 0:
            _draw(picture, marks[tick - 1], tick)
        shown = np.rot90(picture, round(rotation_deg / 90) % 4).copy()  # the next mark goes into ours
        yield TickFrame(tick, clock.time_of(tick), shown)


def draw_marks(image: NDArray[np.uint8], points: Sequence[Point], count: int) -> NDArray[np.uint8]:
    """A copy of a picture with the first ``count`` marks: each a green disc of 60 %, its number from 1 on in black.

    Args:
        image: RGB uint8 ``[H, W, 3]``.
    """
    drawn = image.copy()
    for number, point in enumerate(points[:count], 1):
        _draw(drawn, point, number)
    return drawn


def _draw(image: NDArray[np.uint8], point: Point, number: int) -> None:
    """One more mark on a picture, in whole numbers, so that every machine gives the same bytes."""
    x, y = point
    top, left = (max(0, math.ceil(centre - RADIUS)) for centre in (y, x))
    below, right = (max(0, math.floor(centre + RADIUS) + 1) for centre in (y, x))
    around = image[top:below, left:right]
    rows, columns = np.ogrid[top : top + around.shape[0], left : left + around.shape[1]]
    disc = (columns - x) ** 2 + (rows - y) ** 2 <= RADIUS**2
    around[disc] = (_TENTHS * _GREEN + (10 - _TENTHS) * around[disc].astype(np.uint16) + 5) // 10
    ink = _digits(number)
    rows, columns = np.nonzero(ink)
    rows, columns = rows + round(y) - ink.shape[0] // 2, columns + round(x) - ink.shape[1] // 2
    inside = (rows >= 0) & (rows < image.shape[0]) & (columns >= 0) & (columns < image.shape[1])
    image[rows[inside], columns[inside]] = _INK


@functools.cache
def _digits(number: int) -> NDArray[np.bool_]:
    """Where a number is black, cut to its ink: in the font of bits that lies in Pillow itself, which no version of a
    library draws otherwise."""
    font = ImageFont.load_default_imagefont()
    canvas = Image.new("1", (8 * len(str(number)), 16))
    ImageDraw.Draw(canvas).text((0, 0), str(number), fill=1, font=font)
    return np.asarray(canvas.crop(canvas.getbbox()))


def marks_sha256(marks: Sequence[Point] | None) -> str | None:
    """What tells whether a picture has been drawn with other marks, or the marks otherwise; None for none."""
    if marks is None:
        return None
    return key_of(_style(), [[float(x), float(y)] for x, y in marks])


@functools.cache
def _style() -> str:
    """A hash of how marks look."""
    grey = np.arange(64 * 256 * 3).reshape(64, 256, 3) % 251
    points = [(16.25 + 22 * n, 20.5 + n) for n in range(10)]
    return hashlib.sha256(draw_marks(grey.astype(np.uint8), points, 10).tobytes()).hexdigest()
