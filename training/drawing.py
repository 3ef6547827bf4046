"""What all pictures share: colours, words, axes, and writing so that the same picture has the same bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.files import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, FAINT = "#22262B", "#6B7280", "#D5D9DE"
WIDTH = 13.0  # inches
DPI = 150


def say(axes: Axes, x: float, y: float, text: str, ink: str = QUIET, size: float = 8, **style: Any) -> None:
    # A dollar sign in somebody's words is not the start of a formula.
    axes.text(x, y, text, color=ink, fontsize=size, parse_math=False, **{"va": "center", **style})


def dress(axes: Axes, unit: str) -> None:
    axes.set_xlabel(unit, fontsize=9, color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(QUIET)
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)


def write_figure(figure: Figure, path: Path) -> None:
    with replacing_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # words in scripts the font has not: boxes do
        # Without its own version in the file, the same picture has the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
