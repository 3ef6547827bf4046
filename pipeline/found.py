"""What of each corpus is there, beside what belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_manifests import Manifest, load_manifest, manifest_names


@dataclass(frozen=True)
class Found:
    """Files of one kind of one corpus; ``count`` and ``rows`` are there, ``of`` and ``of_rows`` belong there."""

    kind: str
    count: int
    of: int | None
    rows: int | None
    of_rows: int | None
    place: str

    @property
    def whole(self) -> bool:
        """Whether nothing is missing, as far as the manifest knows how much there is."""
        return self.count > 0 and self.count >= (self.of or 0) and (self.rows or 0) >= (self.of_rows or 0)

    def amount(self) -> str:
        """Such as ``200 of 328``, or ``1 (9,000 of 9,669 rows)``."""
        files = f"{self.count} of {self.of}" if self.of else str(self.count)
        return files + (f" ({self.rows:,} of {self.of_rows:,} rows)" if self.of_rows and self.count else "")


def find_sources(data: Path) -> Iterator[tuple[Manifest, list[Found]]]:
    """All corpora with what is at ``data/<source>``, in order of their names."""
    for source in manifest_names():
        manifest = load_manifest(source)
        yield manifest, [_found(manifest, data / source, kind) for kind in manifest.files]


def _found(manifest: Manifest, root: Path, kind: str) -> Found:
    paths, place, count = manifest.search(root, kind)
    of_rows = manifest.files[kind].rows
    rows = sum(map(_lines, paths)) if of_rows else None
    return Found(kind, len(paths), count, rows, of_rows, place)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
