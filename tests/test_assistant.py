"""The assistant live: what is decided on pictures as they come is what training sees in whole windows."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode import tick_frames
from pipeline.shards import ShardCache
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.states import STATE_NAMES
from schemas.task import Task
from training import speech
from training.assistant import Assistant, Event, encoder_of
from training.batch import collate
from training.data import SessionData, load_sessions, make_example
from training.dialog import build
from training.gate import Decisions, Thresholds
from training.live import LiveWindows
from training.model import DSTSmolVLM
from training.recipe import load_recipe
from training.rollout import decide, run_free
from training.sequence import SequenceBuilder, Words

Built = tuple[DSTSmolVLM, SequenceBuilder]
CHANGES = {
    "branch": ("data.window_ticks=16",),
    "inline": (
        "data.window_ticks=16",
        "data.speech=inline",
        "data.speak_by=end_of_turn",
        "tasks.speaking.weight=0",
    ),
    "identity": ("data.window_ticks=8", "model.visual_adapter=identity", "data.memory_turns=0"),
}


@pytest.fixture(scope="module")
def cache(shards: Path) -> ShardCache:
    return ShardCache(shards)


@pytest.fixture(scope="module", params=CHANGES)
def built(request: pytest.FixtureRequest, cache: ShardCache, tiny_model: Path) -> Built:
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}", *CHANGES[request.param]]), cache)
    return model.eval(), builder


@pytest.fixture(scope="module")
def session(cache: ShardCache) -> SessionData:
    """One in which the user speaks."""
    return next(s for s in load_sessions(cache, "train") if sum(w.role == "user" for w in s.words) > 1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Decisions]:
    """What live windows decide, tick by tick."""
    found: list[Decisions] = []
    observe = LiveWindows.observe

    def noting(self: LiveWindows, ticks: list) -> list:
        decisions = observe(self, ticks)
        found.extend(decisions)
        return decisions

    monkeypatch.setattr(LiveWindows, "observe", noting)
    return found


def thresholds_that_fire(built: Built, session: SessionData) -> Thresholds:
    """In the middle of what an untrained model says, so that a good share of ticks is on each side."""
    model, builder = built
    trace = run_free(model, builder, [session], Thresholds(2.0, 2.0))[0]
    assert trace.speak_score is not None
    assert trace.update_score is not None
    return Thresholds(float(np.quantile(trace.speak_score, 0.8)), float(np.median(trace.update_score)), 2)


@pytest.fixture
def words_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an untrained model says is not split into the same tokens again: its words are the tokens' numbers here."""
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 6)
    monkeypatch.setattr(SequenceBuilder, "text_of", lambda self, tokens: " ".join(map(str, tokens)))
    monkeypatch.setattr(SequenceBuilder, "answer", lambda self, text: [int(token) for token in text.split()])


def live(built: Built, session: SessionData, thresholds: Thresholds) -> tuple[Assistant, list[Event]]:
    model, builder = built
    task = Task(session.goal, session.step_names)
    assistant = Assistant(model, builder, task, None, thresholds, session.first_tick)
    for words in session.words:
        if words.role == "user":
            assistant.hear(words.text, words.tick / 2.0)
    events = []
    for features in session.features(session.first_tick, session.num_ticks):
        events += assistant.see(features)
    return assistant, events


def test_live_on_cached_features_is_the_free_running_of_scores(built: Built, session: SessionData) -> None:
    thresholds = thresholds_that_fire(built, session)
    trace = run_free(*built, [session], thresholds)[0]
    _, events = live(built, session, thresholds)
    said = {event.tick - session.first_tick: event.text for event in events if event.kind == "speak"}
    assert said == {tick: text for tick, text in enumerate(trace.predicted.responses) if text is not None}
    assert len(said) > 3
    assert (np.diff(sorted(said)) >= 2).all()
    state = np.zeros(len(session.step_names), dtype=int)
    changes = {(e.tick, e.step): STATE_NAMES.index(e.state or "") for e in events if e.kind == "state"}
    for tick in range(session.num_ticks):
        for (at, step), new in changes.items():
            if at == tick + session.first_tick:
                state[step or 0] = new
        assert state.tolist() == trace.predicted.state[tick].tolist()
    assert changes
    refused = [(e.tick - session.first_tick, e.step, e.state) for e in events if e.kind == "rejected"]
    assert refused == [(tick, step, STATE_NAMES[state]) for tick, step, state in trace.rejections]
    heard = [(e.tick - session.first_tick, e.text) for e in events if e.kind == "user"]
    assert heard == list(trace.heard)
    assert len(heard) > 1


