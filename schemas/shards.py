"""What a shard holds and how its parts are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from schemas.errors import UserError
from schemas.files import write_text

CHUNK_TICKS = 64
"""Ticks of a video in one vision record."""

Storage = Literal["tar", "h5"]
FeatureType = Literal["float16", "int8"]
ComputeType = Literal["float32", "bfloat16", "float16"]
Decoder = Literal["pyav", "decord"]
Filter = Literal["lanczos", "bicubic"]

_OPTION = {"storage": "format"}  # what the user calls it

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
    """What features depend on, and how they are kept. A cache holds shards of one fingerprint, ``model`` apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    model: str  # where the checkpoint was found: what `dst train` takes unless told otherwise
    vision_sha256: str  # of the tensors of vision tower and connector
    preprocessing: dict[str, int | float | str | list[float]]
    decoder: Decoder = "pyav"
    compute: ComputeType = "float32"  # what the tower computed in
    tick_hz: float = Field(gt=0, allow_inf_nan=False)
    tokens_per_frame: int
    tiles: int = Field(default=1, ge=1)  # each way, that a frame was cut into; each went through the tower
    dim: int
    dtype: FeatureType = "float16"
    storage: Storage = "tar"
    chunk_ticks: int = CHUNK_TICKS

    @model_serializer(mode="wrap")
    def _as_before_tiles(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later is left away where it is not used, so that all that is told by a hash of the settings, or
        by the bytes of ``cache.json``, is told as before."""
        settings: dict[str, Any] = dump(self)
        if self.tiles == 1:
            settings.pop("tiles", None)
        return settings

    def text(self) -> str:
        """As ``cache.json`` holds it."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, folder: Path) -> None:
        write_text(folder / "cache.json", self.text())

    @classmethod
    def read(cls, folder: Path) -> Fingerprint:
        """Read a local cache's fingerprint.

        Raises:
            UserError: the folder is not a cache, or one of another version.
        """
        path = folder / "cache.json"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no cache.json, so it is not a feature cache; run 'dst cache-features'"
            )
        return cls.parse(path.read_text(encoding="utf-8", errors="replace"), path)

    @classmethod
    def parse(cls, text: str, where: str | Path) -> Fingerprint:
        """The fingerprint in the text of ``where``.

        Raises:
            UserError: it is not one of this version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            found = error.errors()[0]
            what = ".".join(map(str, found["loc"]))
            raise UserError(
                f"{where} is not a fingerprint of this version ({what + ': ' if what else ''}{found['msg']}); "
                "make the cache again"
            ) from None

    def bytes_per_tick(self) -> int:
        """Of the features of one tick, headers apart."""
        return self.tokens_per_frame * (self.dim * 2 if self.dtype == "float16" else self.dim + 4)

    def require_equal(self, other: Fingerprint, where: str | Path) -> None:
        """Refuse to mix caches.

        Raises:
            UserError: naming each setting that differs, with both values.
        """
        differing = [
            f"{_OPTION.get(name, name)}: {getattr(other, name)} there, {getattr(self, name)} now"
            for name in type(self).model_fields
            if name != "model" and getattr(self, name) != getattr(other, name)
        ]
        if differing:
            raise UserError(
                f"{where} was made with other settings ({'; '.join(differing)}); "
                "use the same ones, or another --out"
            )
