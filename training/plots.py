"""Pictures of a session, truth over prediction, and of a training run's curves. The same input, the same bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from schemas.files import replacing_file
from schemas.states import STATE_NAMES
from training.traces import Outcome, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Frames = Sequence[tuple[int, NDArray[np.uint8]]]

# Colours of Okabe and Ito, which remain apart under every common colour blindness.
_STATE_COLOURS = ("#E6E8EB", "#E69F00", "#0072B2")
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_INK, _QUIET, _FAINT = "#22262B", "#6B7280", "#D5D9DE"

# What a tick of speech is: label, colour, marker, whether the marker is filled.
_SPEECH: dict[Outcome, tuple[str, str, str, bool]] = {
    "exact": ("said as it should be", "#009E73", "o", True),
    "words": ("right tick, other words", "#56B4E9", "D", True),
    "missed": ("not said", _QUIET, "o", False),
    "extra": ("said, not asked for", "#D55E00", "X", True),
}

_WIDTH, _LEFT, _RIGHT, _MARGIN = 13.0, 2.75, 0.85, 0.3  # inches
_PLOT = _WIDTH - _LEFT - _RIGHT
_DPI = 150
_MAX_FRAMES, _MAX_UTTERANCES = 8, 12
_THUMB = 0.86  # inches, the height of a frame at most
_LINE = 0.215  # inches, one row of the list of utterances
_NUMBER_ROOM = 0.17  # inches that a number above a mark needs


def timeline_picture(trace: Trace, frames: Frames, path: Path, title: str) -> None:
    """Draw one session as a PNG: frames, every step's state, and speech, true over predicted.

    Args:
        trace: the session.
        frames: (tick of the video, RGB uint8 ``[H, W, 3]``) in order of time; at most 8 are shown, evenly chosen.
        path: the file to write.
        title: the heading.
    """
    spoken = trace.spoken()
    places = np.linspace(0, len(frames) - 1, min(len(frames), _MAX_FRAMES)).round().astype(int)
    shown = [frames[place] for place in places]
    listed = min(len(spoken), _MAX_UTTERANCES)
    words = _LINE * (listed + 2) if spoken else 0.0
    thumb = _thumb(shown)[1] + 0.45 if shown else 0.0
    heights = (1.0, thumb, 0.1 + 0.4 * len(trace.step_names), 0.8, 0.6, words)
    figure, (head, film, bands, speech, _, table) = _rows(heights)
    for axes in (film, bands, speech):
        axes.set_xlim(*_span(trace))
    _draw_head(head, trace, title)
    if shown:
        _draw_frames(film, shown, trace)
    _draw_bands(bands, trace)
    _draw_speech(speech, trace, spoken)
    if spoken:
        _draw_utterances(table, trace, spoken)
    _write(figure, path)


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
    figure = Figure(figsize=(_WIDTH, 4.8), dpi=_DPI, facecolor="white")
    left = figure.add_axes((0.06, 0.12, 0.42, 0.79))
    right = figure.add_axes((0.55, 0.12, 0.42, 0.79))
    _draw_curves(left, log, losses, "Losses", smooth=True)
    _draw_curves(right, log, scores, "Validation", smooth=False)
    if losses:
        left.set_yscale("log", nonpositive="mask")
    if scores:
        right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))  # from zero, or a small change looks large
    _write(figure, path)


def _span(trace: Trace) -> tuple[float, float]:
    """First and last second of a session; a session without ticks is drawn one tick wide."""
    last = trace.first_tick + max(1, trace.truth.num_ticks)
    return trace.first_tick / trace.tick_hz, last / trace.tick_hz


def _rows(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of stacked bare axes of these heights in inches, all on the same stretch of its width."""
    from matplotlib.figure import Figure

    total = sum(heights) + 0.15
    figure = Figure(figsize=(_WIDTH, total), dpi=_DPI, facecolor="white")
    axes, top = [], total
    for height in heights:
        top -= height
        box = (_LEFT / _WIDTH, top / total, _PLOT / _WIDTH, max(height, 0.01) / total)
        axes.append(figure.add_axes(box))
        axes[-1].axis("off")
    return figure, axes


