"""Speech in the line of what is seen: windows written tick by tick are those that training reads at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from pipeline.shards import ShardCache
from training import rollout, speech, validation
from training.batch import collate
from training.data import SessionData, load_sessions, make_example, true_trace
from training.dialog import build
from training.gate import Decisions, Thresholds, teacher_trace
from training.live import LiveWindows, Observation
from training.metrics import score
from training.model import DSTSmolVLM
from training.recipe import load_recipe
from training.rollout import decide, decide_teacher, run_free
from training.sequence import SequenceBuilder, Words
from training.traces import Trace

Built = tuple[DSTSmolVLM, SequenceBuilder]


@pytest.fixture(scope="module")
def cache(shards: Path) -> ShardCache:
    return ShardCache(shards)


def built(cache: ShardCache, tiny_model: Path, *changes: str) -> Built:
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}", *changes]), cache)
    return model.eval(), builder


@pytest.fixture(scope="module")
def inline(cache: ShardCache, tiny_model: Path) -> Built:
    return built(
        cache,
        tiny_model,
        *("data.speech=inline", "data.speak_by=end_of_turn", "tasks.speaking.weight=0"),
        "model.visual_tokens=2",
    )


@pytest.fixture(scope="module")
def sessions(cache: ShardCache) -> list[SessionData]:
    """Two in which the user speaks; plans and lengths differ."""
    talking = [s for s in load_sessions(cache, "train") if sum(w.role == "user" for w in s.words) > 1]
    first = talking[0]
    other = next(s for s in talking if len(s.step_names) != len(first.step_names))
    return [first, other]


@pytest.fixture
def token_words(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Utterances stay short lists of tokens, so that nothing hangs on how a text is split into tokens again."""
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 6)
    monkeypatch.setattr(SequenceBuilder, "text_of", lambda self, tokens: " ".join(map(str, tokens)))
    return monkeypatch


def read_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceBuilder, "answer", lambda self, text: [int(token) for token in text.split()])


def live(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: list[SessionData],
    lengths: list[int],
    speaking: list[list[int]],
) -> tuple[list[list[Decisions]], list[dict[int, str]]]:
    """Windows at the sessions' starts of so many ticks, in which each speaks at the given ones."""
    starts = [
        builder.window(s.goal, s.step_names, s.state_before(s.first_tick), s.first_tick, 0, ())
        for s in sessions
    ]
    windows = LiveWindows(model, builder, starts)
    found: list[list[Decisions]] = [[] for _ in sessions]
    said: list[dict[int, str]] = [{} for _ in sessions]
    for tick in range(max(lengths)):
        observed = [
            Observation(
                s.features(s.first_tick + tick, 1)[0],
                tuple(w.text for w in s.words if w.tick == s.first_tick + tick and w.role == "user"),
            )
            if tick < length
            else None
            for s, length in zip(sessions, lengths, strict=True)
        ]
        for row, decisions in enumerate(windows.observe(observed)):
            assert (decisions is None) == (observed[row] is None)
            if decisions is not None:
                found[row].append(decisions)
        for row, text in windows.speak([r for r, ticks in enumerate(speaking) if tick in ticks]).items():
            said[row][tick] = text
    return found, said


def at_once(
    model: DSTSmolVLM, builder: SequenceBuilder, session: SessionData, length: int, said: dict[int, str]
) -> tuple[Decisions, list[int], list[int], NDArray[np.bool_]]:
    """One pass over the whole window: what is decided, what each target should be and is, which are words."""
    first = session.first_tick
    words = [w for w in session.words if w.role == "user"]
    words += [Words(first + tick, "assistant", text) for tick, text in said.items()]
    example = make_example(session, builder, first, length, session.state_before(first), words)
    batch = collate([example], None, builder.pad_token)
    with torch.inference_mode():
        hidden = model.hidden(batch)
        decided = decide(model, batch, hidden)[0]
        best = model.project(hidden[batch.response_at]).argmax(-1)
    words_only = ~np.isin(batch.response_at.numpy(), batch.tick_at.numpy())
    return decided, batch.response.tolist(), best.tolist(), words_only


