"""What a run leaves to go on from and to be used: `latest` with all it needs, `best` and `best_<task>` as models."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from schemas.errors import UserError
from schemas.files import replacing_folder
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder
from training.tuning import merged_state

STATE = "trainer.pt"


def save_model(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    folder: Path,
    state: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """A checkpoint that `training.model.load_trained` reads, in place of the one that was there, or not at all.

    Args:
        state: what a run needs to go on; tensors, numbers and text in dictionaries and lists.
        tensors: the model's, put together, where it lies in parts.

    Raises:
        UserError: it cannot be written, for want of room say; the checkpoint that was there is whole.
    """
    tensors = merged_state(model) if tensors is None else tensors
    try:
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=tensors)
            builder.tokenizer.save_pretrained(temporary)
            for weights in temporary.glob("*.safetensors"):  # which are written for their owner alone
                weights.chmod((temporary / "config.json").stat().st_mode)
            if state is not None:
                own = {n: p for n, p in model.named_parameters() if p.requires_grad}
                trained = {n: tensors.get(n, p).detach().cpu() for n, p in own.items()}
                with (temporary / STATE).open("wb") as file:  # of a path, torch does not say what went wrong
                    torch.save(state | {"parameters": trained}, file)
    except UserError:
        raise
    except Exception as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise UserError(
            f"{folder} could not be saved ({os.strerror(reason)}); the checkpoint before is whole: make room and "
            "go on with --resume"
        ) from error


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of what went wrong, which torch and safetensors wrap in errors of their own."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else _system_error(error.__cause__ or error.__context__)


def load_state(model: DSTSmolVLM, folder: Path) -> dict[str, Any]:
    """Put what was trained back into a model that was built as at the start, and return the rest of the state.

    Raises:
        UserError: there is nothing to go on from, or it is another model's.
    """
    path = folder / STATE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {STATE}, so there is nothing to resume; start it without --resume"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} cannot be read ({type(error).__name__}); it is damaged") from error
    saved = state.pop("parameters")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: tuple(p.shape) for n, p in own.items()} != {n: tuple(p.shape) for n, p in saved.items()}:
        raise UserError(f"{path} is of another model than the recipe's; resume with the run's own recipe")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return state
