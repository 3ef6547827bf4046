"""The ledger of a cache: which files are finished, from what, and what failed in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.storage import Store

FOLDER = "ledger"
SHARD_FILE = r"^(old|vision|labels)-\d{5,}\.(tar|h5)$"

Ticks = Annotated[int, Field(ge=0)]


class Unreadable(NamedTuple):
    """Ticks ``[first, end)`` of a video that could not be decoded; their features are 0, their pts NaN."""

    first: Ticks
    end: Ticks
    reason: str


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoEntry(_Record):
    """What was cached of one video: ticks from 0 on, those that are unreadable, and what else is to be known.

    ``needed`` ticks were asked for; where there are fewer, the video ends. ``identity`` is that of
    `pipeline.identity`, None where the file could not be read when the work was planned. ``marks_sha256`` is that of
    `pipeline.stills`, of the marks that were drawn on a picture.
    """

    ticks: Ticks
    needed: Ticks
    rotation_deg: int
    identity: str | None
    marks_sha256: str | None = None
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()


class Failure(_Record):
    """One video or session that is not in its shard, and why."""

    id: str
    reason: str


class Entry(_Record):
    """One finished file.

    ``key`` is a hash of all that its bytes follow from: a file whose key is another now is made again.
    ``videos`` and ``batch_size`` are a vision file's.
    """

    file: Annotated[str, Field(pattern=SHARD_FILE)]
    bytes: Ticks
    sha256: str
    key: str
    videos: dict[str, VideoEntry] = {}
    batch_size: int | None = None
    failures: tuple[Failure, ...] = ()


class Ledger:
    """A JSON file for each finished shard file, written after it, so that each is whole however many runs write.

    Raises:
        UserError: an entry that this version cannot have written.
    """

    def __init__(self, store: Store) -> None:
        # each a single question to the store, however many shards there are; another run may be writing others
        self._sizes = store.sizes()
        names = [f"{FOLDER}/{name}" for name in store.names(FOLDER) if name.endswith(".json")]
        self.entries = {
            Path(name).stem: _parsed(data, f"{store.url}/{name}")
            for name, data in store.read_all(names).items()
        }

    def finished(self, stem: str, key: str) -> Entry | None:
        """The entry of a file that was made from the same input and was still there, with all its bytes."""
        entry = self.entries.get(stem)
        return entry if entry is not None and entry.key == key and self.is_whole(entry) else None

    def is_whole(self, entry: Entry) -> bool:
        """Whether its file was there with all its bytes when the ledger was read."""
        return self._sizes.get(entry.file) == entry.bytes


def _parsed(data: bytes, where: str) -> Entry:
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError as error:
        raise UserError(
            f"{where} is not an entry of this version's ledger ({error.errors()[0]['msg']}); remove it, and its "
            "shard is made again"
        ) from None
    if entry.file.rpartition(".")[0] != Path(where).stem:
        raise UserError(f"{where} is about {entry.file!r}; remove it, and its shard is made again")
    return entry


def record(store: Store, stem: str, entry: Entry) -> None:
    """Make a file known as finished. Call it when the file lies under its name."""
    store.write_text(_name(stem), entry.model_dump_json(exclude_defaults=True) + "\n")


def forget(store: Store, stem: str) -> None:
    """A file of which nothing is known is made again. Call it before the file is replaced or removed."""
    if store.has(_name(stem)):
        store.remove(_name(stem))


def _name(stem: str) -> str:
    return f"{FOLDER}/{stem}.json"


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: object) -> str:
    """Hash of anything that JSON can hold, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
