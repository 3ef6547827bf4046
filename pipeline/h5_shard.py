"""Shards as HDF5 files: a group a record, a contiguous dataset a member, and an index to read them without libhdf5.

libhdf5 is not made for files from strangers: such a file can name other files to open and plug-ins to load. So it only
writes here. The block of 512 bytes before the HDF5 part, which the format leaves to its users, says where the dataset
``index.json`` lies, and that one where all others do.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.native_table import Column, to_columns, to_table
from pipeline.shard_reader import (
    ARRAY_TYPES,
    Damaged,
    Member,
    ShardReader,
    check_name,
    json_bytes,
    name_error,
    parse_json,
    plain_array,
)

_USER_BLOCK = 512
_SIGN = re.compile(
    rb"dst shard of (\d{1,18}) bytes, index\.json: (\d{1,18}) at (\d{1,18}), crc32 (\d{1,10})\n\0*"
)
_ALIGNMENT = 64  # so that a view of any type is aligned, as in a tar
_OVERHEAD = 4096  # more than a dataset takes beside its bytes: headers (of groups above it too), alignment
_STEP = 1 << 20  # room is taken in such steps
_END_OF_FILE = 28  # where the superblock of the version above holds this address

_Number = Annotated[int, Field(ge=0, strict=True)]


class _Dataset(NamedTuple):
    """Where the bytes of an array, or of JSON, are in the file."""

    kind: str  # a type of `ARRAY_TYPES`, or "json"
    shape: list[_Number]
    offset: _Number


_Places = _Dataset | dict[str, _Dataset]  # of an array, of JSON, or of a table's columns
_INDEX = TypeAdapter(list[tuple[str, dict[str, _Places]]])


class H5ShardWriter:
    """Writes records to an HDF5 file without times, so that equal records give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self._path = path
        self._index: dict[str, dict[str, _Places]] = {}
        self._datasets: set[str] = set()  # unlike a group, none can have a record below it
        self._most = self._taken = 0  # bytes that the file will have at most, and that it has room for
        with _system_errors(path):
            self._file = h5py.File(
                path,
                "w",
                libver=("v110", "v110"),
                userblock_size=_USER_BLOCK,
                alignment_threshold=1,
                alignment_interval=_ALIGNMENT,
            )
            try:
                self._take_room(_USER_BLOCK)
            except OSError:
                self._file.close()
                raise

    def __enter__(self) -> H5ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with _system_errors(self._path):
            if kind is not None:
                self._file.close()
                return
            text = json_bytes([[key, places] for key, places in self._index.items()])
            place = self._json("index.json", text)
            self._file.close()
            with self._path.open("rb+") as file:
                file.seek(_USER_BLOCK + _END_OF_FILE)
                size = int.from_bytes(file.read(8), "little")
                file.truncate(size)  # room that was not needed
                sign = f"index.json: {len(text)} at {place.offset}, crc32 {zlib.crc32(text)}"
                file.seek(0)
                file.write(f"dst shard of {size} bytes, {sign}\n".encode())

    def add(self, key: str, members: Mapping[str, Member]) -> None:
        """Add one record.

        Raises:
            UserError: the key cannot name a record, or another record takes its place.
        """
        if key in self._index:
            raise name_error(self._path, f"it would hold two records {key!r}")
        places = self._index.setdefault(key, {})
        for member, value in members.items():
            try:
                check_name(key, member)
            except Damaged as damage:
                raise name_error(self._path, damage) from None
            name = f"{key}/{member}"
            parts = name.split("/")
            taken = {"/".join(parts[:depth]) for depth in range(1, len(parts))} & self._datasets
            if taken or name in self._file:
                raise name_error(self._path, f"two records would share {min(taken, default=name)}")
            with _system_errors(self._path):
                places[member] = self._write(name, value)

    def _write(self, name: str, value: Member) -> _Places:
        if isinstance(value, np.ndarray):
            return self._array(name, value)
        if isinstance(value, pa.Table):
            return {
                column: self._array(f"{name}/{column}", values)
                if isinstance(values, np.ndarray)
                else self._json(f"{name}/{column}", json_bytes(values))
                for column, values in to_columns(value).items()
            }
        return self._json(name, json_bytes(value))

    def _array(self, name: str, array: NDArray[Any]) -> _Dataset:
        self._datasets.add(name)
        self._take_room(array.nbytes + len(name))
        dataset = self._file.create_dataset(name, data=plain_array(array, name), track_times=False)
        return _Dataset(array.dtype.str, list(array.shape), dataset.id.get_offset() if array.size else 0)

    def _json(self, name: str, text: bytes) -> _Dataset:
        """JSON is one string of fixed length, which any HDF5 library reads as such."""
        import h5py

        self._datasets.add(name)
        self._take_room(len(text) + len(name))
        kind = h5py.string_dtype("utf-8", len(text))
        dataset = self._file.create_dataset(name, data=np.array(text, kind), track_times=False)
        return _Dataset("json", [len(text)], dataset.id.get_offset())

    def _take_room(self, size: int) -> None:
        """For a dataset, before it is written: libhdf5 goes on after a write that failed, and then crashes."""
        self._most += size + _OVERHEAD
        if self._most > self._taken:
            more = self._most - self._taken + _STEP
            os.posix_fallocate(self._file.id.get_vfd_handle(), self._taken, more)
            self._taken += more


class H5Shard(ShardReader):
    """An HDF5 shard that `H5ShardWriter` wrote."""

    def _read_index(self) -> dict[str, dict[str, _Places]]:
        sign = _SIGN.fullmatch(self._bytes(0, _USER_BLOCK).to_pybytes())
        if sign is None:
            raise Damaged("it does not begin as one; HDF5 files of other programs are not read")
        whole, size, offset, checksum = (int(number) for number in sign.groups())
        if whole != self._data.size:
            raise Damaged(f"it has {self._data.size} bytes of {whole}")
        text = self._bytes(offset, size).to_pybytes()
        if zlib.crc32(text) != checksum:
            raise Damaged("the checksum of its index is wrong")
        try:
            records = _INDEX.validate_json(text)
        except ValidationError as error:
            raise Damaged(f"its index: {error.errors()[0]['msg']}") from None
        index = dict(records)
        if len(index) != len(records):
            raise Damaged("it holds a record twice")
        for key, places in records:
            for member in places:
                check_name(key, member)
        return index

    def _array(self, place: _Places) -> NDArray[Any]:
        if isinstance(place, dict) or place.kind not in ARRAY_TYPES:
            raise Damaged("not a plain array of numbers")
        return self._view(place.kind, place.shape, place.offset)

    def _json(self, place: _Places) -> pa.Buffer:
        if isinstance(place, dict) or place.kind != "json" or len(place.shape) != 1:
            raise Damaged("not JSON")
        return self._bytes(place.offset, place.shape[0])

    def _table(self, place: _Places) -> pa.Table:
        if not isinstance(place, dict):
            raise Damaged("not a table")
        return to_table({name: self._column(column) for name, column in place.items()})

    def _column(self, place: _Dataset) -> Column:
        column: Column = parse_json(self._json(place)) if place.kind == "json" else self._array(place)
        return column


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """libhdf5 tells what the system said, such as a full disk, only inside a longer text, and h5py not always as an
    OSError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = re.search(r"errno = (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
