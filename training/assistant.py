"""The assistant live: pictures and the user's words go in as they come, events come out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pipeline.decode import GRACE
from pipeline.quantize import as_cached
from pipeline.vision import VisionEncoder, choose_compute
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.states import NOT_STARTED, STATE_NAMES
from schemas.task import Task
from training.checkpoint import EXPORTED, checkpoint_to_use, tower_of
from training.gate import Gate, Thresholds
from training.live import LiveWindows, Observation
from training.model import DSTSmolVLM, load_trained
from training.sequence import SequenceBuilder, Words

GRACE_S = float(GRACE)
"""A frame may come so many seconds after its tick and still be its frame."""


@dataclass(frozen=True)
class Event:
    """Something that happened at a tick; what does not apply is None.

    Attributes:
        kind: ``speak``: the assistant says ``text``. ``state``: ``step`` is now in ``state``. ``rejected``: that change
            was predicted and is not legal. ``user``: the user says ``text``. ``gap``: no picture from ``tick`` to
            before ``end_tick``, for the reason in ``text``. ``window``: the context starts anew from the own state.
        t_s: second of the tick.
        step: which step of the plan, from 0.
        probability: of the decision to speak, or of the step's state.
    """

    kind: Literal["speak", "state", "rejected", "user", "gap", "window"]
    tick: int
    t_s: float
    text: str | None = None
    step: int | None = None
    state: str | None = None
    probability: float | None = None
    end_tick: int | None = None

    def row(self) -> dict[str, Any]:
        """As a line of JSON holds it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Assistant:
    """One user, one task, one stream of pictures.

        assistant = Assistant.load(Path("out/runs/tiny"), Task("Build the truck", ("attach the wheels", ...)))
        for seconds, frame in camera:
            for event in assistant.step(frame, seconds):
                print(event.row())

    Windows begin every ``window_ticks`` of its configuration, as in training, and after a gap: each from the state that
    was predicted and the last few turns. So memory and time a tick do not grow with the length of the stream.

    Args:
        encoder: makes features of pictures; None where only features are given, to `see`.
        thresholds: None takes those that were chosen in training.
        first_tick: where the session begins.

    Raises:
        UserError: the plan leaves no room in the model's context.
    """

    def __init__(
        self,
        model: DSTSmolVLM,
        builder: SequenceBuilder,
        task: Task,
        encoder: VisionEncoder | None = None,
        thresholds: Thresholds | None = None,
        first_tick: int = 0,
    ) -> None:
        self.model, self.builder, self.task, self.encoder = model.eval(), builder, task, encoder
        self.clock = Clock(model.config.tick_hz)
        self.gate = Gate(
            np.full(len(task.steps), NOT_STARTED, dtype=np.int8), thresholds or Thresholds.of(model.config)
        )
        self.next_tick = first_tick
        self._words: list[Words] = []  # of this window, and as many before as its memory holds
        self._live: LiveWindows | None = None
        self._held: tuple[NDArray[np.uint8], NDArray[np.float16] | None] | None = None
        self._begin_window(first_tick, ())

    @classmethod
    def load(
        cls,
        source: Path,
        task: Task,
        *,
        checkpoint: str | None = None,
        device: str = "cpu",
        start_s: float = 0.0,
    ) -> Assistant:
        """From a run of `dst train`, whose ``best`` checkpoint is the default, or a folder that `dst export` wrote.

        Args:
            start_s: second of the stream at which the task begins; pictures before are not looked at.

        Raises:
            UserError: neither of both, no such checkpoint, or its vision tower is not to be had.
        """
        folder = checkpoint_to_use(source, checkpoint, "best")
        model = load_trained(folder).to(device)
        builder = SequenceBuilder.of(folder, model.config)
        encoder = encoder_of(folder, model, device, model.config.tiles)
        first_tick = Clock(model.config.tick_hz).tick_of(start_s)
        return cls(model, builder, task, encoder, first_tick=first_tick)

    def hear(self, text: str, t: float | None = None) -> None:
        """The user says something, at ``t`` seconds or now: it counts from the next tick on that is not yet seen.

        Raises:
            UserError: it takes more than a quarter of the model's context.
        """
        most = self.model.config.text_config.max_position_embeddings // 4
        if len(self.builder.tokenizer.encode(text)) > most:
            raise UserError(f"the user's words are too long: at most {most} tokens find room")
        tick = self.next_tick if t is None else max(self.next_tick, self.clock.tick_of(t))
        self._words.append(Words(tick, "user", text))

    def step(self, frame: NDArray[np.uint8], t: float) -> list[Event]:
        """A picture comes in. A tick shows the last one that came until then, so its events may need the next picture.

        Args:
            frame: RGB uint8 ``[H, W, 3]``, upright; kept until the next one comes.
            t: seconds since the stream began, never less than before.
        """
        assert self.encoder is not None, "an assistant without an encoder sees features only"
        events: list[Event] = []
        if self._held is None and (first := self.clock.tick_of(t - GRACE_S)) > self.next_tick:
            events += self.miss(first, "no picture yet")
        while self._held is not None and self.clock.time_of(self.next_tick) + GRACE_S < t:
            events += self._look()
        self._held = (frame, None)
        if self.clock.time_of(self.next_tick) <= t + 1e-9:  # no later one comes in time for this tick
            events += self._look()
        return events

    def _look(self) -> list[Event]:
        """See the picture that is held at the next tick."""
        assert self.encoder is not None
        assert self._held is not None
        frame, features = self._held
        if features is None:
            picture = self.encoder.preprocessor.resize(frame)[None]
            what = f"the picture of tick {self.next_tick}"
            features = as_cached(self.encoder.encode(picture), self.model.config.vision["dtype"], what)[0]
            self._held = (frame, features)
        return self.see(features)

    def miss(self, end_tick: int, reason: str) -> list[Event]:
        """Nothing could be seen from the next tick to before ``end_tick``: what follows is a window of its own."""
        if end_tick < self.next_tick:  # before the task begins
            return []
        first, self._held = self.next_tick, None
        heard = [self._event("user", w.tick, text=w.text) for w in self._words if first <= w.tick < end_tick]
        self.next_tick, self._live = end_tick, None
        return [self._event("gap", first, text=reason, end_tick=end_tick), *heard]

    def see(self, features: NDArray[np.floating]) -> list[Event]:
        """The next tick's features ``[cached_tokens, H]``, as a cache holds them; what happens at it."""
        tick, events = self.next_tick, []
        self.next_tick += 1
        said = tuple(w.text for w in self._words if w.tick == tick and w.role == "user")
        if self._live is None or tick == self._window_end or not self._live.has_room(said):
            self._begin_window(tick, said)
            events.append(self._event("window", tick))
        assert self._live is not None
        events += [self._event("user", tick, text=text) for text in said]
        decisions = self._live.observe([Observation(features, said)])[0]
        assert decisions is not None
        before = self.gate.state
        refused = self.gate.update(tick, decisions, 0, self._shown)
        at = {int(step): place for place, step in enumerate(self._shown)}
        for step in np.flatnonzero(before != self.gate.state).tolist():
            events.append(
                self._change("state", tick, step, int(self.gate.state[step]), decisions.state[0, at[step]])
            )
        for _, step, state in refused:
            events.append(self._change("rejected", tick, step, state, decisions.state[0, at[step]]))
        if self.gate.speaks(tick, float(decisions.speaking[0])):
            text = self._live.speak([0])[0]
            self._words.append(Words(tick, "assistant", text))
            events.append(self._event("speak", tick, text=text, probability=_rounded(decisions.speaking[0])))
        return events

    def _begin_window(self, tick: int, said: tuple[str, ...]) -> None:
        """Write what is known: the plan with its state, and as many of the last turns as the context has room for."""
        words = sorted(self._words, key=lambda w: (w.tick, w.role == "assistant"))
        earlier = sum(w.tick < tick for w in words)
        self._words = words[max(0, earlier - self.builder.memory_turns) :]
        while True:
            self._live = None  # its keys and values make room for those of the next
            start = self.builder.window(
                self.task.goal, self.task.steps, self.gate.state, tick, 0, self._words
            )
            self._live = LiveWindows(self.model, self.builder, [start])
            if self._live.has_room(said):
                break
            if not self._words or self._words[0].tick >= tick:
                raise UserError(
                    f"the plan takes {len(start.tokens)} of the {self._live.context} tokens that the model's context "
                    "has, which leaves too few for what is seen; give fewer or shorter steps"
                )
            self._words = self._words[1:]
        self._shown, self._window_end = start.shown, tick + self.model.config.window_ticks

    def _change(
        self, kind: Literal["state", "rejected"], tick: int, step: int, state: int, of: NDArray[np.float32]
    ) -> Event:
        return self._event(kind, tick, step=step, state=STATE_NAMES[state], probability=_rounded(of[state]))

    def _event(self, kind: Any, tick: int, **told: Any) -> Event:
        return Event(kind, tick, self.clock.time_of(tick), **told)


def _rounded(probability: np.floating) -> float:
    return round(float(probability), 4)


def encoder_of(folder: Path, model: PreTrainedModel, device: str, tiles: int = 1) -> VisionEncoder:
    """The vision tower a model of either family was trained with: in its export, else where the cache had it from.

    It computes in what it computed in for the cache, where the device does: on a CPU in float32, and on a GPU without
    bf16 in float16, which differ by rounding.

    Raises:
        UserError: it cannot be found, or is another.
    """
    vision = model.config.vision
    if not vision or "compute" not in vision:
        raise UserError(
            f"{folder} does not say which vision tower it was trained with; train it again to use it live"
        )
    source = folder if (folder / EXPORTED).is_file() else tower_of(vision)
    kept, own = vision["compute"], choose_compute(device)
    compute = "float32" if device == "cpu" else own if kept == "bfloat16" else kept
    encoder = VisionEncoder(
        *(source, device, model.config.cached_tokens),
        filter=vision["filter"],
        compute=compute,
        batch_size=1,
        tiles=tiles,
    )
    if encoder.sha256 != vision["sha256"]:
        raise UserError(
            f"{source} holds another vision tower than {folder} was trained with; put that one there"
        )
    return encoder
