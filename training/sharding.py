"""One model over several devices: each holds a part of every parameter, its gradient and its moments (FSDP)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: Any, device: torch.device, ranks: int) -> None:
    """Spread a model over all ranks, layer by layer, so that one layer at a time is whole on each."""
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.model.text_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: Any, spare: Any, device: torch.device) -> Iterator[Any]:
    """The model with all parameters, with which every rank may compute by itself, as often as it likes.

    Args:
        spare: where ``model`` lies in parts, another one of its kind on the CPU to put them together in; else None.
    """
    if spare is None:
        yield model
        return
    spare.load_state_dict(gathered(model.state_dict()))
    try:
        yield spare.to(device)
    finally:
        spare.to("cpu")


def gathered(value: Any) -> Any:
    """Whole tensors on the CPU in place of parts, in dictionaries and lists too. Every rank must call it."""
    if isinstance(value, Mapping):
        return {key: gathered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [gathered(each) for each in value]
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    return value


def spread_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as the part of it that belongs here, if ``like`` is one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
