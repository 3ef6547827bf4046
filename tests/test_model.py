"""The dialog model: what its heads can see, packing, words from the cache of keys, saving."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards import ShardCache
from training import speech
from training.batch import Batch, Example, collate
from training.data import SessionData, load_sessions, make_example, window_starts
from training.dialog import build
from training.gate import Thresholds
from training.model import DSTSmolVLM, load_trained
from training.recipe import load_recipe
from training.rollout import _fitting, decide_teacher, run_free
from training.sequence import SequenceBuilder, Words
from training.validation import validate

DECISIONS = ("speaking", "dst_update", "dst_state")


@pytest.fixture(scope="module")
def cache(shards: Path) -> ShardCache:
    return ShardCache(shards)


@pytest.fixture(scope="module")
def built(cache: ShardCache, tiny_model: Path) -> tuple[DSTSmolVLM, SequenceBuilder]:
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}"]), cache)
    return model.eval(), builder


@pytest.fixture(scope="module")
def session(cache: ShardCache) -> SessionData:
    """One in which the user speaks, so that a window holds words of both."""
    return next(s for s in load_sessions(cache, "train") if sum(w.role == "user" for w in s.words) > 1)


def example_of(
    session: SessionData, builder: SequenceBuilder, words: tuple[Words, ...], ticks: int = 48
) -> Example:
    first = session.first_tick
    return make_example(session, builder, first, ticks, session.state_before(first), words)


def decisions(model: DSTSmolVLM, batch: Batch) -> list[torch.Tensor]:
    with torch.inference_mode():
        out = model(batch)
    return [out[head] for head in DECISIONS]


def test_no_spoken_word_changes_any_decision(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData
) -> None:
    model, builder = built
    other = tuple(
        replace(w, text="Stop, this is wrong!") if w.role == "assistant" else w for w in session.words
    )
    silent = tuple(w for w in session.words if w.role == "user")
    assert other != session.words
    results = [
        decisions(model, collate([example_of(session, builder, words)], None, builder.pad_token))
        for words in (session.words, other, silent)
    ]
    for changed in results[1:]:
        for before, after in zip(results[0], changed, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tick", [0, 7, 30])
def test_nothing_after_a_tick_changes_its_decisions(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData, tick: int
) -> None:
    model, builder = built
    batch = collate([example_of(session, builder, session.words)], None, builder.pad_token)
    before = decisions(model, batch)
    at = int(batch.tick_at[tick])
    tokens = batch.tokens.clone()
    text = torch.arange(tokens.shape[1]) > at
    text[batch.visual_at] = False
    tokens[0, text] = (tokens[0, text] + 17) % 400
    features = batch.features.clone()
    features[tick + 1 :] += 1.0
    after = decisions(model, replace(batch, tokens=tokens, features=features))
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a[: tick + 1], b[: tick + 1], rtol=0, atol=1e-5)
        assert not torch.allclose(a[tick + 1 :], b[tick + 1 :], atol=1e-3)


def test_what_the_user_says_does_change_decisions(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData
) -> None:
    model, builder = built
    other = tuple(replace(w, text="What comes next?") if w.role == "user" else w for w in session.words)
    a, b = (
        decisions(model, collate([example_of(session, builder, words)], None, builder.pad_token))[0]
        for words in (session.words, other)
    )
    assert not torch.allclose(a, b, atol=1e-3)


def test_packed_equals_one_window_a_row(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData
) -> None:
    model, builder = built
    examples = [
        make_example(session, builder, first, length, session.state_before(first), session.words)
        for first, length in window_starts(session, 20, 7)
    ]
    in_one_row = [list(range(len(examples)))[::-1]]  # and not in the order they come in
    apart, packed = (collate(examples, rows, builder.pad_token) for rows in (None, in_one_row))
    assert packed.tokens.shape[0] == 1
    assert apart.tokens.shape[0] == len(examples) > 2
    outs, grads = [], []
    for batch in (apart, packed):
        model.zero_grad()
        out = model(batch)
        state = torch.cat([_shown(batch, out["dst_state"], index).flatten() for index in batch.order])
        (out["speaking"].sin().sum() + out["dst_update"].sin().sum() + state.sin().sum()).backward(
            retain_graph=True
        )
        out["response"].sin().sum().backward()
        outs.append(
            [_by_example(batch, out[name]) for name in ("speaking", "dst_update")]
            + [[_shown(batch, out["dst_state"], index) for index in range(len(examples))]]
            + [[out["response"][_words_of(batch, index)] for index in range(len(examples))]]
        )
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    for one, other in zip(*outs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, gradient in grads[0].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(grads[1][name] / scale, gradient / scale, rtol=1e-5, atol=1e-5)


def _by_example(batch: Batch, values: torch.Tensor) -> list[torch.Tensor]:
    parts = {e: values[batch.window_of_tick == n] for n, e in enumerate(batch.order)}
    return [parts[index] for index in range(len(parts))]


def _shown(batch: Batch, state: torch.Tensor, example: int) -> torch.Tensor:
    """State logits of one example, of the steps its plan shows."""
    number = batch.order.index(example)
    return state[batch.window_of_tick == number][:, : batch.num_steps[number]]


def _words_of(batch: Batch, example: int) -> torch.Tensor:
    return batch.documents.flatten()[batch.response_at] == batch.order.index(example)


def test_generated_words_are_what_the_training_forward_would_say(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words from the cache of keys, one token at a time, are the argmax of one pass over the whole window.

    Utterances stay lists of tokens here, so that nothing hangs on how a text is split into tokens again.
    """
    model, builder = built
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 8)
    monkeypatch.setattr(builder, "text_of", lambda tokens: " ".join(map(str, tokens)))
    silent = tuple(w for w in session.words if w.role == "user")
    batch = collate([example_of(session, builder, silent)], None, builder.pad_token)
    ticks = np.array([3, 4, 17, 40])
    with torch.inference_mode():
        _, keys = model.hidden_with_cache(batch)
        said = speech.speak(model, builder, batch, keys, [ticks])[0]
    assert sorted(said) == ticks.tolist()

    monkeypatch.setattr(builder, "answer", lambda text: [int(token) for token in text.split()])
    own = [*silent, *(Words(session.first_tick + tick, "assistant", text) for tick, text in said.items())]
    whole = collate([example_of(session, builder, tuple(own))], None, builder.pad_token)
    with torch.inference_mode():
        expected = model(whole)["response"].argmax(-1).tolist()
    spoken = [int(token) for tick in ticks.tolist() for token in said[tick].split()]
    assert whole.response.tolist() == spoken
    forced = builder.end_of_utterance  # stands where the limit cut an utterance, whatever the model would say
    assert [e for e, s in zip(expected, spoken, strict=True) if s != forced] == [
        s for s in spoken if s != forced
    ]
    assert len(spoken) > 2 * len(ticks)


