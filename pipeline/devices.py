"""What a command runs on: the CPU, a GPU, several."""

from __future__ import annotations

import os

import typer

from schemas.errors import UserError


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher such as torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(gpu: int | None, device: str | None) -> str:
    """What to run on; says it in one line when the user has not."""
    import torch

    if gpu is not None:
        if gpu >= torch.cuda.device_count() or gpu < 0:
            raise UserError(
                f"there is no GPU {gpu} here ({torch.cuda.device_count()} found); use --device cpu"
            )
        torch.cuda.set_device(gpu)  # what accelerate takes
        return f"cuda:{gpu}"
    if device is not None:
        if device not in ("cpu", "cuda"):
            raise UserError(f"unknown --device {device!r}; use cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU here; use --device cpu")
        return device
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if is_main_process():
        typer.echo("using the GPU" if chosen == "cuda" else "no GPU found: using the CPU")
    return chosen


def choose_devices(gpu: str | None, device: str | None, *, somewhere_else: bool) -> list[str]:
    """Each device an encoder is to run on; the kind alone where it is a cluster's."""
    if somewhere_else:
        if device not in (None, "cpu", "cuda"):
            raise UserError(f"unknown --device {device!r}; use cpu or cuda")
        return [device or "cuda"]
    numbers = (gpu or "").split(",")
    if gpu is not None and not all(number.strip().isdecimal() for number in numbers):
        raise UserError(f"--gpu {gpu!r} is not a number, nor several with commas between; write 0 or 0,1,2,3")
    if gpu is None:
        return [choose_device(None, device)]
    chosen = list(dict.fromkeys(int(number) for number in numbers))
    return [choose_device(number, device) for number in chosen]
