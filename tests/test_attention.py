"""Packed attention against each window alone in float64; what may not see what; types; what reaches the vocabulary."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations import flex_attention as integration

from pipeline.shards import ShardCache
from training.batch import Batch, Example, collate
from training.data import load_sessions, make_example
from training.dialog import build
from training.losses import IGNORE
from training.model import HEADS, DSTSmolVLM
from training.recipe import load_recipe
from training.sequence import SequenceBuilder

PACKED = [[2, 0], [1]]
"""How the examples lie in rows: together and alone, out of order, with padding."""

ATTENTION = ("sdpa", "eager", "flex_attention")
HALF = [("sdpa", torch.bfloat16), ("flex_attention", torch.bfloat16)]
COMPUTED = [*((name, torch.float32) for name in ATTENTION), *HALF]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def built(shards: Path, tiny_model: Path) -> tuple[DSTSmolVLM, SequenceBuilder]:
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}"]), ShardCache(shards))
    return model.eval(), builder


@pytest.fixture(scope="module")
def examples(built: tuple[DSTSmolVLM, SequenceBuilder], shards: Path) -> list[Example]:
    """Windows of several sessions and lengths, in which somebody speaks."""
    _, builder = built
    found = []
    lengths = iter((5, 8, 4))
    for session in load_sessions(ShardCache(shards), "train"):
        said = [w.tick for w in session.words if w.role == "assistant" and w.tick > session.first_tick + 30]
        length = next(lengths, None)
        if length is None:
            break
        first = said[0] - 3
        assert said[0] + 6 < session.first_tick + session.num_ticks
        found.append(
            make_example(session, builder, first, length, session.state_before(first), session.words)
        )
    assert len(found) == 3
    assert len({example.state.shape[1] for example in found}) > 1
    return found


@pytest.fixture
def batch(built: tuple[DSTSmolVLM, SequenceBuilder], examples: list[Example]) -> Batch:
    packed = collate(examples, PACKED, built[1].pad_token)
    assert packed.padding > 0
    assert packed.speech.any()
    return packed


@pytest.fixture
def attention(
    request: pytest.FixtureRequest, built: tuple[DSTSmolVLM, SequenceBuilder], monkeypatch: pytest.MonkeyPatch
) -> str:
    """One of the ways to compute attention. FlexAttention runs uncompiled here: its compiler takes half a minute."""

    def uncompiled(*args: Any, training: bool, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(built[0].config.text_config, "_attn_implementation", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def reference(
    built: tuple[DSTSmolVLM, SequenceBuilder], examples: list[Example]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Logits of each example, and gradients of what `loss_of` makes of them, in float64."""
    model = copy.deepcopy(built[0]).double()
    model.config.text_config._attn_implementation = "eager"
    found = [alone(model, example) for example in examples]
    sum((loss_of(logits) for logits in found), start=torch.zeros(())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [{name: value.detach() for name, value in logits.items()} for logits in found], gradients


def alone(model: DSTSmolVLM, example: Example) -> dict[str, torch.Tensor]:
    """One window by itself: the rule of attention read pair by pair, adapter and heads written out."""
    window, features = example.window, torch.tensor(example.features).double()
    words = model.model.text_model.embed_tokens.weight
    fuse = model.visual_adapter.fuse
    assert fuse is not None
    embedded = [words[token] for token in window.tokens]
    for at, tick in zip(window.visual_at, features, strict=True):
        embedded[at] = fuse.weight @ tick.flatten() + fuse.bias
    size = len(window.tokens)
    mask = torch.full((size, size), -torch.inf, dtype=torch.float64)
    for query in range(size):
        for key in range(query + 1):
            if window.speech[query] or not window.speech[key]:
                mask[query, key] = 0
    hidden = model.model.text_model(
        inputs_embeds=torch.stack(embedded)[None],
        attention_mask=mask[None, None],
        position_ids=torch.from_numpy(window.positions)[None],
        use_cache=False,
    ).last_hidden_state[0]
    ticks, steps = hidden[window.tick_at], hidden[window.step_at]
    labelled = np.flatnonzero(window.targets != IGNORE)
    head = model.dst_state_head.bilinear
    matrices, biases = head.weight.view(3, -1, hidden.shape[1]), head.bias.view(3, -1)
    states = [
        (ticks @ w.T + b) @ steps.T / hidden.shape[1] ** 0.5 for w, b in zip(matrices, biases, strict=True)
    ]
    return {
        "speaking": ticks @ model.speaking_head.weight.T + model.speaking_head.bias,
        "dst_update": ticks @ model.dst_update_head.weight.T + model.dst_update_head.bias,
        "response": hidden[labelled] @ words.T,
        "dst_state": torch.stack(states, dim=-1),
    }


def loss_of(logits: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number that every logit changes in its own way."""
    return torch.stack([value.double().sin().sum() for value in logits.values()]).sum()


def by_example(batch: Batch, out: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A batch's logits, taken apart; the padding of short plans is gone."""
    owner = batch.documents.flatten()[batch.response_at]
    parts = {}
    for number, example in enumerate(batch.order):
        mine = batch.window_of_tick == number
        parts[example] = {name: out[name][mine] for name in ("speaking", "dst_update")} | {
            "response": out["response"][owner == number],
            "dst_state": out["dst_state"][mine][:, : batch.num_steps[number]],
        }
    return [parts[index] for index in range(len(parts))]


@pytest.mark.parametrize("attention", ATTENTION, indirect=True)
def test_packed_equals_each_window_alone_in_float64(
    built: tuple[DSTSmolVLM, SequenceBuilder],
    batch: Batch,
    reference: tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    attention: str,
) -> None:
    model, _ = built
    model.zero_grad()
    has_gradients = attention != "flex_attention"  # torch has none for it on a CPU
    with torch.set_grad_enabled(has_gradients):
        found = by_example(batch, model(batch))
    for mine, exact in zip(found, reference[0], strict=True):
        for name in HEADS:
            torch.testing.assert_close(mine[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    if not has_gradients:
        return
    sum((loss_of(logits) for logits in found), start=torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in reference[1])
        if parameter.grad is not None:
            exact_gradient = reference[1][name]
            scale = max(1.0, float(exact_gradient.abs().max()))
            torch.testing.assert_close(
                parameter.grad.double() / scale, exact_gradient / scale, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(("attention", "precision"), COMPUTED, indirect=["attention"])
def test_one_window_changes_nothing_in_another(
    built: tuple[DSTSmolVLM, SequenceBuilder],
    batch: Batch,
    examples: list[Example],
    attention: str,
    precision: torch.dtype,
) -> None:
    model, _ = built
    before = logits_of(model, batch, precision)
    for number, changed in enumerate(batch.order[:2]):  # those that share a row
        tokens, features = batch.tokens.clone(), batch.features.clone()
        mine = batch.documents == number
        tokens[mine] = (tokens[mine] + 31) % 390
        features[batch.window_of_tick == number] += 3.0
        after = logits_of(model, replace(batch, tokens=tokens, features=features), precision)
        for index in range(len(examples)):
            for name in HEADS:
                assert torch.equal(after[index][name], before[index][name]) == (index != changed), (
                    name,
                    index,
                )


@pytest.mark.parametrize(("attention", "precision"), COMPUTED, indirect=["attention"])
def test_no_spoken_word_reaches_the_trunk(
    built: tuple[DSTSmolVLM, SequenceBuilder], batch: Batch, attention: str, precision: torch.dtype
) -> None:
    model, _ = built
    tokens = batch.tokens.clone()
    tokens[batch.speech] = (tokens[batch.speech] + 31) % 390
    before, after = (logits_of(model, each, precision) for each in (batch, replace(batch, tokens=tokens)))
    for one, other in zip(before, after, strict=True):
        for name in ("speaking", "dst_update", "dst_state"):
            assert torch.equal(one[name], other[name])
        if len(one["response"]):
            assert not torch.allclose(one["response"], other["response"], atol=1e-3)


@torch.no_grad()
def logits_of(model: DSTSmolVLM, batch: Batch, precision: torch.dtype) -> list[dict[str, torch.Tensor]]:
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        return by_example(batch, model(batch))


def test_the_block_mask_is_the_additive_mask(batch: Batch) -> None:
    rows, length = batch.tokens.shape
    mask = batch.block_mask()
    dense = create_mask(mask.mask_mod, rows, 1, length, length, device="cpu")
    assert torch.equal(dense, batch.additive_mask(torch.float32) == 0)
    # blocks of 128 that nobody sees are skipped, and none that somebody sees
    blocks = -(-length // 128)
    padded = nn.functional.pad(dense[:, 0], (0, blocks * 128 - length, 0, blocks * 128 - length))
    seen = padded.view(rows, blocks, 128, blocks, 128).any(4).any(2)
    assert torch.equal(mask.to_dense()[:, 0].bool(), seen)
    assert blocks > 1
    assert not seen.all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"], indirect=True)
def test_under_autocast_the_heads_stay_float32(
    built: tuple[DSTSmolVLM, SequenceBuilder], batch: Batch, attention: str
) -> None:
    model, _ = built
    exact = model(batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
        hidden = model.hidden(batch)
        steps = hidden[batch.step_at][batch.window_of_tick]
        decided = model.decide(hidden[batch.tick_at].bfloat16(), steps.bfloat16())
    assert {value.dtype for value in (*out.values(), *decided)} == {torch.float32}
    changed = False
    for name in HEADS:
        torch.testing.assert_close(out[name], exact[name], rtol=0.05, atol=0.2)
        changed |= not torch.allclose(out[name], exact[name], atol=1e-5)
    assert changed  # it did compute in bfloat16
    loss_of(out).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_flex_attention_takes_mixed_types_under_autocast_and_computes_in_the_half_one(
    built: tuple[DSTSmolVLM, SequenceBuilder], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated queries and keys are float32, values are not: the lowest torch that is allowed takes them so."""
    types = []

    def watched(*args: torch.Tensor, training: bool, **kwargs: Any) -> Any:
        found = flex_attention(*args, **kwargs)
        types.append(tuple(each.dtype for each in (*args[:3], found)))
        return found

    model, _ = built
    exact = logits_of(model, batch, torch.bfloat16)  # by sdpa
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", watched)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "flex_attention")
    found = logits_of(model, batch, torch.bfloat16)
    assert set(types) == {(torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)}
    assert len(types) == model.config.text_config.num_hidden_layers
    for mine, other in zip(found, exact, strict=True):
        for name in HEADS:
            torch.testing.assert_close(mine[name], other[name], rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_of_a_half_type_is_finite_and_no_row_is_empty(batch: Batch, dtype: torch.dtype) -> None:
    mask = batch.additive_mask(dtype)
    assert mask.dtype == dtype
    assert bool(torch.isfinite(mask).all())
    assert bool((mask == 0).any(-1).all())


def test_only_labelled_positions_reach_the_vocabulary(
    built: tuple[DSTSmolVLM, SequenceBuilder],
    batch: Batch,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, builder = built
    vocabulary, linear = model.response_head.weight.shape[0], nn.functional.linear
    projected = []

    def counting(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.shape[0] == vocabulary:
            projected.append(inputs.numel() // inputs.shape[-1])
        return linear(inputs, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counting)
    out = model(batch)
    # each spoken token is a target but those that open a message
    opens = len(builder.assistant_prefix)
    spoken = [e.window.speech for e in examples]
    messages = sum(int((np.diff(s.astype(int), prepend=0) == 1).sum()) for s in spoken)
    wanted = sum(int(s.sum()) for s in spoken) - opens * messages
    assert wanted > 5
    assert projected == [wanted]
    assert out["response"].shape == (wanted, vocabulary)
    model(batch, heads=("speaking", "dst_update", "dst_state"))
    assert projected == [wanted]


def test_silence_as_a_next_token_decides_by_its_probability(shards: Path, tiny_model: Path) -> None:
    settings = ["data.speech=inline", "data.speak_by=end_of_turn", "tasks.speaking.weight=0"]
    model, builder = build(load_recipe("tiny", [f"model.init={tiny_model}", *settings]), ShardCache(shards))
    generator = torch.Generator().manual_seed(0)
    ticks = torch.randn(12, model.config.text_config.hidden_size, generator=generator)
    weight = model.response_head.weight.detach().double()
    with torch.no_grad():
        speaking, _, _ = model.decide(ticks, torch.randn(12, 2, ticks.shape[1], generator=generator))
        for tick, logits in zip(ticks.double(), speaking, strict=True):
            raised = torch.exp(weight @ tick)
            silent = raised[builder.end_of_utterance] / raised.sum()
            found = logits.double().softmax(-1)
            torch.testing.assert_close(found, torch.stack([silent, 1 - silent]), rtol=1e-5, atol=1e-7)
        # certain of silence, or of the contrary: still numbers
        sure = weight[builder.end_of_utterance].float() * torch.tensor([[1e5], [-1e5]])
        speaking, _, _ = model.decide(sure, sure[:, None])
    assert bool(torch.isfinite(speaking).all())
    torch.testing.assert_close(speaking.softmax(-1)[:, 0], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)
