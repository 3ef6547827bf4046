"""The ``frames`` table as plain arrays, for file formats that know no nulls and no strings of different lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.shard_reader import Damaged
from schemas.errors import UserError
from schemas.tables import TABLES

VALUES = "_values"

Column = NDArray[Any] | list[str]


def to_columns(table: pa.Table) -> dict[str, Column]:
    """One array a column of the ``frames`` table, and the distinct texts of its columns of text.

    Numbers stay as they are. A boolean is int8: 0, 1, or -1 for null. A list of states is int8 ``[T, K]``. Text is
    int32: -1 for null, else the place in the list ``<column>_values``.

    Raises:
        UserError: lists of different lengths in one column.
    """
    columns: dict[str, Column] = {}
    for field in TABLES["frames"]:
        column = table[field.name].combine_chunks()
        if pa.types.is_string(field.type):
            texts = column.dictionary_encode()
            columns[field.name] = texts.indices.fill_null(-1).to_numpy()
            columns[field.name + VALUES] = texts.dictionary.to_pylist()
        elif pa.types.is_boolean(field.type):
            columns[field.name] = column.cast(pa.int8()).fill_null(-1).to_numpy()
        elif pa.types.is_list(field.type):
            columns[field.name] = _matrix(column, field.name)
        else:
            columns[field.name] = column.to_numpy()
    return columns


def to_table(columns: Mapping[str, Column]) -> pa.Table:
    """What `to_columns` was given.

    Raises:
        Damaged: no table gives these arrays.
        pa.ArrowException: the same.
    """
    arrays = [_array(field, columns) for field in TABLES["frames"]]
    return pa.Table.from_arrays(arrays, schema=TABLES["frames"])


def _matrix(column: pa.ListArray, name: str) -> NDArray[np.int8]:
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise UserError(
            f"the column {name} of a session has lists of {lengths[0]} and of {lengths[1]} states; "
            "run 'dst prepare' again"
        )
    return column.flatten().to_numpy().reshape(len(column), lengths[0] if lengths else 0)


def _array(field: pa.Field, columns: Mapping[str, Column]) -> pa.Array:
    is_list = pa.types.is_list(field.type)
    column = columns.get(field.name)
    if (
        not isinstance(column, np.ndarray)
        or column.dtype != _stored(field.type)
        or column.ndim != 1 + is_list
    ):
        raise Damaged(f"its column {field.name} is not as it should be")
    if pa.types.is_string(field.type):
        values = columns.get(field.name + VALUES)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise Damaged(f"the texts of its column {field.name} are not a list")
        _require(field, column >= -1)
        texts = pa.array(values, pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(column, mask=column < 0), texts).cast(pa.string())
    if pa.types.is_boolean(field.type):
        _require(field, (column >= -1) & (column <= 1))
        return pa.array(column == 1, mask=column < 0)
    if is_list:
        ends = pa.array(np.arange(len(column) + 1) * column.shape[1], pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(column.reshape(-1)), type=field.type)
    return pa.array(column)


def _stored(kind: pa.DataType) -> np.dtype[Any]:
    if pa.types.is_string(kind):
        return np.dtype(np.int32)
    if pa.types.is_boolean(kind) or pa.types.is_list(kind):
        return np.dtype(np.int8)
    return np.dtype(kind.to_pandas_dtype())


def _require(field: pa.Field, holds: NDArray[np.bool_]) -> None:
    if not holds.all():
        raise Damaged(f"its column {field.name} holds a value that it cannot hold")