def test_the_words_of_several_windows_do_not_depend_on_their_company(
    built: tuple[DSTSmolVLM, SequenceBuilder], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "MAX_WORDS_TOKENS", 8)  # an untrained model does not stop by itself
    model, builder = built
    sessions = load_sessions(cache, "train")[:4]
    scores = np.concatenate([t.speak_score for t in run_free(model, builder, sessions, Thresholds(2, 2))])
    often = Thresholds(float(np.quantile(scores, 0.95)), 0.5)
    together = run_free(model, builder, sessions, often)
    alone = [run_free(model, builder, [session], often)[0] for session in sessions]
    assert any(trace.predicted.speak.any() for trace in together)
    for a, b in zip(together, alone, strict=True):
        assert a.predicted.responses == b.predicted.responses
        assert np.array_equal(a.predicted.state, b.predicted.state)


def test_states_move_only_where_the_update_head_fires_and_only_forward(
    built: tuple[DSTSmolVLM, SequenceBuilder], cache: ShardCache
) -> None:
    model, builder = built
    sessions = load_sessions(cache, "train")[:3]
    scores = np.concatenate([t.update_score for t in run_free(model, builder, sessions, Thresholds(2, 2))])
    threshold = float(np.quantile(scores, 0.9))
    moved = 0
    for trace in run_free(model, builder, sessions, Thresholds(2, threshold)):
        state = np.vstack([np.zeros_like(trace.predicted.state[:1]), trace.predicted.state])
        changes = (state[1:] != state[:-1]).any(axis=1)
        assert (np.diff(state, axis=0) >= 0).all()
        assert not (changes & ~trace.predicted.dst_update).any()
        assert trace.predicted.dst_update.tolist() == (trace.update_score >= threshold).tolist()
        moved += int(changes.sum())
    assert moved > 0
    still = run_free(model, builder, sessions, Thresholds(2, 2))
    assert not any(trace.predicted.state.any() for trace in still)


