"""A video of what the assistant saw, with its state and words beside the picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.files import replacing_file
from training.board import Board

if TYPE_CHECKING:
    import av
    from PIL import Image, ImageDraw

HEIGHT, PANEL = 480, 480
"""Pixels: the height of the video, and the width of what is written beside the picture."""
_MARGIN, _LINE, _SIZE = 16, 20, 14
_BACK, _INK, _QUIET = "#16181C", "#E6E8EB", "#8A919C"
_STATE_INKS = {"not_started": _QUIET, "in_progress": "#E69F00", "completed": "#56B4E9"}
_ROLE_INKS = {"assistant": "#56B4E9", "user": "#CC79A7"}


@contextmanager
def recording(path: Path, tick_hz: float) -> Iterator[Recorder]:
    """A recorder whose video takes ``path``'s place when the context is left, also by an error: what was seen is kept.

    Raises:
        UserError: it cannot be written.
    """
    import av

    if path.suffix != ".mp4":
        raise UserError(f"the recording {path} would be an mp4; name it so")
    with replacing_file(path) as temporary:
        try:
            container = av.open(str(temporary), "w", format="mp4")
        except (av.FFmpegError, OSError) as error:
            raise UserError(
                f"the recording {path} cannot be written ({error.strerror}); give another place"
            ) from None
        recorder = Recorder(container, tick_hz)
        ended: BaseException | None = None
        try:
            yield recorder
        except (Exception, KeyboardInterrupt) as error:
            ended = error
        recorder.close()
        if recorder.is_empty:
            raise ended or UserError(f"nothing was seen, so there is no recording {path}")
    if ended is not None:
        raise ended


class Recorder:
    """Writes one frame a tick, H.264. Its size is that of the first picture, scaled to `HEIGHT`, and a panel."""

    def __init__(self, container: av.container.OutputContainer, tick_hz: float) -> None:
        from matplotlib.font_manager import findfont
        from PIL import ImageFont

        self._container, self._rate = container, Fraction(tick_hz).limit_denominator(1000)
        self._stream: Any = None
        self._font = ImageFont.truetype(findfont("DejaVu Sans"), _SIZE)  # comes with matplotlib
        self._picture: Image.Image | None = None
        self._before = 0  # ticks without a picture before the first one, which says how large the video is

    @property
    def is_empty(self) -> bool:
        return self._stream is None

    def take(self, frame: NDArray[np.uint8] | None, board: Board, ticks: int = 1) -> None:
        """So many ticks that look like this.

        Args:
            frame: RGB uint8 ``[H, W, 3]``; None where there is no picture: the last one stays, darkened; before the
                first one, that one is shown.
        """
        import av
        from PIL import Image, ImageOps

        if frame is not None:
            width = max(2, round(frame.shape[1] * HEIGHT / frame.shape[0] / 2) * 2)
            size = (width, HEIGHT) if self._picture is None else self._picture.size
            self._picture = ImageOps.pad(Image.fromarray(frame), size, color=_BACK)
        if self._picture is None:
            self._before += ticks
            return
        ticks, self._before = ticks + self._before, 0
        shown = self._picture if frame is not None else self._picture.point(lambda value: value // 3)
        image = Image.new("RGB", (shown.width + PANEL, HEIGHT), _BACK)
        image.paste(shown, (0, 0))
        self._write_panel(image, shown.width, board)
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "23"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = *image.size, "yuv420p"
        for _ in range(ticks):
            self._container.mux(self._stream.encode(av.VideoFrame.from_image(image)))

    def close(self) -> None:
        """Write what is still held back."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def _write_panel(self, image: Image.Image, left: int, board: Board) -> None:
        """Clock and goal, the words at the bottom, and between them as many steps as find room around the current."""
        from PIL import ImageDraw

        draw, x = ImageDraw.Draw(image), left + _MARGIN
        words = [
            (line, _ROLE_INKS[said.role])
            for said in board.words
            for line in self._wrapped(draw, f"{said.t_s:.1f} s  {said.role}: {said.text}")
        ]
        if board.missing:
            words += [(line, "#D55E00") for line in self._wrapped(draw, f"no picture: {board.missing}")]
        y = _MARGIN
        draw.text((image.width - _MARGIN, y), board.clock, font=self._font, fill=_QUIET, anchor="ra")
        goal = self._wrapped(draw, board.task.goal, PANEL - 2 * _MARGIN - 90)[:2]
        for line in goal:
            draw.text((x, y), line, font=self._font, fill=_INK)
            y += _LINE
        words = words[-((HEIGHT // 2 - _MARGIN) // _LINE) :]
        floor = HEIGHT - _MARGIN - len(words) * _LINE
        room = max(1, (floor - y - _LINE) // _LINE)
        y += _LINE // 2
        for step in board.around_now(room):
            ink = _STATE_INKS[board.states[step]]
            self._mark(draw, x, y, board.states[step], ink)
            draw.text((x + 22, y), self._wrapped(draw, board.task.steps[step])[0], font=self._font, fill=ink)
            y += _LINE
        for number, (line, ink) in enumerate(words):
            draw.text((x, floor + number * _LINE), line, font=self._font, fill=ink)

    def _mark(self, draw: ImageDraw.ImageDraw, x: int, y: int, state: str, ink: str) -> None:
        """An empty, a half and a full circle."""
        box = (x, y + 3, x + 11, y + 14)
        draw.ellipse(box, outline=ink, fill=ink if state == "completed" else None)
        if state == "in_progress":
            draw.pieslice(box, 90, 270, fill=ink)

    def _wrapped(
        self, draw: ImageDraw.ImageDraw, text: str, width: int = PANEL - 2 * _MARGIN - 22
    ) -> list[str]:
        """Lines of at most so many pixels, broken between words; a longer word is cut."""
        lines = [""]
        for word in text.split():
            while draw.textlength(word, font=self._font) > width:
                word = word[: len(word) * 3 // 4]
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font=self._font) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines
