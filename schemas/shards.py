"""What a shard holds and how its parts are named."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from schemas.errors import UserError
from schemas.files import write_text

CHUNK_TICKS = 64
"""Ticks of a video in one vision record."""

_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def is_safe_key(key: str) -> bool:
    """Whether a key can name a record: it cannot leave its folder, and holds no dot, as WebDataset needs."""
    return _SAFE_KEY.fullmatch(key) is not None


def vision_key(video_id: str, chunk: int) -> str:
    """Key of one chunk of a video's features."""
    return f"{video_id}/{chunk:05d}"


def shard_stem(kind: str, number: int) -> str:
    """File name without ending: ``vision-00012`` or ``labels-00012``."""
    return f"{kind}-{number:05d}"


class Fingerprint(BaseModel):
    """What features depend on. Two caches mix only when all of it but ``model`` is equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    model: str  # where the checkpoint was found: what `dst train` takes unless told otherwise
    vision_sha256: str  # of the tensors of vision tower and connector
    preprocessing: dict[str, int | float | str | list[float]]
    tick_hz: float
    tokens_per_frame: int
    dim: int
    dtype: str = "float16"
    chunk_ticks: int = CHUNK_TICKS

    def write(self, folder: Path) -> None:
        write_text(folder / "cache.json", self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Fingerprint:
        """Read a cache's fingerprint.

        Raises:
            UserError: the folder is not a cache, or one of another version.
        """
        path = folder / "cache.json"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no cache.json, so it is not a feature cache; run 'dst cache-features'"
            )
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path} is not a fingerprint of this version ({str(error).splitlines()[0]})"
            ) from None

    def require_equal(self, other: Fingerprint, folder: Path) -> None:
        """Refuse to mix caches.

        Raises:
            UserError: naming each setting that differs, with both values.
        """
        mine, theirs = (each.model_dump(exclude={"model"}) for each in (self, other))
        differing = [
            f"{key}: {theirs[key]} there, {mine[key]} now" for key in mine if mine[key] != theirs[key]
        ]
        if differing:
            raise UserError(
                f"{folder} was made with other settings ({'; '.join(differing)}); "
                "use the same ones, or another --out"
            )
