"""`dst stream`: an assistant on a video or a camera, with what the user says typed in or given with times."""

from __future__ import annotations

import json
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

import typer

from pipeline.decode import DecodeError, TickFrame
from pipeline.live import Gap, live_ticks
from pipeline.live_source import is_live
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.task import read_task
from training.assistant import Assistant, Event
from training.board import Board
from training.recording import recording

OnTick = Callable[[TickFrame | Gap, Sequence[Event]], None]


def stream(
    assistant: Assistant, ticks: Iterable[TickFrame | Gap], hear: Callable[[], None], on_tick: OnTick
) -> None:
    """Let an assistant see a stream to its end.

    Args:
        hear: called before each tick, to tell the assistant what the user has said meanwhile.
        on_tick: gets each tick or gap with its events, as they happen.
    """
    for tick in ticks:
        hear()
        if isinstance(tick, Gap):
            events = assistant.miss(tick.end, tick.reason)
        else:
            events = assistant.step(tick.image, assistant.clock.time_of(tick.tick))
        on_tick(tick, events)


def stream_and_tell(
    run: Path,
    video: str,
    plan: Path,
    *,
    checkpoint: str | None,
    device: str,
    rotation_deg: int,
    start_s: float,
    pace: bool,
    words: Path | None,
    events: Path | None,
    record: Path | None,
) -> None:
    """Show it on a terminal; elsewhere print the events, a line of JSON each.

    Raises:
        UserError: a file cannot be read or written, or the video cannot be decoded.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; events and recording are whole up to there.
    """
    _require_apart([path for path in (Path(video), plan, words, events, record) if path is not None])
    task = read_task(plan)
    said = read_words(words) if words else []
    assistant = Assistant.load(run, task, checkpoint=checkpoint, device=device, start_s=start_s)
    for t_s, text in said:
        try:
            assistant.hear(text, t_s)
        except UserError as error:
            raise UserError(f"{words}, second {t_s:g}: {error}") from None
    board = Board(task)
    with ExitStack() as stack:
        asked = stack.enter_context(_asked_to_stop())
        to: list[IO[str]] | None = None
        recorder = stack.enter_context(recording(record, assistant.clock.tick_hz)) if record else None
        typing = stack.enter_context(Typing()) if sys.stdin.isatty() and sys.stdout.isatty() else None
        show = stack.enter_context(_view(board, typing)) if sys.stdout.isatty() else None

        def hear() -> None:
            for line in typing.lines() if typing else []:
                try:
                    assistant.hear(line)
                    board.note = ""
                except UserError as error:
                    board.note = str(error)

        def on_tick(tick: TickFrame | Gap, happened: Sequence[Event]) -> None:
            nonlocal to
            if to is None:  # a file of last time is emptied when there is something to write into it
                to = [] if sys.stdout.isatty() else [sys.stdout]
                to += [stack.enter_context(_opened(events))] if events is not None else []
            for file in to:
                file.writelines(json.dumps(event.row(), ensure_ascii=False) + "\n" for event in happened)
                file.flush()
            last = tick.end - 1 if isinstance(tick, Gap) else tick.tick
            board.take(assistant.clock.time_of(max(0, last)), happened)
            if recorder is not None:
                if isinstance(tick, Gap):
                    recorder.take(None, board, tick.end - tick.first)
                else:
                    recorder.take(tick.image, board)
            if show is not None:
                show()
            if asked:
                raise KeyboardInterrupt(asked[0])

        try:
            with closing(live_ticks(video, assistant.clock, rotation_deg=rotation_deg)) as ticks:
                stream(assistant, _paced(ticks, assistant.clock, start_s) if pace else ticks, hear, on_tick)
        except DecodeError as error:
            what = "" if is_live(video) else "; give a video that PyAV opens, a camera's number or an address"
            raise UserError(f"{error}{what}") from None
        except KeyboardInterrupt:
            typer.echo(f"seen up to {board.clock}", err=True)
            raise
    counts = (
        ", ".join(f"{count} {kind}" for kind, count in sorted(board.counts.items())) or "nothing happened"
    )
    typer.echo(f"the stream ended at {board.clock}: {counts}", err=True)
    late = [text for t_s, text in said if assistant.clock.tick_of(t_s) >= assistant.next_tick]
    if late:
        typer.echo(f"never heard, as the stream ended before: {', '.join(map(repr, late))}", err=True)


def _paced(ticks: Iterable[TickFrame | Gap], clock: Clock, start_s: float) -> Iterator[TickFrame | Gap]:
    """Each tick at its time, or later where it takes longer; those before ``start_s`` as fast as they come."""
    began = time.monotonic()
    for tick in ticks:
        ahead = clock.time_of(tick.end if isinstance(tick, Gap) else tick.tick) - start_s
        if ahead <= 0:
            began = time.monotonic()
        time.sleep(max(0.0, began + ahead - time.monotonic()))
        yield tick


def _require_apart(paths: Sequence[Path]) -> None:
    """What is written must not be what is read.

    Raises:
        UserError: two of them are one file.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(
                f"{path} is named twice; what is read and what is written must be files of their own"
            )


def read_words(path: Path) -> list[tuple[float, str]]:
    """What the user says, from lines such as ``12.5 what comes next?``: seconds, and words.

    Raises:
        UserError: it cannot be read, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"the words {path} cannot be read ({why})") from None
    found = []
    for number, line in enumerate(lines, 1):
        told = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s+(\S.*?)\s*", line)
        if told:
            found.append((float(told[1]), told[2]))
        elif line.strip():
            raise UserError(f"{path}, line {number} is not seconds and words; write '12.5 what comes next?'")
    return found


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The signals that ask to stop, as they come.

    Each also raises `KeyboardInterrupt` at once, so that no wait outlasts it. But compiled code that has called back
    into Python may drop what is raised there, and the stream would go on.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the events {path} cannot be written ({error.strerror}); give another place"
        ) from None
    with file:
        yield file


@contextmanager
def _view(board: Board, typing: Typing | None) -> Iterator[Callable[[], None]]:
    """The board on the terminal; drawn anew when asked to, and a few times a second for what is typed."""
    from rich.console import Console
    from rich.live import Live

    console = Console()

    def render() -> Any:
        return board.render(console.height, typing.text if typing else None)

    with Live(get_renderable=render, console=console, refresh_per_second=8) as live:
        yield live.refresh


class Typing:
    """Lines that the user types while something else is shown there; ``text`` is the one not yet finished."""

    def __init__(self) -> None:
        self.text = ""
        self._lines: list[str] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def lines(self) -> list[str]:
        """Those finished since this was last asked."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def __enter__(self) -> Typing:
        import termios
        import tty

        self._before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        self._over.set()
        self._thread.join()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def _read(self) -> None:
        import codecs
        import os

        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while not self._over.is_set():
            if not select.select([sys.stdin], [], [], 0.1)[0]:
                continue
            read = os.read(sys.stdin.fileno(), 1024)
            if not read:
                return
            for letter in decoder.decode(read):
                self._take(letter)

    def _take(self, letter: str) -> None:
        if letter in "\r\n":
            with self._lock:
                self._lines += [self.text] if self.text.strip() else []
            self.text = ""
        elif letter in "\x7f\b":
            self.text = self.text[:-1]
        elif letter.isprintable():
            self.text += letter
