"""Decoding of only what some pictures need: the rest of each group of pictures is never given to the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.packets import MISSING, Packets
from pipeline.sequential import MOST_B_FRAMES, Shown
from pipeline.streams import Beat, Complaints

if TYPE_CHECKING:
    import av

_LEADING = {"hevc", "mpeg1video", "mpeg2video", "mpeg4"}
"""Formats whose leading pictures no picture behind them uses."""


class UnsureError(Exception):
    """Decoding did not go as the packets promised: only a decoder that has seen them all can tell what is right."""


@dataclass(frozen=True)
class Plan:
    """Which packets the decoder is given.

    Attributes:
        pts: int64 ``[N]``, of all packets in decoding order, as a check.
        wanted: int64, sorted, pts of the pictures to be shown.
        timeline: pts of every picture that may come out.
        sent: bool ``[N]``.
        fresh: bool ``[N]``; before this packet the decoder is emptied, since pictures before it were left out.
    """

    pts: NDArray[np.int64]
    wanted: NDArray[np.int64]
    timeline: frozenset[int]
    sent: NDArray[np.bool_]
    fresh: NDArray[np.bool_]


def plan_of(packets: Packets, wanted: NDArray[np.int64]) -> Plan | None:
    """What to decode for the pictures at the times ``wanted`` (sorted), None where packets alone cannot tell."""
    if packets.broken_off or not len(packets) or not packets.is_clean[0] or packets.is_corrupt.any():
        return None
    shown = packets.shown()
    if not len(shown) or (packets.pts == MISSING).any() or (np.diff(shown) == 0).any():
        return None
    steps = np.diff(shown)
    if packets.loses_silently and len(steps) and steps.max() > 1.5 * np.median(steps):  # perhaps one is lost
        return None
    starts = np.flatnonzero(packets.is_clean)
    leading = _leading(packets, starts)
    if leading is None or (leading.any() and packets.codec not in _LEADING):
        return None
    needed = np.isin(packets.pts, wanted) & ~packets.is_discard
    sent, fresh = np.zeros(len(packets), bool), np.zeros(len(packets), bool)
    groups = list(pairwise([*starts.tolist(), len(packets)]))
    # from the last group on, since one whose leading pictures are needed needs the whole group before
    whole = False
    for begin, end in reversed(groups):
        last = end if whole else _end_of_use(packets, needed, begin, end)
        leads = leading[begin:last] & needed[begin:last]
        whole = bool(leads.any())
        sent[begin:last] = packets.is_used[begin:last] | needed[begin:last]
        last_lead = begin + int(np.flatnonzero(leads)[-1]) + 1 if whole else begin
        sent[last_lead:last] &= ~leading[last_lead:last]
    left_out = False
    for begin, end in groups:
        if sent[begin]:
            fresh[begin], left_out = left_out, False
        left_out = left_out or bool((packets.is_used & ~sent & ~leading)[begin:end].any())
    return Plan(packets.pts, wanted, frozenset(shown.tolist()), sent, fresh)


def _end_of_use(packets: Packets, needed: NDArray[np.bool_], begin: int, end: int) -> int:
    """One past the last packet of a group that has to be decoded; its beginning if there is none."""
    kept = needed[begin:end] | packets.has_parameters[begin:end]
    if end == len(packets) or packets.has_parameters[end]:
        kept[0] = needed[begin]  # its parameter sets are replaced at the next start
    used = np.flatnonzero(kept)
    return begin + int(used[-1]) + 1 if len(used) else begin


def _leading(packets: Packets, starts: NDArray[np.intp]) -> NDArray[np.bool_] | None:
    """Which pictures are shown before the start they are decoded after; None where starts are not in order."""
    shown = np.where(packets.is_discard, MISSING, packets.pts)
    group = np.cumsum(packets.is_clean) - 1
    leading = ~packets.is_discard & (packets.pts < packets.pts[starts][group])
    before = np.maximum.accumulate(shown)
    in_order = (before[starts[1:] - 1] < packets.pts[starts[1:]]).all()
    # a leading picture belongs between its start and the one before; at the first there is nothing it could need
    floor = np.concatenate([[np.iinfo(np.int64).max], packets.pts[starts[:-1]]])[group]
    if not in_order or (leading & (packets.pts <= floor)).any():
        return None
    return leading


def planned_pictures(
    container: av.container.InputContainer, stream: av.VideoStream, plan: Plan, beat: Beat | None = None
) -> Iterator[Shown]:
    """The wanted pictures in the order of presentation.

    Raises:
        UnsureError: a packet or picture is damaged, or another one came than the packets promised.
    """
    import av

    out, context, complaints = _Output(plan), stream.codec_context, Complaints()
    number = 0
    try:
        for packet in container.demux(stream):
            if beat is not None:
                beat()
            if not packet.size:
                continue
            if number == len(plan.pts):  # where the scan ended
                break
            if packet.pts != plan.pts[number]:
                raise UnsureError
            if plan.sent[number]:
                if plan.fresh[number]:
                    yield from out.of(context.decode(None), at_end=True)
                    context.flush_buffers()
                frames = context.decode(packet)
                if complaints.new():
                    raise UnsureError
                yield from out.of(frames)
                if out.complete:
                    return
            number += 1
        yield from out.of(context.decode(None), at_end=True)
    except av.FFmpegError:
        raise UnsureError from None
    if not out.complete:
        raise UnsureError


class _Output:
    """Checks what the decoder gives, and lets through what is wanted."""

    def __init__(self, plan: Plan) -> None:
        self._wanted: list[int] = plan.wanted.tolist()
        self._timeline = plan.timeline
        self._seen = 0  # of the wanted ones
        self._last = MISSING
        self._held: list[Shown] = []  # a B picture may be drawn from a damaged one that is shown after it
        self._b_frames = 0

    @property
    def complete(self) -> bool:
        return self._seen == len(self._wanted) and not self._held

    def of(self, frames: list[av.VideoFrame], at_end: bool = False) -> list[Shown]:
        """What can be shown now.

        Raises:
            UnsureError: a picture is damaged, out of order or not among the packets', or a wanted one is missing.
        """
        from av.video.frame import PictureType

        ready: list[Shown] = []
        for frame in frames:
            pts = frame.pts
            if pts is None or frame.is_corrupt or pts <= self._last or pts not in self._timeline:
                raise UnsureError
            self._last = pts
            if self._seen < len(self._wanted) and pts >= self._wanted[self._seen]:
                if pts > self._wanted[self._seen]:
                    raise UnsureError
                self._held.append(Shown(pts, frame.duration or 0, frame))
                self._seen += 1
            self._b_frames = self._b_frames + 1 if frame.pict_type == PictureType.B else 0
            if self._b_frames in (0, MOST_B_FRAMES):
                ready += self._held
                self._held, self._b_frames = [], 0
        if at_end:
            ready += self._held
            self._held, self._b_frames = [], 0
        return ready