def test_save_and_reload_bit_for_bit(
    built: tuple[DSTSmolVLM, SequenceBuilder], session: SessionData, tmp_path: Path
) -> None:
    model, builder = built
    model.save_pretrained(tmp_path)
    again = load_trained(tmp_path).eval()
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    for (name, mine), (other_name, theirs) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(mine, theirs), name
    batch = collate([example_of(session, builder, session.words)], None, builder.pad_token)
    for mine, theirs in zip(decisions(model, batch), decisions(again, batch), strict=True):
        assert torch.equal(mine, theirs)


def test_exactly_four_heads_in_float32_and_no_vision_tower(built: tuple[DSTSmolVLM, SequenceBuilder]) -> None:
    model, _ = built
    tops = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert tops == {"model", "visual_adapter", "speaking_head", "dst_update_head", "dst_state_head"}
    assert model.response_head is model.lm_head
    assert not any("vision_model" in name or "connector" in name for name, _ in model.named_parameters())
    half = load_half(model)
    ticks, steps = torch.randn(3, 128).bfloat16(), torch.randn(3, 2, 128).bfloat16()
    assert {out.dtype for out in half.decide(ticks, steps)} == {torch.float32}
    assert half.project(ticks).dtype == torch.float32


def load_half(model: DSTSmolVLM) -> DSTSmolVLM:
    """The same model with its backbone in bfloat16, as on a GPU."""
    half = DSTSmolVLM(model.config)
    half.model.to(torch.bfloat16)
    half.lm_head.to(torch.bfloat16)
    return half


@pytest.mark.parametrize("half", [False, True])
def test_validation_computes_as_training_does_with_dense_attention_in_as_much_room(
    built: tuple[DSTSmolVLM, SequenceBuilder],
    cache: ShardCache,
    half: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, builder = built
    sessions = load_sessions(cache, "val")[:2]
    config = model.config.text_config
    monkeypatch.setattr(config, "_attn_implementation", "flex_attention")
    seen = []

    def look(module: Any, args: Any, out: torch.Tensor) -> None:
        seen.append((out.dtype, out.shape[0] * out.shape[1], out.shape[0], config._attn_implementation))

    def precision() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    hook = model.model.text_model.layers[0].self_attn.q_proj.register_forward_hook(look)
    one_process = SimpleNamespace(process_index=0, num_processes=1, autocast=precision)
    row = validate(model, builder, sessions, one_process, 1000)  # type: ignore[arg-type]
    hook.remove()
    assert {dtype for dtype, *_ in seen} == {torch.bfloat16 if half else torch.float32}
    assert {kind for *_, kind in seen} == {"sdpa"}
    assert config._attn_implementation == "flex_attention"
    assert all(positions <= 1000 or rows == 1 for _, positions, rows, _ in seen)
    windows = sum(len(list(window_starts(s, model.config.window_ticks, 0))) for s in sessions)
    assert sum(rows for _, _, rows, _ in seen) == windows > len(seen)
    monkeypatch.setattr(config, "_attn_implementation", "sdpa")
    with precision():
        alone, loss, words = decide_teacher(model, builder, sessions, positions=1)
    close = 0.02 if half else 1e-5
    assert row["val/loss_response"] == pytest.approx(loss / words, rel=close)
    together, _, _ = decide_teacher(model, builder, sessions)
    for one, other in zip(chain(*alone), chain(*together), strict=True):
        assert np.abs(one.speaking - other.speaking).max() < (0.1 if half else 1e-5)
        assert one.speaking.dtype == np.float32


def test_validation_compiles_nothing(
    built: tuple[DSTSmolVLM, SequenceBuilder], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the language model is compiled for training, each shape would be compiled anew."""
    model, builder = built
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    text_model = model.model.text_model
    monkeypatch.setattr(
        text_model, "_compiled_call_impl", torch.compile(text_model._call_impl, backend=backend)
    )
    decided, _, _ = decide_teacher(model, builder, load_sessions(cache, "val")[:1])
    assert len(decided) == 1
    assert compiled == []


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_windows_of_a_pass_are_as_many_as_fit_in_order(lengths: list[int], positions: int) -> None:
    windows = [
        (number, SimpleNamespace(window=SimpleNamespace(tokens=range(length))))
        for number, length in enumerate(lengths)
    ]
    parts = [[number for number, _ in part] for part in _fitting(iter(windows), positions)]  # type: ignore[arg-type]
    assert list(chain(*parts)) == list(range(len(lengths)))
    for part, following in zip_longest(parts, parts[1:]):
        assert len(part) == 1 or max(lengths[n] for n in part) * len(part) <= positions
        if following is not None:
            more = [*part, following[0]]
            assert max(lengths[n] for n in more) * len(more) > positions
