"""What a person sees of a live assistant: the plan with its states, the clock, and the last words."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from schemas.states import COMPLETED, STATE_NAMES
from schemas.task import Task
from training.assistant import Event

LAST_WORDS = 5
_OTHER_LINES = 8  # of the frame, what is typed, and what is wrong
MARKS = {"not_started": "○", "in_progress": "◐", "completed": "●"}
_STYLES = {"not_started": "dim", "in_progress": "bold yellow", "completed": "green"}


@dataclass(frozen=True)
class Said:
    t_s: float
    role: str
    text: str


class Board:
    """Follows the events of a stream.

    Attributes:
        states: the name of each step's state.
        words: the last ones said, the newest at the end.
        counts: how many events of each kind there were.
        now_s: second of the last tick.
        missing: why there is no picture, "" where there is one.
        note: what else the user should know, "" for nothing.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.states = [STATE_NAMES[0]] * len(task.steps)
        self.words: deque[Said] = deque(maxlen=LAST_WORDS)
        self.counts: Counter[str] = Counter()
        self.now_s, self.missing, self.note = 0.0, "", ""

    def take(self, now_s: float, events: Sequence[Event]) -> None:
        """A tick, or a gap up to ``now_s``."""
        self.now_s, self.missing = now_s, ""
        for event in events:
            self.counts[event.kind] += 1
            if event.kind == "state" and event.step is not None and event.state is not None:
                self.states[event.step] = event.state
            elif event.kind in ("speak", "user") and event.text is not None:
                self.words.append(
                    Said(event.t_s, "assistant" if event.kind == "speak" else "user", event.text)
                )
            elif event.kind == "gap":
                self.missing = event.text or ""

    def around_now(self, room: int) -> range:
        """As many steps as there is room for, around the first ones that are not completed."""
        done = self.states.count(STATE_NAMES[COMPLETED])
        first = min(max(0, done - room // 3), max(0, len(self.states) - room))
        return range(first, min(first + room, len(self.states)))

    @property
    def clock(self) -> str:
        """Hours, minutes, seconds and tenths."""
        minutes, seconds = divmod(self.now_s, 60)
        return f"{int(minutes) // 60}:{int(minutes) % 60:02}:{seconds:04.1f}"

    def render(self, height: int, typed: str | None = None) -> Any:
        """For a terminal, as rich shows it.

        Args:
            height: lines that the terminal has; a longer plan shows the steps around the current one.
            typed: what the user has typed so far; None where nothing can be typed.
        """
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        states, lines = list(self.states), tuple(self.words)  # drawn by a thread of its own
        plan = Text(no_wrap=True, overflow="ellipsis")
        for step in self.around_now(max(3, height - len(lines) - _OTHER_LINES)):
            state = states[step]
            plan.append(
                f"{MARKS[state]} {self.task.steps[step]}  {state.replace('_', ' ')}\n", style=_STYLES[state]
            )
        words = Text()
        for said in lines:
            words.append(f"{said.t_s:7.1f} s  ", style="dim")
            words.append(
                f"{said.role}: {said.text}\n", style="cyan" if said.role == "assistant" else "magenta"
            )
        parts: list[Any] = [
            Panel(plan, title=Text(f"{self.task.goal}   {self.clock}"), title_align="left"),
            words,
        ]
        if self.missing:
            parts.append(Text(f"no picture: {self.missing}", style="red"))
        if self.note:
            parts.append(Text(self.note, style="red"))
        if typed is not None:
            parts.append(Text(f"you: {typed}▏", style="magenta"))
        return Group(*parts)
