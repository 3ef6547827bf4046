"""Pictures of counting: marks with their numbers, true points around them, counts against true ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.stills import RADIUS, Point, draw_marks
from schemas.errors import UserError
from schemas.files import replacing_file
from training.counting.evaluate import Scored
from training.drawing import DPI, INK, QUIET, dress, say, write_figure

_LONGER_SIDE = 960  # pixels of a picture with marks, so that their numbers can be read
_RING = (213, 94, 0)  # of Okabe and Ito's colours
_DOT = "#0072B2"


def write_marked(picture: NDArray[np.uint8], marks: Sequence[Point], path: Path) -> None:
    """Write a picture with its marks, numbered from 1 on, as PNG; enlarged or made smaller, so that they can be read.

    Args:
        picture: RGB uint8 ``[H, W, 3]``.
        marks: in pixels of it.

    Raises:
        UserError: the file cannot be written.
    """
    drawn = marked(picture, marks, (), _LONGER_SIDE)
    try:
        with replacing_file(path) as temporary:
            drawn.save(temporary, "PNG")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name a file with --out in a folder that you can write to"
        ) from None


def marked(
    picture: NDArray[np.uint8], marks: Sequence[Point], points: Sequence[Point], longer_side: int
) -> Image.Image:
    """A picture of that size with its marks as numbered discs, and a ring around each true point."""
    height, width = picture.shape[:2]
    scale = longer_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    large = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    drawn = Image.fromarray(draw_marks(large, [(x * scale, y * scale) for x, y in marks], len(marks)))
    pen = ImageDraw.Draw(drawn)
    for x, y in points:
        pen.circle((x * scale, y * scale), RADIUS + 3, outline=_RING, width=3)
    return drawn


def as_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def counts_picture(scored: Sequence[Scored], path: Path, title: str) -> None:
    """Draw predicted against true counts as a PNG, a dot an image. Equal input, equal bytes."""
    from matplotlib.figure import Figure

    true, predicted = [each.count for each in scored], [each.predicted for each in scored]
    end = max(*true, *predicted, 1) * 1.05
    figure = Figure(figsize=(6, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, end], [0, end], color=QUIET, lw=1)
    axes.scatter(true, predicted, s=18, color=_DOT, alpha=0.45, linewidths=0)
    dress(axes, "true count")
    axes.set_ylabel("predicted count", fontsize=9, color=QUIET)
    axes.set(xlim=(-0.02 * end, end), ylim=(-0.02 * end, end), aspect="equal")
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    say(axes, end * 0.9, end * 0.94, "as many as there are", ha="right")
    write_figure(figure, path)
