"""What a run leaves to go on from and to be used: `latest` with all it needs, `best` and `best_<task>` as models."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from schemas.checkpoints import checkpoint_folder
from schemas.errors import UserError
from schemas.files import replacing_folder

STATE = "trainer.pt"
WEIGHTS = "*.safetensors"
EXPORTED = "dst-export.json"
"""In a folder that `dst export` wrote: of which run and checkpoint."""


def checkpoint_of(run: Path, checkpoint: str) -> Path:
    """The folder of a run's checkpoint.

    Raises:
        UserError: not a run, or it has no such checkpoint.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run (no run.json); give a folder made by 'dst train'")
    there = sorted(path.name for path in (run / "checkpoints").glob("[!.]*"))
    if checkpoint not in there:
        told = ", ".join(there) or "none yet"
        raise UserError(f"{run} has no checkpoint {checkpoint!r} (there are: {told})")
    return run / "checkpoints" / checkpoint


def checkpoint_to_use(source: Path, checkpoint: str | None, best: str) -> Path:
    """The folder of a run's checkpoint, ``best`` where none is named; or a folder that `dst export` wrote.

    Raises:
        UserError: neither of both, or no such checkpoint.
    """
    if not (source / EXPORTED).is_file():
        return checkpoint_of(source, checkpoint or best)
    holds = json.loads((source / EXPORTED).read_text(encoding="utf-8"))["checkpoint"]
    if checkpoint not in (None, holds):
        raise UserError(f"{source} was exported with checkpoint {holds!r}, not {checkpoint!r}")
    return source


def tower_of(vision: Mapping[str, str]) -> Path:
    """The checkpoint that a cache's features came from, by the ``vision`` of a model's configuration.

    Raises:
        UserError: it is not there any more.
    """
    try:
        return checkpoint_folder(vision["model"])
    except UserError:
        raise UserError(
            f"the features were made with the vision tower of {vision['model']}, which cannot be had now; "
            "put it there, or use a folder that 'dst export' wrote while it was"
        ) from None


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    state: dict[str, Any] | None = None,
) -> None:
    """A checkpoint that `training.model.load_checkpoint` reads, in place of the one that was there, or not at all.

    Args:
        tensors: the model's, as `training.tuning.merged_state` gives them, put together where it lies in parts.
        state: what a run needs to go on beside them; tensors, numbers and text in dictionaries and lists.

    Raises:
        UserError: it cannot be written, for want of room say; the checkpoint that was there is whole.
    """
    with _saving(folder) as temporary:
        model.save_pretrained(temporary, state_dict=dict(tensors))
        tokenizer.save_pretrained(temporary)
        let_read(temporary)
        if state is not None:
            _write_state(model, temporary, tensors, state)


def let_read(folder: Path) -> None:
    """Let those read weights who may read the configuration; safetensors writes them for their owner alone."""
    for weights in folder.glob(WEIGHTS):
        weights.chmod((folder / "config.json").stat().st_mode)


def save_again(
    model: torch.nn.Module,
    saved: Path,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    state: dict[str, Any] | None = None,
) -> None:
    """What `save_model` has just saved, under another name: weights take their room once, since both names have them.

    Nothing writes into a checkpoint that is there: one that is replaced is another folder.

    Raises:
        UserError: it cannot be written; the checkpoint that was there is whole.
    """
    with _saving(folder) as temporary:
        for file in saved.iterdir():
            if file.match(WEIGHTS):
                _link(file, temporary / file.name)
            else:
                shutil.copy(file, temporary)
        if state is not None:
            _write_state(model, temporary, tensors, state)


@contextmanager
def _saving(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder``; what goes wrong in a system call is told in a sentence."""
    try:
        with replacing_folder(folder) as temporary:
            yield temporary
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


def _link(file: Path, name: Path) -> None:
    try:
        name.hardlink_to(file)
    except OSError:  # not every file system has links
        shutil.copy(file, name)


def _write_state(
    model: torch.nn.Module, folder: Path, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]
) -> None:
    """What a run needs to go on; of the parameters that are trained, those that are not among the folder's weights."""
    there = {name for file in folder.glob(WEIGHTS) for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = {n: None if n in there else tensors.get(n, p).detach().cpu() for n, p in own.items()}
    with (folder / STATE).open("wb") as file:  # of a path, torch does not say what went wrong
        torch.save(state | {"parameters": parameters}, file)


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of what went wrong, which torch and safetensors wrap in errors of their own."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else _system_error(error.__cause__ or error.__context__)


def load_state(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
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
        weights = {name: p for file in folder.glob(WEIGHTS) for name, p in load_file(file).items()}
        saved = {n: weights[n] if p is None else p for n, p in state.pop("parameters").items()}
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(
            f"{path} cannot be read, or the weights beside it ({type(error).__name__}); start a new run"
        ) from error
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: tuple(p.shape) for n, p in own.items()} != {n: tuple(p.shape) for n, p in saved.items()}:
        raise UserError(f"{path} is of another model than the recipe's; resume with the run's own recipe")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return state