def _say(axes: Axes, x: float, y: float, text: str, ink: str = _QUIET, size: float = 8, **style: Any) -> None:
    # A dollar sign in somebody's words is not the start of a formula.
    axes.text(x, y, text, color=ink, fontsize=size, parse_math=False, **{"va": "center", **style})


def _mark(kind: Outcome, size: float) -> dict[str, Any]:
    _, colour, marker, filled = _SPEECH[kind]
    face = colour if filled else "white"
    return {"ls": "", "marker": marker, "ms": size, "mfc": face, "mec": colour, "mew": 1.2, "clip_on": False}


def _dress(axes: Axes, unit: str) -> None:
    axes.set_xlabel(unit, fontsize=9, color=_QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_QUIET)
    axes.tick_params(which="both", colors=_QUIET, labelsize=8.5)
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)


def _draw_head(axes: Axes, trace: Trace, title: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left = (_MARGIN - _LEFT) / _PLOT
    facts = (
        f"{trace.session_id}  ·  {trace.truth.num_ticks} ticks at {trace.tick_hz:g} Hz"
        f"  ·  {len(trace.step_names)} steps  ·  of each pair of bands the upper is true, the lower predicted"
    )
    _say(axes, left, 0.74, title, _INK, 15, fontweight="bold")
    _say(axes, left, 0.45, facts, size=9)
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=name.replace("_", " "))
        for colour, name in zip(_STATE_COLOURS, STATE_NAMES, strict=True)
    ]
    handles += [Line2D([], [], label=says[0], **_mark(kind, 7)) for kind, says in _SPEECH.items()]
    spacing = {"handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.8, "borderpad": 0.0}
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": _INK, **spacing}
    place = (left - 0.004, 0.18)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles), **look)


def _thumb(frames: Frames) -> tuple[float, float]:
    """Width and height of one frame in the picture, inches."""
    tall, wide = frames[0][1].shape[:2]
    width = min(_PLOT / len(frames) - 0.08, _THUMB * wide / tall)
    return width, width * tall / wide


def _draw_frames(axes: Axes, frames: Frames, trace: Trace) -> None:
    """Frames as close above their time as they can stand side by side, each with a line down to it."""
    low, high = _span(trace)
    inch = (high - low) / _PLOT  # seconds
    width, height = _thumb(frames)
    times = [tick / trace.tick_hz for tick, _ in frames]
    lefts = _side_by_side(times, width * inch, 0.08 * inch, low, high)
    for (_, picture), t, left in zip(frames, times, lefts, strict=True):
        middle = left + width * inch / 2
        axes.imshow(picture, extent=(left, left + width * inch, 0.25, 0.25 + height), aspect="auto")
        _say(axes, middle, height + 0.34, f"{t:.1f} s", ha="center")
        axes.plot([middle, t, t], [0.25, 0.08, 0], color=_QUIET, lw=0.8, clip_on=False)
    axes.set_xlim(low, high)
    axes.set_ylim(0, height + 0.45)


def _side_by_side(times: Sequence[float], width: float, gap: float, low: float, high: float) -> list[float]:
    """Left edges of boxes, in order and apart, within the span and near the times they are centred on."""
    lefts: list[float] = []
    for t in times:
        lefts.append(max(t - width / 2, lefts[-1] + width + gap if lefts else low))
    limit = high
    for place in reversed(range(len(lefts))):
        lefts[place] = min(lefts[place], limit - width)
        limit = lefts[place] - gap
    return lefts


def _draw_bands(axes: Axes, trace: Trace) -> None:
    low, high = _span(trace)
    inch = (high - low) / _PLOT
    axes.set_ylim(len(trace.step_names) - 0.02, -0.12)
    for step, name in enumerate(trace.step_names):
        label = "\n".join(textwrap.wrap(f"{step + 1}. {name}", 36, max_lines=2, placeholder="…"))
        _say(axes, low - 0.11 * inch, step + 0.43, label, _INK, 9, ha="right")
        for track, top, says in ((trace.truth, 0.0, "true"), (trace.predicted, 0.45, "predicted")):
            _say(axes, high + 0.07 * inch, step + top + 0.21, says, size=6.5)
            for start, ticks, state in _runs(track.state[:, step]):
                stretch = (_time(trace, start), ticks / trace.tick_hz)
                axes.broken_barh([stretch], (step + top, 0.41), color=_STATE_COLOURS[state], lw=0)


