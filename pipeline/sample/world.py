"""A toy world: what happens in one recording, when, and what its assistant says about it.

Every moment the assistant reacts to can be seen in the picture and cannot be known without it: how long
steps and pauses last is drawn at random. The rules of speech are fixed, so that they can be learned:

- the first instruction comes when the hands come into view, some seconds after the user has told the goal, and
  the last words when they leave it;
- a step that begins in its turn is a silent change of state; one that begins out of turn is acknowledged;
- a finished step gets feedback that names the part, unless the other hand is still busy: then silence;
- a raised hand (hesitation) gets a hint, a part held upside down a correction, a part shown to the camera after
  a question an answer, a question about what comes next an answer at once; "Okay." gets none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

ANNOTATION_FPS = 30
"""Annotations count frames at this rate, whatever the video's own rate is."""

PARTS: tuple[tuple[str, str], ...] = (
    ("red", "wheel"),
    ("blue", "cabin"),
    ("green", "roof"),
    ("yellow", "bumper"),
    ("purple", "boom"),
    ("orange", "bucket"),
    ("white", "light"),
    ("cyan", "ladder"),
    ("brown", "crate"),
    ("pink", "arm"),
    ("lime", "door"),
    ("navy", "tank"),
)
TOYS = ("excavator", "dump truck", "roller", "crane", "fire engine", "water tanker", "bulldozer", "tractor")

Task = Literal["assembly", "disassembly"]
VERBS: dict[Task, str] = {"assembly": "attach", "disassembly": "detach"}


def part_name(part: int) -> str:
    """Colour and kind, such as ``red wheel``."""
    return " ".join(PARTS[part])


def step_name(task: Task, part: int) -> str:
    """What the plan calls a step, such as ``attach the red wheel``."""
    return f"{VERBS[task]} the {part_name(part)}"


@dataclass(frozen=True)
class Span:
    """Something that goes on with one part in one hand, in annotation frames ``[start, end)``."""

    start: int
    end: int
    part: int
    hand: int  # 0 left, 1 right


@dataclass(frozen=True)
class Utterance:
    """Words at one annotation frame."""

    frame: int
    role: Literal["user", "assistant"]
    text: str
    labels: str


@dataclass
class Episode:
    """One assembly or disassembly: its plan, what is done when, what is seen besides, what is said."""

    task: Task
    toy: int
    plan: tuple[int, ...]  # parts, in the order of the plan
    hands_at: int = 0  # when the hands come into view
    hands_gone: int = 0  # and when they leave it
    end: int = 0
    steps: list[Span] = field(default_factory=list)  # in the order they begin
    upside_down: list[Span] = field(default_factory=list)  # mistakes
    shown: list[Span] = field(default_factory=list)  # a part turned to the camera
    raised: list[tuple[int, int]] = field(default_factory=list)  # hesitations
    words: list[Utterance] = field(default_factory=list)

    def goal(self) -> str:
        return f"{'Assemble' if self.task == 'assembly' else 'Disassemble'} the {TOYS[self.toy]}"


class _Author:
    """Writes an episode from left to right; ``now`` is the annotation frame reached."""

    def __init__(self, rng: np.random.Generator, episode: Episode, start: int, talkative: bool) -> None:
        self.rng, self.episode, self.now, self.talkative = rng, episode, start, talkative
        self.begun: set[int] = set()

    def wait(self, low_s: float, high_s: float) -> int:
        self.now += round(self.rng.uniform(low_s, high_s) * ANNOTATION_FPS)
        return self.now

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def say(self, role: Literal["user", "assistant"], text: str, labels: str) -> None:
        self.episode.words.append(Utterance(self.now, role, text, labels))

    def next_part(self) -> int | None:
        """The first part of the plan that is not begun: what the assistant names next."""
        return next((part for part in self.episode.plan if part not in self.begun), None)

    def instruction(self) -> str:
        part = self.next_part()
        assert part is not None
        return f"{step_name(self.episode.task, part)}."

    def opening(self) -> None:
        self.wait(1.0, 3.0)
        verb = self.episode.goal().replace("A", "a", 1).replace("D", "d", 1)
        self.say("user", f"I want to {verb}.", "initiative|goal")
        self.episode.hands_at = self.wait(1.2, 5.0)
        self.say("assistant", f"First, {self.instruction()}", "initiative|instruction")

    def pause(self) -> None:
        """Between two steps: a wait, and sometimes a hesitation, a question or a word that needs no answer."""
        self.wait(1.2, 3.0)
        if self.next_part() is None:
            return
        if self.chance(0.2):
            start = self.now
            self.say("assistant", f"Try this: {self.instruction()}", "initiative|hint")
            self.wait(1.6, 3.0)
            self.episode.raised.append((start, self.now))
            self.wait(1.2, 2.5)
        elif self.talkative and self.chance(0.12):
            self.say("user", "What comes next?", "initiative|question")
            self.say("assistant", f"Now {self.instruction()}", "response|answer")
            self.wait(1.2, 2.5)
        elif self.talkative and self.chance(0.2):
            self.say("user", "Okay.", "other|generic")
            self.wait(1.2, 2.5)

    def begin(self, part: int) -> int:
        if part != self.next_part():
            self.say("assistant", f"Fine, the {part_name(part)} can go first.", "response|acknowledgement")
        self.begun.add(part)
        return self.now

    def finish(self, part: int, start: int, hand: int, other_hand_busy: bool) -> None:
        self.episode.steps.append(Span(start, self.now, part, hand))
        if other_hand_busy:
            return
        done = VERBS[self.episode.task] + "ed"
        self.say("assistant", f"Good, the {part_name(part)} is {done}.", "initiative|feedback")

    def closing(self) -> None:
        """When the hands leave the picture."""
        self.episode.hands_gone = self.wait(1.2, 3.0)
        self.say("assistant", f"Well done, the {TOYS[self.episode.toy]} is finished.", "initiative|closing")
        self.episode.end = self.wait(1.0, 2.0)

    def one_step(self, part: int) -> None:
        hand = int(self.rng.integers(2))
        start = self.begin(part)
        self.wait(1.2, 3.5)
        if self.chance(0.25):
            self.mistake(part, hand)
        if self.talkative and self.chance(0.3):
            self.question(part, hand)
        self.wait(1.2, 4.0)
        self.finish(part, start, hand, other_hand_busy=False)

    def mistake(self, part: int, hand: int) -> None:
        start = self.now
        self.say("assistant", f"Wait, the {part_name(part)} is upside down.", "initiative|correction")
        self.wait(1.6, 3.0)
        self.episode.upside_down.append(Span(start, self.now, part, hand))
        self.wait(1.2, 2.5)

    def question(self, part: int, hand: int) -> None:
        self.say("user", "Is this the right one?", "initiative|question")
        start = self.wait(1.2, 3.5)
        self.say("assistant", f"Yes, that is the {part_name(part)}.", "response|answer")
        self.wait(1.6, 2.5)
        self.episode.shown.append(Span(start, self.now, part, hand))
        self.wait(1.2, 2.0)

    def two_steps(self, first: int, second: int) -> None:
        """The second begins in the other hand before the first is done."""
        hand = int(self.rng.integers(2))
        first_start = self.begin(first)
        self.wait(1.5, 3.5)
        second_start = self.begin(second)
        self.wait(1.5, 4.0)
        self.finish(first, first_start, hand, other_hand_busy=True)
        self.wait(1.5, 4.0)
        self.finish(second, second_start, 1 - hand, other_hand_busy=False)