def test_live_logits_are_those_of_the_training_forward(
    built: Built, session: SessionData, seen: list[Decisions], words_as_tokens: None
) -> None:
    """Windows are written after the fact from what was said and from the state that held at each one's start."""
    model, builder = built
    thresholds = thresholds_that_fire(built, session)
    seen.clear()
    _, events = live(built, session, thresholds)
    spoken = [Words(e.tick, "assistant", e.text or "") for e in events if e.kind == "speak"]
    words = [*(w for w in session.words if w.role == "user"), *spoken]
    words.sort(key=lambda w: (w.tick, w.role == "assistant"))
    size, state = model.config.window_ticks, np.zeros(len(session.step_names), dtype=np.int8)
    live_decisions = iter(seen)
    windows = 0
    for first in range(session.first_tick, session.first_tick + session.num_ticks, size):
        length = min(size, session.first_tick + session.num_ticks - first)
        example = make_example(session, builder, first, length, state, words)
        batch = collate([example], None, builder.pad_token)
        with torch.inference_mode():
            (expected,) = decide(model, batch, model.hidden(batch))
        for tick in range(length):
            found = next(live_decisions)
            for name in ("speaking_logits", "dst_update_logits", "state_logits"):
                np.testing.assert_allclose(getattr(found, name)[0], getattr(expected, name)[tick], atol=1e-4)
        for event in events:
            if event.kind == "state" and first <= event.tick < first + length:
                state[event.step or 0] = STATE_NAMES.index(event.state or "")
        windows += 1
    assert windows > 3
    assert next(live_decisions, None) is None


def test_pixels_give_what_the_cache_gives(
    built: Built, session: SessionData, tiny_model: Path, cache: ShardCache, seen: list[Decisions]
) -> None:
    model, builder = built
    task = Task(session.goal, session.step_names)
    uri = session.labels.meta["uri"]
    assistant = Assistant(model, builder, task, encoder_of(tiny_model, model, "cpu"), Thresholds(2.0, 2.0))
    for frame in tick_frames(uri, Clock(2.0), last_tick=30):
        assistant.step(frame.image, frame.tick / 2.0)
    from_pixels = list(seen)
    seen.clear()
    assistant = Assistant(model, builder, task, None, Thresholds(2.0, 2.0))
    for features in session.cache.features(session.labels.meta["video_id"], 0, 31):
        assistant.see(features)
    assert len(from_pixels) == len(seen) == 31
    for one, other in zip(from_pixels, seen, strict=True):
        np.testing.assert_array_equal(one.state_logits, other.state_logits)
        np.testing.assert_array_equal(one.speaking_logits, other.speaking_logits)


class Pictures(Assistant):
    """Notes which picture is seen at which tick."""

    def __init__(self, built: Built, task: Task, encoder: VisionEncoder) -> None:
        super().__init__(*built, task, encoder, Thresholds(2.0, 2.0))
        self.shown: list[tuple[int, int]] = []

    def _look(self) -> list[Event]:
        assert self._held is not None
        self.shown.append((self.next_tick, int(self._held[0][0, 0, 0])))
        self.next_tick += 1
        return []


@pytest.fixture(scope="module")
def one(cache: ShardCache, tiny_model: Path) -> Built:
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}", "data.window_ticks=8"]), cache)
    return model.eval(), builder


@pytest.fixture(scope="module")
def encoder(one: Built, tiny_model: Path) -> VisionEncoder:
    return encoder_of(tiny_model, one[0], "cpu")


TASK = Task("build it", ("attach the wheel", "attach the roof"))