def _runs(states: NDArray[np.int8]) -> list[tuple[int, int, int]]:
    """Stretches of one state: (first tick, ticks, state)."""
    starts = np.flatnonzero(np.diff(states, prepend=-1)).tolist()
    ends = [*starts, len(states)][1:]
    return [(start, end - start, int(states[start])) for start, end in zip(starts, ends, strict=True)]


def _draw_speech(axes: Axes, trace: Trace, spoken: Sequence[tuple[int, Outcome]]) -> None:
    """One row of marks for what should be said, one for what was; the listed utterances are numbered."""
    low, high = _span(trace)
    axes.set_ylim(-0.6, 1.75)
    axes.axis("on")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _dress(axes, "seconds")
    inch = (high - low) / _PLOT
    # The rarer and better kinds come last, on top of the others.
    kinds: tuple[tuple[str, int, tuple[Outcome, ...]], ...] = (
        ("to be said", 1, ("missed", "words", "exact")),
        ("said", 0, ("extra", "words", "exact")),
    )
    for says, y, of_row in kinds:
        _say(axes, low - 0.11 * inch, y, says, _INK, 9, ha="right")
        axes.axhline(y, color=_FAINT, lw=0.8, zorder=0.5)
        for kind in of_row:
            times = [_time(trace, tick) for tick, which in spoken if which == kind]
            axes.plot(times, [y] * len(times), zorder=3, **_mark(kind, 7))
    free = low
    for number, (tick, kind) in enumerate(spoken[:_MAX_UTTERANCES], start=1):
        t = _time(trace, tick)
        if t >= free:
            height = 0.48 if kind == "extra" else 1.48
            _say(axes, t, height, str(number), _INK, 7.5, ha="center")
            free = t + _NUMBER_ROOM * inch


def _draw_utterances(axes: Axes, trace: Trace, spoken: Sequence[tuple[int, Outcome]]) -> None:
    """The first utterances as a list: number, time, the words to be said, the words that were."""
    listed = spoken[:_MAX_UTTERANCES]
    axes.set_xlim(0, _PLOT)
    axes.set_ylim(len(listed) + 1, -1)
    columns = ((1.4 - _LEFT, "to be said", trace.truth), (7.0 - _LEFT, "said", trace.predicted))  # inches
    for x, heading, _ in columns:
        _say(axes, x, -0.5, heading, fontweight="bold")
    for row, (tick, kind) in enumerate(listed):
        y = row + 0.5
        axes.plot([_MARGIN + 0.06 - _LEFT], [y], **_mark(kind, 5))
        _say(axes, 0.7 - _LEFT, y, str(row + 1), _INK, ha="right")
        _say(axes, 1.25 - _LEFT, y, f"{_time(trace, tick):.1f} s", ha="right")
        for x, _, track in columns:
            words = track.responses[tick] or "(no words)"
            _say(axes, x, y, _short(words, 84) if track.speak[tick] else "—", _INK)
    if len(spoken) > len(listed):
        _say(axes, columns[0][0], len(listed) + 0.5, f"and {len(spoken) - len(listed)} more")


def _time(trace: Trace, tick: int) -> float:
    return (trace.first_tick + tick) / trace.tick_hz


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _draw_curves(
    axes: Axes, log: Sequence[Mapping[str, float]], names: Sequence[str], title: str, smooth: bool
) -> None:
    axes.set_title(title, fontsize=12, fontweight="bold", color=_INK, loc="left")
    _dress(axes, "step")
    if not names:
        _say(axes, 0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
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
        axes.legend(fontsize=8, frameon=False, ncols=1 + (len(names) > 5), labelcolor=_INK)


def _write(figure: Figure, path: Path) -> None:
    with replacing_file(path) as temporary:
        # Without its own version in the file, the same picture has the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
