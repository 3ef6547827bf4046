"""The curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from training.drawing import DPI, INK, WIDTH, dress, say, write_figure
from training.recipe import TASK_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[Mapping[str, float]]
_Kind = Literal["log", "from zero", "signed"]

# Of Okabe and Ito, which remain apart under every common colour blindness. A task has its colour in every panel.
_TASK_COLOURS = dict(zip(TASK_NAMES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
_TASK_COLOURS |= {"coord": "#0072B2", "done": "#D55E00"}  # which no log has beside the others
_AXES = ("/loss_x", "/loss_y")  # of a place
_STYLES = ("-", "--", ":", "-.")


def curves_picture(log: Log, path: Path) -> None:
    """Draw a training log as a PNG: losses by step and validation scores; below them, where the log has them, the
    error of counts, the norms of the tasks' gradients and the cosines between each two.

    Args:
        log: rows with ``step`` and any of ``train/loss*`` and ``val/loss_*`` (losses), ``val/count_mae`` (objects,
            which would flatten shares beside it), other ``val/*`` (scores), and where there are any ``grad/cos_*``
            (cosines), ``train/grad_norm_*`` or else ``grad/norm_*`` (norms); other names are not drawn.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    names = sorted({name for row in log for name in row})
    losses = [name for name in names if name.startswith(("train/loss", "val/loss"))]
    counts = [name for name in names if name == "val/count_mae"]
    scores = [name for name in names if name.startswith("val/") and name not in losses + counts]
    cosines = [name for name in names if name.startswith("grad/cos_")]
    # of independent each step's are logged; those that a probe has seen are the same, now and then
    norms = [name for name in names if name.startswith("train/grad_norm_")]
    norms = norms or [name for name in names if name.startswith("grad/norm_")]
    panels: list[tuple[str, list[str], _Kind]] = [
        ("Losses", losses, "log"),
        ("Validation", scores, "from zero"),
    ]
    if counts:
        panels.append(("Mean error of the count, in objects", counts, "from zero"))
    if cosines:
        panels.append(("Norms of the tasks' gradients", norms, "log"))
        panels.append(("Cosines between the tasks' gradients", cosines, "signed"))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 4.8 * rows), dpi=DPI, facecolor="white")
    for place, (title, lines, kind) in enumerate(panels):
        bottom, left = rows - 1 - place // 2, (0.06, 0.55)[place % 2]
        axes = figure.add_axes((left, (bottom + 0.12) / rows, 0.42, 0.79 / rows))
        _draw_curves(axes, log, lines, title, smooth=kind != "from zero")
        if lines and kind == "log":
            axes.set_yscale("log", nonpositive="mask")
        elif lines and kind == "from zero":  # or a small change looks large
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        elif kind == "signed":
            axes.axhline(0, color=INK, lw=0.8)  # below it, tasks are against each other
    write_figure(figure, path)


def _draw_curves(axes: Axes, log: Log, names: Sequence[str], title: str, smooth: bool) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", color=INK, loc="left")
    dress(axes, "step")
    if not names:
        say(axes, 0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
    drawn: list[tuple[str, ...]] = []
    for name in names:
        rows = [(row["step"], row[name]) for row in log if name in row]
        steps, values = np.array(rows, dtype=np.float64).T
        tasks = _tasks_of(name)
        look = _look(tasks, drawn.count(tasks))
        drawn.append(tasks)
        window = max(1, len(values) // 40) if smooth else 1
        if window > 1:
            axes.plot(steps, values, color=look["color"], lw=0.6, alpha=0.3)
            steps, values = steps[window - 1 :], np.convolve(values, np.full(window, 1 / window), "valid")
        marker = "o" if len(values) <= (40 if len(tasks) < 2 else 1) else ""
        axes.plot(steps, values, lw=1.8, marker=marker, ms=3.5, label=_label(name), **look)
    if names:
        look = {"frameon": False, "labelcolor": INK, "handlelength": 3.6}  # as long as a line of dashes needs
        axes.legend(fontsize=8, ncols=1 + (len(names) > 5), **look)


def _tasks_of(name: str) -> tuple[str, ...]:
    """The task that a number of the log is of, the two whose gradients it compares, or none."""
    if name.startswith("grad/cos_"):
        pair = name.removeprefix("grad/cos_")
        return tuple(
            task for task in _TASK_COLOURS if pair.startswith(f"{task}_") or pair.endswith(f"_{task}")
        )
    if name.endswith(_AXES):
        return ("coord",)
    return tuple(task for task in _TASK_COLOURS if task in name)


def _look(tasks: Sequence[str], place: int) -> dict[str, Any]:
    """A line in its task's colour, of another kind for each of the task's numbers; in both colours between two."""
    if len(tasks) == 2:
        return {"color": _TASK_COLOURS[tasks[0]], "ls": (0, (4, 4)), "gapcolor": _TASK_COLOURS[tasks[1]]}
    return {"color": _TASK_COLOURS[tasks[0]] if tasks else INK, "ls": _STYLES[place % len(_STYLES)]}


def _label(name: str) -> str:
    """What the legend calls a number of the log."""
    for prefix in ("train/loss_", "train/grad_norm_", "grad/norm_", "val/"):
        if name.startswith(prefix):
            label = name.removeprefix(prefix)
            return f"{label.removeprefix('loss_')}, val" if label.startswith("loss_") else label
    if name.startswith("grad/cos_"):
        return " · ".join(task.removeprefix("dst_") for task in _tasks_of(name))
    return "all, weighted" if name == "train/loss" else name
