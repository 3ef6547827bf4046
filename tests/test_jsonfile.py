"""JSON read record by record gives what reading it whole gives, wherever the pieces are cut."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import jsonfile
from pipeline.jsonfile import json_records, parse
from schemas.errors import UserError
from schemas.records import Rejects

BOM = b"\xef\xbb\xbf"
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | st.text(max_size=6)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
objects = st.dictionaries(st.text(max_size=6), values, max_size=4)
chunks = st.integers(1, 50)


def whole(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"))


@contextmanager
def written(name: str, data: bytes, chunk: int) -> Iterator[Path]:
    """A file of these bytes, while files are read in pieces of so many characters."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(jsonfile, "_CHUNK", chunk):
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def encoded(value: Any, indent: int | None, ascii_only: bool, line_end: str) -> bytes:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    return text.replace("\n", line_end).encode()


@given(
    st.lists(objects, max_size=5),
    st.sampled_from([None, 0, 1, 4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    chunks,
)
def test_a_list_read_in_pieces(
    records: list[Any],
    indent: int | None,
    ascii_only: bool,
    mark: bool,
    line_end: str,
    ended: bool,
    chunk: int,
) -> None:
    data = BOM * mark + encoded(records, indent, ascii_only, line_end) + line_end.encode() * ended
    with written("a.json", data, chunk) as path:
        rejects = Rejects()
        read = list(json_records(path, rejects))
        assert [value for _, value in read] == whole(data) == records
        assert [place.read() for place, _ in read] == records
        assert [place.locator for place, _ in read] == [f"record {n + 1}" for n in range(len(records))]
        pieces = [data[place.offset : place.offset + place.size] for place, _ in read]
        assert all(piece[:1] == b"{" and piece[-1:] == b"}" for piece in pieces)
        assert rejects.rows == []


@given(objects, st.sampled_from([None, 2]), st.booleans(), st.booleans(), chunks)
def test_one_object_is_one_record(
    record: dict[str, Any], indent: int | None, ascii_only: bool, mark: bool, chunk: int
) -> None:
    data = BOM * mark + b" \n" + encoded(record, indent, ascii_only, "\r\n")
    with written("a.json", data, chunk) as path:
        [(place, value)] = json_records(path, Rejects())
        assert value == place.read() == record == whole(data)
        assert (place.file, place.locator) == (path, "record 1")


@given(st.lists(objects, min_size=1, max_size=3), st.booleans(), st.data(), chunks)
def test_a_file_that_breaks_off_is_an_error(
    records: list[Any], ascii_only: bool, cuts: st.DataObject, chunk: int
) -> None:
    data = encoded(records, None, ascii_only, "\n")
    cut = cuts.draw(st.integers(0, len(data) - 1))
    with (
        written("a.json", data[:cut], chunk) as path,
        pytest.raises(UserError, match=r"a\.json is not (whole JSON|UTF-8)"),
    ):
        list(json_records(path, Rejects()))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        *('[{"a": 1} {"b": 2}]', '{"a": 1}\n{"b": 2}\n', "[,]", "[{'a': 1}]", "", " \n", "[{]}", "nothing"),
        *('[{"a": 1},]', '[{"a": 1}] x', '[{"a": 1}]\n[{"a": 2}]', "[]]", "[],"),
    ],
)
def test_what_is_not_json_is_an_error(text: str, chunk: int) -> None:
    with written("a.json", text.encode(), chunk) as path, pytest.raises(UserError, match="is not whole JSON"):
        list(json_records(path, Rejects()))


@pytest.mark.parametrize("text", ["[" * 200_000, f"[{'1' * 5000}]"])
def test_what_python_cannot_hold_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json .*take it away"):
        list(json_records(tmp_path / "a.json", Rejects()))


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a": ' * 200_000, "[" * 20_000 + '"\\ud800"' + "]" * 20_000]
)
def test_lists_without_end_spoil_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^lists in lists without end$"):
        parse(text, Rejects())
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{text}\n{{"a": 2}}\n')
    rejects = Rejects()
    assert [value for _, value in json_records(path, rejects)] == [{"a": 1}, {"a": 2}]
    assert [(r.locator, r.reason, r.detail) for r in rejects.rows] == [
        ("row 2", "not JSON", "lists in lists without end")
    ]


@pytest.mark.parametrize("chunk", range(1, 9))
def test_a_name_that_stands_twice_is_told_once(chunk: int) -> None:
    """Also where a record is decoded again as more of it is read."""
    text = '{"a": 1, "b": {"c": 1, "c": 2, "c": 3}, "a": {"d": 4}}'
    for name, data in (("a.json", f"[{text}, {{}}, {text}]"), ("a.jsonl", f"{text}\n{{}}\n{text}\n")):
        with written(name, data.encode(), chunk) as path:
            rejects = Rejects()
            read = list(json_records(path, rejects))
            last = {"a": {"d": 4}, "b": {"c": 3}}
            assert [value for _, value in read] == [place.read() for place, _ in read] == [last, {}, last]
            assert rejects.notes == {
                "objects of JSON files with a name more than once, of which the last counts": 4
            }


@pytest.mark.parametrize("chunk", range(1, 9))
def test_a_list_of_numbers(chunk: int) -> None:
    with written("a.json", b"[1.5, -2e+15,1 , 0.25e-1 ]", chunk) as path:
        read = list(json_records(path, Rejects()))
        assert [value for _, value in read] == [place.read() for place, _ in read] == [1.5, -2e15, 1, 0.025]


@given(st.lists(objects, max_size=5), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines(records: list[Any], ascii_only: bool, mark: bool, line_end: str) -> None:
    lines = [encoded(record, None, ascii_only, line_end) for record in records]
    data = BOM * (mark and bool(lines)) + (2 * line_end).encode().join(lines)
    with written("a.jsonl", data, 10) as path:
        rejects = Rejects()
        read = list(json_records(path, rejects))
        assert [value for _, value in read] == records
        assert [place.read() for place, _ in read] == records
        assert [place.locator for place, _ in read] == [f"row {2 * n + 1}" for n in range(len(records))]
        assert rejects.rows == []


def test_a_broken_line_spoils_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n\n{"a": 2}\n{"a": 3')
    rejects = Rejects()
    read = list(json_records(path, rejects))
    assert [(place.locator, value) for place, value in read] == [("row 1", {"a": 1}), ("row 5", {"a": 2})]
    assert [place.read() for place, _ in read] == [{"a": 1}, {"a": 2}]
    assert [(r.source_file, r.locator, r.reason) for r in rejects.rows] == [
        (str(path), f"row {n}", "not JSON") for n in (2, 3, 6)
    ]
    path.write_bytes(b'[\n{"a": 1},\n')
    with pytest.raises(UserError, match=r"no line of .*a\.jsonl is JSON"):
        list(json_records(path, Rejects()))


@pytest.mark.parametrize(
    "data", [b'[{"a": "\xff"}]', '[{"a": "é"}]'.encode("latin-1"), '[{"a": 1}]'.encode("utf-16")]
)
def test_what_is_not_utf8_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json is not UTF-8"):
        list(json_records(path, Rejects()))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("folder.json", "none.json", "none.jsonl"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            list(json_records(tmp_path / name, Rejects()))