@pytest.mark.parametrize("mode", ["inline", "branch"])
def test_ticks_and_words_one_by_one_are_one_pass_over_the_window(
    mode: str,
    cache: ShardCache,
    tiny_model: Path,
    inline: Built,
    sessions: list[SessionData],
    token_words: pytest.MonkeyPatch,
) -> None:
    """Two windows of other lengths side by side, which speak at other ticks."""
    model, builder = inline if mode == "inline" else built(cache, tiny_model)
    lengths, speaking = [40, 23], [[2, 3, 17, 39], [3, 20]]
    found, said = live(model, builder, sessions, lengths, speaking)
    assert [sorted(each) for each in said] == speaking
    read_as_tokens(token_words)
    for row, session in enumerate(sessions):
        decided, targets, best, is_word = at_once(model, builder, session, lengths[row], said[row])
        for name in ("speaking", "dst_update", "state"):
            ticks = np.concatenate([getattr(each, name) for each in found[row]])
            np.testing.assert_allclose(ticks, getattr(decided, name), rtol=1e-4, atol=2e-6)
        spoken = [int(token) for tick in speaking[row] for token in said[row][tick].split()]
        assert len(spoken) > 2 * len(speaking[row])
        assert [t for t, word in zip(targets, is_word, strict=True) if word] == spoken
        # where the limit cut an utterance, its end stands whatever the model would say
        wanted = [b for b, word in zip(best, is_word, strict=True) if word]
        free = [at for at, token in enumerate(spoken) if token != builder.end_of_utterance]
        assert [wanted[at] for at in free] == [spoken[at] for at in free]


def test_what_was_said_is_seen_later_inline_only(
    cache: ShardCache, tiny_model: Path, inline: Built, sessions: list[SessionData], token_words: object
) -> None:
    for (model, builder), sees in ((inline, True), (built(cache, tiny_model), False)):
        silent, _ = live(model, builder, sessions[:1], [9], [[]])
        talking, _ = live(model, builder, sessions[:1], [9], [[4]])
        for tick in range(9):
            a, b = (
                np.concatenate([e[0][tick].dst_update, e[0][tick].state.ravel()]) for e in (silent, talking)
            )
            assert np.allclose(a, b, atol=1e-6) != (sees and tick > 4)


def quantile(traces: list[Trace], share: float) -> float:
    return float(
        np.quantile(np.concatenate([t.speak_score for t in traces if t.speak_score is not None]), share)
    )


def test_a_free_run_is_a_chain_of_windows_with_its_own_words_and_states(
    inline: Built, sessions: list[SessionData], token_words: pytest.MonkeyPatch
) -> None:
    """Each window, written again whole from the trace alone, gives the trace's scores."""
    model, builder = inline
    token_words.setattr(model.config, "window_ticks", 24)
    often = Thresholds(quantile(run_free(model, builder, sessions, Thresholds(2, 2)), 0.75), 0.5)
    traces = run_free(model, builder, sessions, often)
    assert sum(int(trace.predicted.speak.sum()) for trace in traces) > 8
    read_as_tokens(token_words)
    for trace, session in zip(traces, sessions, strict=True):
        first = session.first_tick
        user = [w for w in session.words if w.role == "user"]
        own = [
            Words(first + tick, "assistant", text)
            for tick, text in enumerate(trace.predicted.responses)
            if text is not None
        ]
        assert trace.speak_score is not None
        assert [w.tick - first for w in own] == np.flatnonzero(trace.speak_score >= often.speaking).tolist()
        words = sorted(user + own, key=lambda w: (w.tick, w.role == "assistant"))
        assert trace.predicted.state.any()
        for at in range(0, session.num_ticks, 24):
            state = trace.predicted.state[at - 1] if at else np.zeros(len(session.step_names), dtype=np.int8)
            length = min(24, session.num_ticks - at)
            example = make_example(session, builder, first + at, length, state, words)
            batch = collate([example], None, builder.pad_token)
            with torch.inference_mode():
                decided = decide(model, batch, model.hidden(batch))[0]
            np.testing.assert_allclose(trace.speak_score[at : at + length], decided.speaking, atol=2e-6)


