"""The log of a run: a JSON object a step in log.jsonl, and the same in the trackers the recipe names."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator

from schemas.errors import UserError
from schemas.files import write_text

Row = dict[str, float]


class RunLog:
    """Rows by step, written as they come by the main process; `rows` are all of them."""

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.path, self._accelerator = out / "log.jsonl", accelerator
        self.rows: list[Row] = []
        self._file: IO[str] | None = None

    def open(self, step: int) -> None:
        """Begin, or go on after so many steps: what a run that was killed wrote of later ones goes away."""
        if step:
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            lines = text.splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
            self.rows = [row for row in map(json.loads, whole) if row["step"] <= step]
            if [row["step"] for row in self.rows] != list(range(1, step + 1)):
                raise UserError(
                    f"{self.path} lacks some of the {step} steps that are saved; put it back, or start a new run"
                )
        if self._accelerator.is_main_process:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = self.path.open("a", encoding="utf-8")
        self._accelerator.wait_for_everyone()
        if self._accelerator.log_with:
            about = {"dir": str(self.path.parent), "name": self.path.parent.resolve().name}
            self._accelerator.init_trackers("dst", init_kwargs={"wandb": about})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._accelerator.log_with:
            self._accelerator.end_training()

    def add(self, row: Row) -> None:
        rounded = {key: _rounded(value) for key, value in row.items()}
        self.rows.append(rounded)
        if self._file is not None:
            self._file.write(json.dumps(rounded) + "\n")
            self._file.flush()
        if self._accelerator.log_with:
            self._accelerator.log(
                {key: value for key, value in row.items() if key != "step"}, step=int(row["step"])
            )

    def sync(self) -> None:
        """What was added outlives a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def clip_share(self, row: Row) -> float:
        """Share of the steps since the last validation whose gradient was clipped, ``row``'s among them."""
        since: list[Row] = [row]
        for earlier in reversed(self.rows):
            if "train/clip_share" in earlier:
                break
            since.append(earlier)
        flags = [value for each in since for key, value in each.items() if key.startswith("train/clipped")]
        return sum(flags) / max(1, len(flags))

    def row_of(self, step: int) -> Row:
        return next(row for row in self.rows if row["step"] == step)


def installed(trackers: Sequence[str]) -> list[str]:
    """The trackers a recipe names, if all are installed; accelerate would leave out the others without a word.

    Raises:
        UserError: one is not.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers names {name}, which is not installed: pip install 'dst[track]'")
    return list(trackers)


def _rounded(value: Any) -> Any:
    """Nine digits tell float32 numbers apart; JSON has no word for infinity, as of a gradient that fp16 leaves out."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
