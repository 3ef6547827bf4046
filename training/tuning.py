"""Which parameters are trained: all, low-rank adapters on the language model, or only what is new."""

from __future__ import annotations

from typing import Any

import torch

from schemas.errors import UserError
from training.recipe import BackboneSettings

PROJECTIONS = r"model\.text_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
"""Modules that low-rank adapters are put on: the language model's alone, whatever else has such names."""


def choose_trained(model: Any, settings: BackboneSettings, seed: int) -> None:
    """Freeze what is not to be trained; what the backbone's checkpoint does not have always is trained.

    Raises:
        UserError: low-rank adapters without the package that makes them.
    """
    if settings.tune == "full":
        return
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(model.new_parts))
    if settings.tune == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError("model.tune=lora needs peft; install it with: pip install 'dst[lora]'") from None
        lora = settings.lora
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=PROJECTIONS
        )
        new = {name for name, p in model.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():  # it freezes all that is not its own
            parameter.requires_grad_(name in new or "lora_" in name)


def merged_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under its own names, low-rank adapters added to the weights they belong to."""
    state = model.state_dict()
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, module in adapted.items():
        base = state.pop(f"{name}.base_layer.weight")
        # one at a time goes to the CPU: all merged ones would take the room of another model
        state[f"{name}.weight"] = (base + module.get_delta_weight("default").to(base.dtype)).cpu()
        bias = state.pop(f"{name}.base_layer.bias", None)
        if bias is not None:
            state[f"{name}.bias"] = bias
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}