def test_branch_windows_tick_by_tick_are_the_free_run(
    cache: ShardCache, tiny_model: Path, sessions: list[SessionData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same decisions, states and words as the run that decides a window's ticks in one pass."""
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 6)
    model, builder = built(cache, tiny_model)
    often = Thresholds(quantile(run_free(model, builder, sessions, Thresholds(2, 2)), 0.95), 0.5)
    at_once = run_free(model, builder, sessions, often)
    monkeypatch.setattr(rollout, "_branch_window", rollout._inline_window)
    one_by_one = run_free(model, builder, sessions, often)
    assert sum(int(trace.predicted.speak.sum()) for trace in at_once) > 4
    for a, b in zip(at_once, one_by_one, strict=True):
        assert a.predicted.responses == b.predicted.responses
        assert np.array_equal(a.predicted.state, b.predicted.state)
        assert np.array_equal(a.predicted.dst_update, b.predicted.dst_update)
        np.testing.assert_allclose(a.speak_score, b.speak_score, atol=2e-6)


def test_company_changes_nothing(
    inline: Built, sessions: list[SessionData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 6)
    model, builder = inline
    often = Thresholds(quantile(run_free(model, builder, sessions, Thresholds(2, 2)), 0.95), 0.5)
    together = run_free(model, builder, sessions, often)
    alone = [run_free(model, builder, [session], often)[0] for session in sessions]
    for a, b in zip(together, alone, strict=True):
        assert a.session_id == b.session_id
        assert a.predicted.responses == b.predicted.responses
        assert np.array_equal(a.predicted.state, b.predicted.state)
    assert run_free(model, builder, [], often) == []


def test_silence_is_the_end_of_the_turn_as_the_next_token(inline: Built, sessions: list[SessionData]) -> None:
    """The chance to speak is that of every token but the end of the utterance, read off the plain softmax."""
    model, builder = inline
    session = sessions[0]
    first = session.first_tick
    example = make_example(session, builder, first, 12, session.state_before(first), ())
    batch = collate([example], None, builder.pad_token)
    with torch.inference_mode():
        hidden = model.hidden(batch)
        chances = model.lm_head(hidden[batch.tick_at]).double().softmax(-1)
        found = decide(model, batch, hidden)[0].speaking
    np.testing.assert_allclose(found, 1 - chances[:, builder.end_of_utterance], rtol=1e-4)


def test_validation_keeps_the_thresholds_of_the_better_free_run(
    inline: Built, sessions: list[SessionData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores it tells are those of a run with the thresholds it leaves in the model; no run it made was better."""
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 3)
    model, builder = inline
    tried: list[Thresholds] = []

    def counted(*args: Any) -> list[Trace]:
        tried.append(args[3])
        return run_free(*args)

    monkeypatch.setattr(validation, "run_free", counted)
    row = validation.validate(model, builder, sessions, Accelerator(cpu=True))
    kept = Thresholds.of(model.config)
    assert len(tried) == 2
    assert kept in tried
    scores = {each: score(run_free(model, builder, sessions, each)) for each in tried}
    assert row["val/combined"] == max(each["combined"]["value"] for each in scores.values())
    assert row["val/combined"] == scores[kept]["combined"]["value"]
    assert row["val/matched_f1"] == scores[kept]["matched"]["f1"]


def test_validation_without_words_scores_none(
    cache: ShardCache, tiny_model: Path, sessions: list[SessionData]
) -> None:
    model, builder = built(cache, tiny_model)
    row = validation.validate(model, builder, sessions, Accelerator(cpu=True))
    kept = Thresholds.of(model.config)
    decisions, _, _ = decide_teacher(model, builder, sessions)
    traces = [
        teacher_trace(true_trace(session), windows, builder.max_plan_steps, kept)
        for session, windows in zip(sessions, decisions, strict=True)
    ]
    found = score(traces, similarity=None)
    assert row["val/combined"] == found["combined"]["value"]
    assert "val/matched_f1" not in row
