"""What all shard files have in common: records of named members, read by memory map."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.shards import is_safe_key

Member = NDArray[Any] | pa.Table | dict[str, Any] | list[Any]

ARRAY_TYPES = frozenset({"<f2", "<f4", "<f8", "|i1", "|u1", "<i2", "<i4", "<i8"})
"""NumPy's names of the types an array in a shard may have."""

_MEMBER = re.compile(r"[a-z_]+")
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class Damaged(Exception):
    """What is wrong inside a shard; its reader says in which one."""


def check_name(key: str, member: str) -> None:
    """Check what a record and a member of it are called.

    Raises:
        Damaged: these cannot be names.
    """
    if not is_safe_key(key) or _MEMBER.fullmatch(member) is None:
        raise Damaged(f"no record can be called {key!r} with a member {member!r}")


def name_error(path: Path, what: object) -> UserError:
    """For a record that cannot be written under its key."""
    return UserError(
        f"{path}: {what}; give each session and video an id of its own, of letters, digits, '-', '_', '/'"
    )


def plain_array(array: NDArray[Any], name: str) -> NDArray[Any]:
    """In the order of C, as shards hold it.

    Raises:
        TypeError: no shard holds arrays of that type.
    """
    if array.dtype.str not in ARRAY_TYPES:
        raise TypeError(f"{name} is of type {array.dtype}, which no shard holds")
    return np.asarray(array, order="C")


def parse_json(data: bytes | pa.Buffer) -> Any:
    """Parse what may come from a stranger.

    Raises:
        Damaged: it is not UTF-8 JSON, or text in it cannot be written as UTF-8 again.
    """
    text = bytes(data)
    try:
        value = json.loads(text.decode())
        if _HALF_CHARACTER.search(text):  # half of a pair is a str that nothing can print
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not JSON: {error}") from None
    return value


def json_bytes(value: dict[str, Any] | list[Any]) -> bytes:
    """Compact UTF-8 JSON; equal values with equal order of keys give equal bytes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class ShardReader(ABC):
    """Random access to the records of one shard file.

    Arrays and tables are read-only views of the mapped file, which stays mapped while one of them is there. No
    descriptor is kept open. A reader may be pickled and forked; it is then mapped again where it is used.

    Raises:
        UserError: the file is not a whole shard, or holds what a shard does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: pa.Buffer | None = None
        try:
            self._index: dict[str, dict[str, Any]] = self._read_index()
        except Damaged as damage:
            raise self._error(damage) from None

    @property
    def keys(self) -> list[str]:
        """Keys of the records in the order they were written."""
        return list(self._index)

    def members(self, key: str) -> list[str]:
        """Names of a record's members."""
        return list(self._record(key))

    def array(self, key: str, member: str) -> NDArray[Any]:
        """A read-only view of a member in the mapped file.

        Raises:
            UserError: there is none of that name, or it is not a plain array.
        """
        try:
            return self._array(self._member(key, member))
        except Damaged as damage:
            raise self._error(damage, key, member) from None

    def json(self, key: str, member: str) -> Any:
        """A parsed JSON member.

        Raises:
            UserError: there is none of that name, or it is not JSON.
        """
        try:
            return parse_json(self._json(self._member(key, member)))
        except Damaged as damage:
            raise self._error(damage, key, member) from None

    def table(self, key: str, member: str) -> pa.Table:
        """A table; checked, so that what uses it cannot read outside of it.

        Raises:
            UserError: there is none of that name, or it is not a whole table.
        """
        try:
            table = self._table(self._member(key, member))
            table.validate(full=True)
            for field in table.schema:
                _require_no_nulls(field, table[field.name])
        except (Damaged, pa.ArrowException, OSError) as damage:
            raise self._error(damage, key, member) from None
        return table

    @abstractmethod
    def _read_index(self) -> dict[str, dict[str, Any]]:
        """Where the members are: by key, by name of the member, whatever the methods below take."""

    @abstractmethod
    def _array(self, place: Any) -> NDArray[Any]: ...

    @abstractmethod
    def _json(self, place: Any) -> pa.Buffer: ...

    @abstractmethod
    def _table(self, place: Any) -> pa.Table: ...

    @property
    def _data(self) -> pa.Buffer:
        """The bytes of the file."""
        if self._mapped is None:
            try:
                if self.path.stat().st_size == 0:
                    raise Damaged("it is empty")
                with pa.memory_map(
                    str(self.path)
                ) as file:  # whose map outlives its descriptor, unlike mmap's
                    self._mapped = file.read_buffer()
            except OSError as error:
                raise Damaged(error.strerror or error) from None
        return self._mapped

    def _bytes(self, offset: int, size: int) -> pa.Buffer:
        if not 0 <= offset <= offset + size <= self._data.size:
            raise Damaged("it breaks off")
        return self._data.slice(offset, size)

    def _view(self, dtype: str, shape: Sequence[int], offset: int) -> NDArray[Any]:
        """An array in the file, of one of ``ARRAY_TYPES``."""
        try:
            data = self._bytes(offset, math.prod(shape) * np.dtype(dtype).itemsize)
            return np.ndarray(shape, dtype, data)
        except ValueError as error:  # a length that no array can have
            raise Damaged(error) from None

    def _record(self, key: str) -> dict[str, Any]:
        if key not in self._index:
            raise self._error(f"it has no record {key!r}")
        return self._index[key]

    def _member(self, key: str, member: str) -> Any:
        if member not in self._record(key):
            raise Damaged("there is none")
        return self._index[key][member]

    def _error(self, damage: object, *where: str) -> UserError:
        sentence = " ".join(str(damage).split())
        place = f"{', '.join(where)}: " if where else ""
        return UserError(
            f"{self.path} is not a whole shard ({place}{sentence}); remove it and run 'dst cache-features' again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}


def _require_no_nulls(field: pa.Field, column: pa.ChunkedArray) -> None:
    """Nulls where the schema promises none, which Arrow does not look for."""
    if not field.nullable and column.null_count:
        raise Damaged(f"its column {field.name} lacks values")
    if pa.types.is_list(field.type):
        _require_no_nulls(field.type.value_field, pc.list_flatten(column))
