"""Shard files: tars that stock WebDataset reads, written by name and read by memory map."""

from __future__ import annotations

import io
import json
import mmap
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.shards import CHUNK_TICKS, Fingerprint, vision_key
from schemas.tables import TABLES


class TarWriter:
    """Writes records to a tar with fixed times and owners, so that equal records give equal bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb+")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._file.close()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add one record; its members lie together, in the order given."""
        for ending, data in members.items():
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back the records added inside when an exception leaves the block."""
        offset = self._tar.offset
        try:
            yield
        except BaseException:
            self._file.seek(offset)
            self._file.truncate()
            self._tar.offset = offset
            raise


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the bytes of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class TarReader:
    """Random access to a tar's members without copying them.

    Raises:
        UserError: the file is not a whole tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path) as tar:
                self.members = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{path} is not a whole shard ({error}); run 'dst cache-features' again"
            ) from None
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def bytes_of(self, name: str) -> memoryview:
        offset, size = self.members[name]
        return memoryview(self._map)[offset : offset + size]

    def json_of(self, name: str) -> Any:
        return json.loads(bytes(self.bytes_of(name)))

    def array_of(self, name: str) -> NDArray[Any]:
        """A read-only view of a ``.npy`` member in the mapped file."""
        offset, size = self.members[name]
        head = io.BytesIO(self.bytes_of(name)[:4096])
        version = np.lib.format.read_magic(head)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(head)
        if fortran or dtype.hasobject or head.tell() + int(np.prod(shape)) * dtype.itemsize != size:
            raise UserError(f"{self.path}: member {name} is not a plain array; make the shard again")
        return np.ndarray(shape, dtype, self._map, offset + head.tell())


@dataclass(frozen=True)
class LabelledSession:
    """One session as a label shard holds it.

    ``frames`` are its rows of the frames table; ``state`` and ``transitions`` are int8 ``[T, K]``.
    """

    meta: dict[str, Any]
    steps: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    frames: pa.Table

    @property
    def session_id(self) -> str:
        return str(self.meta["session_id"])

    @property
    def first_tick(self) -> int:
        return int(self.meta["first_tick"])

    @property
    def num_ticks(self) -> int:
        return int(self.meta["num_ticks"])

    def column(self, name: str) -> NDArray[Any]:
        """A column of ``frames`` as an array; lists of states become ``[T, K]``."""
        column = self.frames[name].combine_chunks()
        if pa.types.is_list(column.type):
            return column.flatten().to_numpy().reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)


class ShardCache:
    """A folder of finished shard pairs, read by memory map.

    Raises:
        UserError: the folder is not a cache, holds no finished session, or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint = Fingerprint.read(folder)
        self._chunks: dict[str, TarReader] = {}
        self._sessions: dict[str, TarReader] = {}
        for path in sorted(folder.glob("vision-*.tar")):
            reader = TarReader(path)
            names = (name for name in reader.members if name.endswith(".vision.npy"))
            self._chunks.update((name.removesuffix(".vision.npy"), reader) for name in names)
        for path in sorted(folder.glob("labels-*.tar")):
            reader = TarReader(path)
            names = (name for name in reader.members if name.endswith(".frames.arrow"))
            self._sessions.update((name.removesuffix(".frames.arrow"), reader) for name in names)
        if not self._sessions:
            raise UserError(
                f"{folder} holds no finished session; run 'dst cache-features' and read its summary"
            )
        self.session_ids = sorted(self._sessions)

    def session(self, session_id: str) -> LabelledSession:
        """Read one session's labels."""
        reader = self._sessions[session_id]
        with pa.ipc.open_file(pa.py_buffer(reader.bytes_of(f"{session_id}.frames.arrow"))) as file:
            frames = file.read_all()
        if not frames.schema.equals(TABLES["frames"]):
            raise UserError(f"{reader.path}: {session_id} has other columns than this version; make it again")
        meta, steps, turns = (
            reader.json_of(f"{session_id}.{part}.json") for part in ("meta", "steps", "turns")
        )
        return LabelledSession(meta, steps, turns, frames)

    def num_ticks(self, video_id: str) -> int:
        """Ticks of a video that are in the cache, from 0 on; 0 for a video that is not."""
        total = 0
        while (name := vision_key(video_id, total // CHUNK_TICKS)) in self._chunks:
            ticks = len(self._chunks[name].array_of(f"{name}.vision.npy"))
            total += ticks
            if ticks < CHUNK_TICKS:
                break
        return total

    def features(self, video_id: str, first_tick: int, num_ticks: int) -> NDArray[Any]:
        """Features of consecutive ticks.

        Returns:
            ``[num_ticks, tokens, dim]`` in the cache's dtype; a view where one chunk holds them all.

        Raises:
            UserError: the cache lacks one of the ticks.
        """
        parts = []
        tick, end = first_tick, first_tick + num_ticks
        while tick < end:
            name = vision_key(video_id, tick // CHUNK_TICKS)
            offset = tick % CHUNK_TICKS
            part = self._array(name, video_id, tick)[offset : offset + end - tick]
            if not len(part):
                raise UserError(
                    f"{self.folder} has no features of {video_id} at tick {tick}; run 'dst cache-features'"
                )
            parts.append(part)
            tick += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _array(self, name: str, video_id: str, tick: int) -> NDArray[Any]:
        if name not in self._chunks:
            raise UserError(
                f"{self.folder} has no features of {video_id} at tick {tick}; run 'dst cache-features'"
            )
        return self._chunks[name].array_of(f"{name}.vision.npy")
