"""What is trained and what is not: adapters on the language model alone, heads alone, with less memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import small, some_steps, totals_of, trained_by, weights_of
from torch import nn

from pipeline.shards import ShardCache
from schemas.errors import UserError
from training.checkpoint import save_model
from training.dialog import build
from training.model import HEADS, DSTSmolVLM, load_trained
from training.recipe import load_recipe
from training.trainer import train
from training.tuning import choose_trained, merged_state

LORA = ("model.tune=lora", "model.lora.rank=4", "model.lora.alpha=8")
NEW = ("visual_adapter.", "speaking_head.", "dst_update_head.", "dst_state_head.")


def test_adapters_lie_on_the_language_model_alone(shards: Path) -> None:
    model, _ = build(small(), ShardCache(shards))
    config = model.config
    config.with_vision = True
    whole = DSTSmolVLM(config)  # with the vision tower, whose projections have the same names
    towers = [name for name, _ in whole.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert any("vision_model" in name for name in towers)
    choose_trained(whole, small(*LORA).model, seed=0)
    adapted = {name for name, module in whole.named_modules() if hasattr(module, "lora_A")}
    layers = config.text_config.num_hidden_layers
    wanted = {
        f"model.text_model.layers.{at}.{part}_proj"
        for at in range(layers)
        for part in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        )
    }
    assert adapted == wanted
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    adapters = {f"{name}.lora_{side}.default.weight" for name in wanted for side in "AB"}
    assert trained == adapters | {name for name, _ in whole.named_parameters() if name.startswith(NEW)}


def test_a_saved_model_with_adapters_is_an_ordinary_one_that_says_the_same(
    shards: Path, tmp_path: Path
) -> None:
    recipe = small(*LORA, "model.lora.dropout=0.1")
    objective = trained_by(shards, recipe)
    before = weights_of(objective.model)
    steps = some_steps(shards, recipe, 3)
    objective.model.train()
    for number, passes in enumerate(steps):
        objective.step(passes, totals_of(passes, objective), number)
    after = weights_of(objective.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in moved if ".lora_" not in name and not name.startswith(NEW)} == set()
    assert any("lora_B" in name for name in moved)
    cache = ShardCache(shards)
    save_model(
        objective.model, build(recipe, cache)[1].tokenizer, tmp_path / "saved", merged_state(objective.model)
    )
    loaded = load_trained(tmp_path / "saved").eval()
    assert {name for name, _ in loaded.named_parameters()} == set(weights_of(build(small(), cache)[0]))
    objective.model.eval()
    batch = steps[0][0]
    with torch.no_grad():
        ours, theirs = objective.model(batch), loaded(batch)
        plain = build(small(), cache)[0].eval()(batch)
        for head in HEADS:  # in float32, a product of two matrices or of one rounds differently
            assert torch.allclose(ours[head], theirs[head], rtol=1e-5, atol=1e-5), head
            assert (plain[head] - theirs[head]).abs().max() > 1e-3, head  # the adapters do something
        exactly = [model.double().hidden(batch) for model in (objective.model, loaded)]
    assert (exactly[0] - exactly[1]).abs().max() < 1e-6 * exactly[0].abs().max()  # norms stay in float32
    kept = loaded.state_dict()
    for name, tensor in objective.model.state_dict().items():
        if name.startswith(NEW):
            assert torch.equal(tensor, kept[name]), name


def test_a_run_with_adapters_leaves_what_evaluation_reads(shards: Path, tmp_path: Path) -> None:
    recipe = small(*LORA, "train.steps=2", "train.eval_every=2")
    train(shards, recipe, tmp_path / "run", device="cpu")
    tensors = load_file(tmp_path / "run/checkpoints/best/model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    load_trained(tmp_path / "run/checkpoints/best")


def test_heads_only_leaves_the_backbone_bit_for_bit(shards: Path) -> None:
    recipe = small("model.tune=heads")
    objective = trained_by(shards, recipe)
    before = weights_of(objective.model)
    for number, passes in enumerate(some_steps(shards, recipe, 2)):
        objective.step(passes, totals_of(passes, objective), number)
    moved = {n for n, p in objective.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if name.startswith(NEW)}


def test_gradient_checkpointing_gives_the_same_gradients(shards: Path) -> None:
    recipe = small(*LORA, "model.lora.dropout=0.2")
    found = []
    calls = []
    for checkpointing in (False, True):
        objective = trained_by(shards, recipe)
        model = objective.model.train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)  # else the dropout before it would change nothing
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        count = [0]
        layer = next(
            m for n, m in model.named_modules() if n.endswith("layers.0.mlp") and isinstance(m, nn.Module)
        )
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        passes = some_steps(shards, recipe, 1)[0]
        torch.manual_seed(5)
        torch.stack([out.sum() for out in model(passes[0]).values()]).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        calls.append(count[0])
    assert calls == [1, 2]  # it is computed again, so less was kept
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-6), name


def test_a_run_with_gradient_checkpointing_is_the_same_run(shards: Path, tmp_path: Path) -> None:
    for value in ("true", "false"):
        recipe = small("train.steps=2", "train.eval_every=2", f"train.gradient_checkpointing={value}")
        train(shards, recipe, tmp_path / value, device="cpu")
    one, two = (load_file(tmp_path / v / "checkpoints/latest/model.safetensors") for v in ("true", "false"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-6), name


def test_adapters_without_their_package_are_one_sentence(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dst\[lora\]'"):
        build(load_recipe("tiny", ["model.tune=lora"]), ShardCache(shards))
