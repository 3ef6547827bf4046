"""The curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.drawing import DPI, INK, WIDTH, dress, say, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito, which remain apart under every common colour blindness.
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")


def curves_picture(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw a training log as a PNG: losses by step on the left, validation scores on the right.

    Args:
        log: rows with ``step`` and any of ``train/loss_*``, ``val/loss_*`` (left) and other ``val/*`` (right).
        path: the file to write.
    """
    from matplotlib.figure import Figure

    names = sorted({name for row in log for name in row if name.startswith(("train/loss", "val/"))})
    losses = [name for name in names if name.split("/", 1)[1].startswith("loss")]
    scores = [name for name in names if name not in losses]
    figure = Figure(figsize=(WIDTH, 4.8), dpi=DPI, facecolor="white")
    left = figure.add_axes((0.06, 0.12, 0.42, 0.79))
    right = figure.add_axes((0.55, 0.12, 0.42, 0.79))
    _draw_curves(left, log, losses, "Losses", smooth=True)
    _draw_curves(right, log, scores, "Validation", smooth=False)
    if losses:
        left.set_yscale("log", nonpositive="mask")
    if scores:
        right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))  # from zero, or a small change looks large
    write_figure(figure, path)


def _draw_curves(
    axes: Axes, log: Sequence[Mapping[str, float]], names: Sequence[str], title: str, smooth: bool
) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", color=INK, loc="left")
    dress(axes, "step")
    if not names:
        say(axes, 0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
    for place, name in enumerate(names):
        rows = [(row["step"], row[name]) for row in log if name in row]
        steps, values = np.array(rows, dtype=np.float64).T
        colour = _LINE_COLOURS[place % len(_LINE_COLOURS)]
        window = max(1, len(values) // 40) if smooth else 1
        if window > 1:
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
            steps, values = steps[window - 1 :], np.convolve(values, np.full(window, 1 / window), "valid")
        line = "-" if place < len(_LINE_COLOURS) else "--"
        marker = "o" if len(values) <= 40 else ""
        label = name.removeprefix("train/loss_" if smooth else "val/")
        axes.plot(steps, values, color=colour, lw=1.8, ls=line, marker=marker, ms=3.5, label=label)
    if names:
        axes.legend(fontsize=8, frameon=False, ncols=1 + (len(names) > 5), labelcolor=INK)
