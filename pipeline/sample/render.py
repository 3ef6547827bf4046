"""Draws a recording of the toy world and encodes it as a real H.264 file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.sample.world import ANNOTATION_FPS, PARTS, Episode, Recording
from pipeline.workers import in_order
from schemas.files import replacing_file

WIDTH, HEIGHT = 160, 128
_HELD, _PLACED = 60, 24  # sizes of a part in the hand and on the board, in pixels
_HANDS = ((8, 62), (92, 62))  # upper left corner of what the left and the right hand hold
_COLOURS = {
    "red": (215, 35, 35),
    "blue": (50, 90, 235),
    "green": (25, 130, 50),
    "yellow": (250, 235, 60),
    "purple": (130, 40, 170),
    "orange": (255, 120, 0),
    "white": (250, 250, 250),
    "cyan": (40, 215, 225),
    "brown": (95, 50, 15),
    "pink": (250, 135, 190),
    "lime": (150, 235, 60),
    "navy": (15, 20, 95),
}
_SKIN = (222, 172, 140)
# Corners of the drawn shapes on a unit square; a shape without corners is an ellipse in the box given.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "cabin": [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)],
    "roof": [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)],
    "bumper": [(0.0, 0.22), (1.0, 0.22), (1.0, 0.78), (0.0, 0.78)],
    "boom": [(0.22, 0.0), (0.78, 0.0), (0.78, 1.0), (0.22, 1.0)],
    "bucket": [(0.0, 0.15), (1.0, 0.15), (0.75, 0.9), (0.25, 0.9)],
    "light": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
    "ladder": [
        (0, 0),
        (0.3, 0),
        (0.3, 0.35),
        (0.7, 0.35),
        (0.7, 0),
        (1, 0),
        (1, 1),
        (0.7, 1),
        (0.7, 0.65),
        (0.3, 0.65),
        (0.3, 1),
        (0, 1),
    ],
    "crate": [(0.0, 0.0), (0.85, 0.0), (0.85, 0.3), (0.3, 0.3), (0.3, 1.0), (0.0, 1.0)],
    "arm": [
        (0.35, 0),
        (0.65, 0),
        (0.65, 0.35),
        (1, 0.35),
        (1, 0.65),
        (0.65, 0.65),
        (0.65, 1),
        (0.35, 1),
        (0.35, 0.65),
        (0, 0.65),
        (0, 0.35),
        (0.35, 0.35),
    ],
    "door": [(0.35, 0.05), (1.0, 0.05), (0.65, 0.95), (0.0, 0.95)],
}
_ELLIPSES = {"wheel": (0.02, 0.02, 0.98, 0.98), "tank": (0.0, 0.2, 1.0, 0.8)}


def draw_part(draw: ImageDraw.ImageDraw, part: int, x: int, y: int, size: int, upside_down: bool) -> None:
    """One part in a box; upside down it lies on its dark back, with only its rim in colour."""
    colour, kind = PARTS[part]
    fill = (20, 20, 20) if upside_down else _COLOURS[colour]
    rim = _COLOURS[colour] if upside_down else (30, 30, 30)
    width = max(2, size // (8 if upside_down else 30))
    if kind in _ELLIPSES:
        left, top, right, bottom = _ELLIPSES[kind]
        box = (x + left * size, y + top * size, x + right * size, y + bottom * size)
        draw.ellipse(box, fill=fill, outline=rim, width=width)
    else:
        corners = [(x + u * size, y + (1 - v if upside_down else v) * size) for u, v in _POLYGONS[kind]]
        draw.polygon(corners, fill=fill)
        draw.line([*corners, corners[0]], fill=rim, width=width)


def _scene(episode: Episode, frame: float) -> tuple[object, ...]:
    """All that the picture shows at an annotation frame, hashable: equal scenes need one drawing."""
    held = tuple(sorted((s.hand, s.part) for s in episode.steps if s.start <= frame < s.end))
    begun = {s.part for s in episode.steps if s.start <= frame}
    done = {s.part for s in episode.steps if s.end <= frame}
    placed = done if episode.task == "assembly" else set(episode.plan) - begun
    return (
        episode.hands_at <= frame < episode.hands_gone,
        held,
        tuple(sorted(placed)),
        frozenset(s.part for s in episode.upside_down if s.start <= frame < s.end),
        frozenset(s.part for s in episode.shown if s.start <= frame < s.end),
        any(start <= frame < end for start, end in episode.raised),
    )


class Painter:
    """Draws what a recording shows at any instant."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        rng = np.random.default_rng([*recording.seed, 1])
        self.table = np.array([112, 120, 128]) + rng.integers(-12, 13, 3)
        self.grain = rng.integers(-5, 6, (HEIGHT, WIDTH, 1))
        self.jitter = rng.integers(-3, 4, (4096, 2))
        self._drawn: tuple[object, NDArray[np.uint8]] | None = None

    def picture(self, seconds: Fraction) -> NDArray[np.uint8]:
        """RGB uint8 ``[HEIGHT, WIDTH, 3]`` at an instant of the video. Hands tremble five times a second."""
        frame = float(seconds * ANNOTATION_FPS) + 1e-6
        episode = next((e for e in self.recording.episodes if frame < e.end), self.recording.episodes[-1])
        key = (_scene(episode, frame), int(seconds * 5) % len(self.jitter))
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = (key, self._draw(episode, *key))
        return self._drawn[1]

    def _draw(self, episode: Episode, scene: tuple[object, ...], beat: int) -> NDArray[np.uint8]:
        hands, held, placed, upside_down, shown, raised = scene
        image = Image.new("RGB", (WIDTH, HEIGHT), tuple(int(c) for c in self.table))
        draw = ImageDraw.Draw(image)
        draw.rectangle((4, 2, WIDTH - 5, 56), fill=(52, 54, 60))
        for part in placed:  # type: ignore[attr-defined]
            draw_part(draw, part, 9 + 25 * (part % 6), 4 + 26 * (part // 6), _PLACED, upside_down=False)
        holding = dict(held)  # type: ignore[call-overload]
        for hand, (x, y) in enumerate(_HANDS):
            if not hands:
                continue
            x, y = (int(v) for v in self.jitter[beat] + (x, y))
            if raised and hand == 1:
                draw.rectangle((x + 10, y - 60, x + 50, y + 70), fill=_SKIN, outline=(90, 50, 30), width=3)
                continue
            draw.rectangle((x + 6, y + 40, x + 54, y + 90), fill=_SKIN)
            if hand in holding:
                part = holding[hand]
                if part in shown:  # type: ignore[operator]
                    draw.rectangle((x - 6, y - 4, x + _HELD + 6, y + _HELD + 8), fill=(255, 255, 205))
                draw_part(draw, part, x, y, _HELD, part in upside_down)  # type: ignore[operator]
        return np.clip(np.asarray(image).astype(np.int16) + self.grain, 0, 255).astype(np.uint8)

    def frames(self, start: Fraction, end: Fraction) -> Iterator[NDArray[np.uint8]]:
        """Every frame of ``[start, end)`` seconds."""
        rate = Fraction(*self.recording.fps)
        for number in range(int((end - start) * rate)):
            yield self.picture(start + number / rate)


@dataclass(frozen=True)
class Clip:
    """A file to write: ``[start, end)`` seconds of a recording."""

    recording: Recording
    path: Path
    start: Fraction
    end: Fraction


def write_videos(clips: Sequence[Clip], on_video: Callable[[], None]) -> None:
    """Encode clips on all cores; ``on_video`` is called after each."""
    for _ in in_order(_write_video, None, clips, os.cpu_count() or 1):
        on_video()


def whole(recording: Recording, path: Path) -> Clip:
    """The whole of a recording as one file."""
    return Clip(recording, path, Fraction(0), recording.duration)


def _write_video(_: None, clip: Clip) -> None:
    """H.264 in MP4 at the recording's own frame rate; the same clip gives the same bytes."""
    import av

    painter, rate = Painter(clip.recording), Fraction(*clip.recording.fps)
    with replacing_file(clip.path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18", "threads": "1", "g": "120"}
        drawn, converted = None, None
        for number, picture in enumerate(painter.frames(clip.start, clip.end)):
            if picture is not drawn:
                drawn, converted = (
                    picture,
                    av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p"),
                )
            assert converted is not None
            converted.pts, converted.time_base = number, 1 / rate
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
