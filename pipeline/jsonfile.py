"""JSON files record by record, so that memory does not grow with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from schemas.errors import UserError
from schemas.records import Rejects

_CHUNK = 1 << 20  # characters read at once; a record may be longer
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_GAP = re.compile(r"[ \t\r\n]*")
_PARTIAL = 16  # characters at the end of a chunk that may be half a number, a literal or an escape


class Place(NamedTuple):
    """Where a record lies: ``size`` bytes from ``offset`` on; ``locator`` is how people find it."""

    file: Path
    locator: str
    offset: int
    size: int

    def read(self) -> Any:
        """The record, read again."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return parse(file.read(self.size).decode(), Rejects())  # noted when its place was found


def json_records(path: Path, rejects: Rejects) -> Iterator[tuple[Place, Any]]:
    """The records of a file with their places: the lines of a ``.jsonl``, the elements of a list, or the one value.

    A line that is not JSON is a reject, as lines are whole by themselves; a file that breaks off is not read.

    Raises:
        UserError: the file cannot be read, or is not whole JSON.
    """
    try:
        yield from (_lines if path.suffix == ".jsonl" else _values)(path, rejects)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); fetch it again or take it away") from None
    except (RecursionError, ValueError) as error:  # lists in lists without end, an integer of 5,000 digits
        raise UserError(f"{path} cannot be read ({error}); fetch it again or take it away") from None


def parse(text: str, rejects: Rejects) -> Any:
    """A JSON value. Half a surrogate pair, which no table can hold, becomes U+FFFD, and a note; of what stands in an
    object under one name more than once the last counts, and a note tells of it.

    Raises:
        ValueError: the text is not JSON.
    """
    decoder = _Decoder()
    try:
        return _mended(decoder.decode(text), text, decoder, rejects)
    except RecursionError:
        raise ValueError("lists in lists without end") from None


class _Decoder(json.JSONDecoder):
    """Tells of the value that it decoded last how many of its objects have a name more than once."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeating = 0

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.repeating = 0
        return super().raw_decode(s, idx)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self.repeating += len(found) < len(pairs)
        return found


def _mended(value: Any, text: str, decoder: _Decoder, rejects: Rejects) -> Any:
    if decoder.repeating:
        rejects.notes["objects of JSON files with a name more than once, of which the last counts"] += (
            decoder.repeating
        )
    return _without_halves(value, rejects) if _ESCAPED_HALF.search(text) else value


def _without_halves(value: Any, rejects: Rejects) -> Any:
    if isinstance(value, str):
        if not _HALF.search(value):
            return value
        rejects.notes["texts of JSON files with half a surrogate pair, which is now U+FFFD"] += 1
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_halves(item, rejects) for item in value]
    if isinstance(value, dict):
        return {_without_halves(key, rejects): _without_halves(item, rejects) for key, item in value.items()}
    return value


def _lines(path: Path, rejects: Rejects) -> Iterator[tuple[Place, Any]]:
    offset, whole, broken = 0, 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                value = parse(line.decode("utf-8-sig"), rejects)
            except ValueError as error:
                rejects.add(path, f"row {number}", "not JSON", error)
                broken += 1
                continue
            mark = 3 if line.startswith(b"\xef\xbb\xbf") else 0
            yield Place(path, f"row {number}", start + mark, len(line) - mark), value
            whole += 1
    if broken and not whole:
        raise UserError(f"no line of {path} is JSON; fetch it again or take it away")


def _values(path: Path, rejects: Rejects) -> Iterator[tuple[Place, Any]]:
    decoder = _Decoder()
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(_CHUNK)
        while not text.strip("\ufeff \t\r\n") and (more := file.read(_CHUNK)):
            text += more
        at = 1 if text.startswith("\ufeff") else 0
        offset = 3 * at  # bytes before text[at]
        at, offset = _skip_gap(text, at, offset)
        is_list, closed, first, number = text[at : at + 1] == "[", False, True, 0
        if is_list:
            at, offset = at + 1, offset + 1
        while True:
            at, offset = _skip_gap(text, at, offset)
            if at == len(text) and (more := file.read(_CHUNK)):
                text, at = more, 0
                continue
            mark = text[at : at + 1]
            if not mark and (closed if is_list else number):
                return
            if is_list and not closed and mark == "]" and (not first or number == 0):
                at, offset, closed, first = at + 1, offset + 1, True, False
                continue
            if is_list and not closed and mark == "," and not first:
                at, offset, first = at + 1, offset + 1, True
                continue
            number += 1
            value, end, text, at = _value(path, file, decoder, text, at, number, follows=first)
            raw = text[at:end]
            size = len(raw.encode())
            yield Place(path, f"record {number}", offset, size), _mended(value, raw, decoder, rejects)
            at, offset, first = end, offset + size, False


def _skip_gap(text: str, at: int, offset: int) -> tuple[int, int]:
    end = _GAP.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string too
    return end, offset + end - at


def _value(
    path: Path, file: Any, decoder: _Decoder, text: str, at: int, number: int, follows: bool
) -> tuple[Any, int, str, int]:
    """Decode the value that begins at ``text[at]``, reading on while it is not all there."""
    while True:
        try:
            if not follows:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            value, end = decoder.raw_decode(text, at)
            if end < len(text) - _PARTIAL or not (more := file.read(_CHUNK)):
                return value, end, text, at
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos >= len(text) - _PARTIAL
            more = file.read(max(_CHUNK, len(text) - at)) if cut else ""
            if not more:
                hint = ", or name it .jsonl if each line is a record" if number == 2 else ""
                raise UserError(
                    f"{path} is not whole JSON (record {number}: {error.msg}); fetch it again{hint}"
                ) from None
        text, at = text[at:] + more, 0