def make_episode(
    rng: np.random.Generator, task: Task, toy: int, plan: tuple[int, ...], start: int, talkative: bool
) -> Episode:
    """Play one assembly or disassembly from annotation frame ``start`` on.

    In half of the episodes two neighbours of the plan change places, in two of five two steps overlap: rarer, and a
    model learns to trust the plan's order more than its eyes.
    """
    episode = Episode(task, toy, plan)
    author = _Author(rng, episode, start, talkative)
    order = list(plan)
    if author.chance(0.5):
        place = int(rng.integers(len(order) - 1))
        order[place], order[place + 1] = order[place + 1], order[place]
    overlap = int(rng.integers(len(order) - 1)) if author.chance(0.4) else None
    author.opening()
    place = 0
    while place < len(order):
        author.pause()
        if place == overlap:
            author.two_steps(order[place], order[place + 1])
            place += 2
        else:
            author.one_step(order[place])
            place += 1
    author.closing()
    return episode


@dataclass(frozen=True)
class Recording:
    """One video: an assembly and, in some, a disassembly after it."""

    sequence: str
    split: Literal["train", "val", "test"]
    seed: tuple[int, int]
    fps: tuple[int, int]  # as a fraction
    episodes: tuple[Episode, ...]
    user_types: tuple[str, ...]

    @property
    def end(self) -> int:
        return self.episodes[-1].end

    @property
    def duration(self) -> Fraction:
        """Seconds of its video, which ends a second after the last event."""
        return Fraction(self.end, ANNOTATION_FPS) + 1


_RATES = ((30000, 1001), (30, 1), (60000, 1001))


def make_recordings(sessions: int, seed: int, most_episodes: int = 2) -> list[Recording]:
    """Lay out a corpus of exactly that many sessions; the same arguments give the same corpus.

    Two recordings of three hold an assembly and a disassembly, unless ``most_episodes`` is 1. About 17 % of the
    sessions are test, 10 % val. No plan (toy and order of parts) occurs twice, so the orders of val and test are
    never seen in training.
    """
    recordings: list[Recording] = []
    plans: set[tuple[Task, tuple[int, ...]]] = set()
    made = 0
    while made < sessions:
        number = len(recordings)
        rng = np.random.default_rng([seed, number])
        tasks: tuple[Task, ...] = ("assembly",)
        if number % 3 != 1 and made + 2 <= sessions and most_episodes == 2:
            tasks = ("assembly", "disassembly")
        toy, start = int(rng.integers(len(TOYS))), int(rng.integers(15, 120))
        parts = tuple(int(p) for p in rng.permutation(len(PARTS))[: int(rng.integers(4, 8))])
        episodes: list[Episode] = []
        user_types: list[str] = []
        for task in tasks:
            plan = tuple(int(p) for p in rng.permutation(parts))
            while (task, plan) in plans:
                plan = tuple(int(p) for p in rng.permutation(parts))
            plans.add((task, plan))
            talkative = bool(rng.random() < 0.5)
            episodes.append(make_episode(rng, task, toy, plan, start, talkative))
            user_types.append("talk_some" if talkative else "no_talk")
            start = episodes[-1].end + int(rng.integers(30, 90))
        recordings.append(
            Recording(
                sequence=f"nusar-2021_action_both_{9001 + number}-{chr(97 + toy)}{toy + 1:02d}_user_id",
                split=_split(number),
                seed=(seed, number),
                fps=_RATES[(0, 1, 0, 1, 0, 1, 2)[number % 7]],
                episodes=tuple(episodes),
                user_types=tuple(user_types),
            )
        )
        made += len(tasks)
    return recordings


def _split(number: int) -> Literal["train", "val", "test"]:
    """Fixed places in every run of 18 recordings: 3 of them test, 2 val."""
    if number % 18 in (1, 8, 14):
        return "test"
    return "val" if number % 18 in (4, 11) else "train"
