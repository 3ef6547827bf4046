"""The ledger of a cache: which files are finished, from what, and what failed in them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """One JSON line for each finished file; the last line of a file counts. Appended, never rewritten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, dict[str, Any]] = {}
        self._cut = False  # whether the last line has no end: the next one must not go on in it
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            self._cut = not text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a line cut short by a kill: its file counts as not finished and is made again
                self._last[entry["file"]] = entry

    def finished(self, path: Path, key: str) -> dict[str, Any] | None:
        """The entry of a file that was made from the same input and is still there."""
        entry = self._last.get(path.name)
        return entry if entry is not None and entry["key"] == key and path.is_file() else None

    def add(self, path: Path, key: str, failures: list[dict[str, str]]) -> None:
        entry = {"file": path.name, "key": key, "sha256": sha256_of(path), "failures": failures}
        with self.path.open("a", encoding="utf-8") as file_out:
            file_out.write("\n" * self._cut + json.dumps(entry) + "\n")
            file_out.flush()
            os.fsync(file_out.fileno())
        self._cut = False
        self._last[path.name] = entry


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
