"""Shards as tar files: one ``.npy``, ``.json`` or ``.arrow`` file a member, as stock WebDataset reads them."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.shard_reader import (
    ARRAY_TYPES,
    Damaged,
    Member,
    ShardReader,
    check_name,
    json_bytes,
    name_error,
    plain_array,
)

_BLOCK = 512
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<|][fiu]\d)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(?:\d{1,15},? ?){0,8})\), \} *\n"
)
_OCTAL = re.compile(rb"([0-7]+)[\0 ]*")
_UNUSED_PAX = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}


class TarShardWriter:
    """Writes records to a tar with fixed times and owners, so that equal records give equal bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._keys: set[str] = set()

    def __enter__(self) -> TarShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def add(self, key: str, members: Mapping[str, Member]) -> None:
        """Add one record; its members lie together, in the order given.

        Raises:
            UserError: the key cannot name a record, or there is one of that key.
        """
        if key in self._keys:
            raise name_error(self._path, f"it would hold two records {key!r}")
        self._keys.add(key)
        for member, value in members.items():
            try:
                check_name(key, member)
            except Damaged as damage:
                raise name_error(self._path, damage) from None
            kind, data = _encoded(value, f"{key}.{member}")
            info = tarfile.TarInfo(f"{key}.{member}.{kind}")
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))


def _encoded(value: Member, name: str) -> tuple[str, bytes | memoryview]:
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, plain_array(value, name), allow_pickle=False)
        return "npy", buffer.getbuffer()
    if isinstance(value, pa.Table):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, value.schema) as writer:
            # copied row by row: a slice's bit maps would end in bits of the rows after it
            writer.write_table(value.take(np.arange(len(value))).combine_chunks())
        return "arrow", memoryview(sink.getvalue())
    return "json", json_bytes(value)


class _File(NamedTuple):
    """Where a file's bytes are in the tar."""

    kind: str
    offset: int
    size: int


class TarShard(ShardReader):
    """A tar shard. Only plain files with the names of records are in it; nothing is ever extracted."""

    def _read_index(self) -> dict[str, dict[str, _File]]:
        index: dict[str, dict[str, _File]] = {}
        last = None
        for name, offset, size in _files(memoryview(self._data)):
            key, member, kind = [*name.rsplit(".", 2), "", ""][:3]
            check_name(key, member)
            if kind not in ("npy", "json", "arrow"):
                raise Damaged(f"it holds {name!r}, which is no member of a record")
            if key in index and (key != last or member in index[key]):
                raise Damaged(f"it holds {key!r} twice")
            index.setdefault(key, {})[member] = _File(kind, offset, size)
            last = key
        return index

    def _array(self, place: _File) -> NDArray[Any]:
        data = self._file(place, "npy")
        head = data.slice(0, min(data.size, 10)).to_pybytes()
        if head[:8] != b"\x93NUMPY\x01\x00" or len(head) < 10:
            raise Damaged("not an .npy file")
        begin = 10 + int.from_bytes(head[8:], "little")
        if begin > data.size:
            raise Damaged("it breaks off")
        header = _NPY_HEADER.fullmatch(data.slice(10, begin - 10).to_pybytes())
        dtype = header["dtype"].decode() if header else ""
        if header is None or dtype not in ARRAY_TYPES:
            raise Damaged("not a plain array of numbers")
        shape = [int(length) for length in header["shape"].replace(b",", b" ").split()]
        array = self._view(dtype, shape, place.offset + begin)
        if array.nbytes != data.size - begin:
            raise Damaged("its size is not its array's")
        return array

    def _json(self, place: _File) -> pa.Buffer:
        return self._file(place, "json")

    def _table(self, place: _File) -> pa.Table:
        with pa.ipc.open_file(self._file(place, "arrow")) as file:
            return file.read_all()

    def _file(self, place: _File, kind: str) -> pa.Buffer:
        if place.kind != kind:
            raise Damaged(f"it is {place.kind}, not {kind}")
        return self._bytes(place.offset, place.size)


def _files(tar: memoryview) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file.

    A record has two or three headers of 512 bytes in megabytes of data, and only they are touched. What `tarfile`
    would follow or restore (links, devices, sparse files, other encodings of numbers) is refused.
    """
    at, long_name = 0, None
    while True:
        header = bytes(tar[at : at + _BLOCK])
        if len(header) < _BLOCK:
            raise Damaged("it breaks off")
        if header == bytes(_BLOCK):
            break
        name, kind, size = _header(header)
        begin, end = at + _BLOCK, at + _BLOCK + size
        if end > len(tar):
            raise Damaged("it breaks off")
        if kind == b"x":
            long_name = _pax_path(bytes(tar[begin:end]))
        elif kind == b"0":
            yield long_name or name, begin, size
            long_name = None
        else:
            raise Damaged(f"it holds {name!r}, which is not a plain file")
        at = end + -size % _BLOCK
    rest = np.frombuffer(tar[at:], np.uint8)
    if len(rest) < 2 * _BLOCK or rest.any():
        raise Damaged("it ends inside")


def _header(header: bytes) -> tuple[str, bytes, int]:
    """Name, type and size of a member.

    Raises:
        Damaged: it is not the header of a POSIX tar, or not as it was written.
    """
    written, size = _OCTAL.fullmatch(header, 148, 156), _OCTAL.fullmatch(header, 124, 136)
    if written is None or int(written[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise Damaged("a header's checksum is wrong")
    if header[257:265] != b"ustar\x0000" or size is None:
        raise Damaged("a header is not of a POSIX tar")
    parts = [part.partition(b"\0")[0] for part in (header[345:500], header[:100])]
    try:
        return b"/".join(part for part in parts if part).decode(), header[156:157], int(size[1], 8)
    except UnicodeDecodeError:
        raise Damaged("a name is not text") from None


def _pax_path(records: bytes) -> str | None:
    """The name in an extended header, for names that are too long for a plain one."""
    path = None
    while records:
        length, _, _ = records.partition(b" ")
        end = int(length) if re.fullmatch(rb"\d{1,9}", length) else 0
        record, records = records[:end], records[end:]
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if not equals or value[-1:] != b"\n" or len(record) != end:
            raise Damaged("an extended header is broken")
        if key == b"path":
            path = value[:-1].decode(errors="replace")
        elif key not in _UNUSED_PAX:
            raise Damaged(f"an extended header sets {key[:20]!r}")
    return path