@given(st.lists(st.sampled_from([0, 1, 33, 40, 250, 499, 500, 501, 502, 1700]), min_size=1, max_size=12))
def test_a_tick_shows_the_last_picture_that_came_until_then(
    one: Built, encoder: VisionEncoder, steps_ms: list[int]
) -> None:
    assistant = Pictures(one, TASK, encoder)
    times = np.cumsum(steps_ms)
    missed = []
    for number, at in enumerate(times.tolist()):
        for event in assistant.step(np.full((2, 2, 3), number, np.uint8), at / 1000):
            assert event.kind == "gap"
            assert event.end_tick is not None
            missed += range(event.tick, event.end_tick)
    ticks = [tick for tick, _ in assistant.shown]
    first = -(-int(times[0] - 1) // 500) if times[0] > 1 else 0
    assert missed == list(range(first))
    assert ticks == list(range(first, first + len(ticks)))
    # a tick is over with the first picture that comes later, or one that comes just then
    assert len(ticks) in {int(times[-1] - 2) // 500 + 1 - first, int(times[-1]) // 500 + 1 - first}
    for tick, number in assistant.shown:
        in_time = [n for n, at in enumerate(times) if at <= tick * 500 + 1]
        assert times[number] == times[in_time[-1]] or times[number] == tick * 500


def test_after_a_gap_a_new_window_begins_from_the_own_state(one: Built, session: SessionData) -> None:
    model, builder = one
    assistant = Assistant(model, builder, TASK, None, Thresholds(2.0, 2.0))
    features = session.features(session.first_tick, 20)
    for each in features[:3]:
        assert assistant.see(each) == []
    assistant.gate.validator.state = np.array([2, 1], dtype=np.int8)
    assistant.hear("are you there?", 2.2)
    assistant.hear("hello", 4.0)
    gap = assistant.miss(7, "no picture for 2 s")
    assert [event.row() for event in gap] == [
        {"kind": "gap", "tick": 3, "t_s": 1.5, "text": "no picture for 2 s", "end_tick": 7},
        {"kind": "user", "tick": 5, "t_s": 2.5, "text": "are you there?"},
    ]
    written: list[list[int]] = []
    original = SequenceBuilder.window

    def noting(self: SequenceBuilder, *args: object) -> object:
        window = original(self, *args)  # type: ignore[arg-type]
        written.append(window.tokens.tolist())
        return window

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBuilder, "window", noting)
        assert [(e.kind, e.tick) for e in assistant.see(features[7])] == [("window", 7)]
    told = builder.tokenizer.decode(next(tokens for tokens in written if len(tokens) > 30))
    assert "1. done: attach the wheel" in told
    assert "2. doing: attach the roof" in told
    assert "are you there?" in told
    assert "hello" not in told
    assert [(e.kind, e.tick, e.text) for e in assistant.see(features[8])] == [("user", 8, "hello")]
    assert [e.tick for each in features[9:] for e in assistant.see(each)] == [15]  # eight ticks a window


def test_a_full_context_begins_a_window_early(one: Built, session: SessionData) -> None:
    model, builder = one
    assistant = Assistant(model, builder, TASK, None, Thresholds(2.0, 2.0))
    features = session.features(session.first_tick, 7)
    assert assistant.see(features[0]) == []
    quarter = model.config.text_config.max_position_embeddings // 4
    words = "what " * (quarter // len(builder.tokenizer.encode(" what")))
    most = words[: len(words) // 10 * 9]
    for each, kinds in zip(features[1:6], [["user"]] * 4 + [["window", "user"]], strict=True):
        assistant.hear(most)
        assert [e.kind for e in assistant.see(each)] == kinds
    with pytest.raises(UserError, match="too long"):
        assistant.hear(3 * words)
    # two turns to remember and three to hear are too many: the oldest is forgotten
    assert builder.memory_turns == 2
    for _ in range(3):
        assistant.hear(most)
    assert [e.kind for e in assistant.see(features[6])] == ["window", "user", "user", "user"]
    assert assistant._live is not None
    assert 4 * 0.9 * quarter < int(assistant._live.position.max()) < 4 * quarter


def test_a_plan_that_leaves_no_room_is_refused(one: Built) -> None:
    model, builder = one
    long = tuple(f"{'attach the wheel ' * 200}{number}" for number in range(20))
    with pytest.raises(UserError, match="too few for what is seen; give fewer or shorter steps"):
        Assistant(model, builder, Task("build it", long), None, Thresholds(2.0, 2.0))


def test_a_window_that_is_over_lets_go_of_its_memory(one: Built, session: SessionData) -> None:
    model, builder = one
    alive: list[weakref.ref[LiveWindows]] = []
    assistant = Assistant(model, builder, TASK, None, Thresholds(2.0, 2.0))
    gc.disable()
    try:
        for each in np.resize(session.features(session.first_tick, 16), (40, 4, 128)):
            assistant.see(each)
            if not alive or alive[-1]() is not assistant._live:
                assert assistant._live is not None
                alive.append(weakref.ref(assistant._live))
        assert len(alive) == 5
        assert sum(window() is not None for window in alive) == 1
    finally:
        gc.enable()


def test_nothing_grows_with_the_stream(one: Built, session: SessionData) -> None:
    model, builder = one
    assistant = Assistant(model, builder, TASK, None, Thresholds(0.0, 2.0))
    sizes = []
    for tick, each in enumerate(np.resize(session.features(session.first_tick, 16), (48, 4, 128))):
        if tick % 5 == 0:
            assistant.hear("and now?")
        assistant.see(each)
        assert assistant._live is not None
        sizes.append((assistant._live.cache.get_seq_length(), len(assistant._words)))
    assert max(words for _, words in sizes) <= builder.memory_turns + 8 + 2
    assert max(size for size, _ in sizes[-8:]) <= 1.3 * max(size for size, _ in sizes[8:16])


def test_a_run_whose_tower_is_another_is_refused(one: Built, tiny_model: Path, tmp_path: Path) -> None:
    model, _ = one
    kept = model.config.vision
    try:
        model.config.vision = {**kept, "sha256": "0" * 64}
        with pytest.raises(UserError, match="another vision tower"):
            encoder_of(tmp_path, model, "cpu")
        model.config.vision = None
        with pytest.raises(UserError, match="does not say which vision tower"):
            encoder_of(tmp_path, model, "cpu")
    finally:
        model.config.vision = kept
