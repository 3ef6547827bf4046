"""Tables in text files as corpora ship them: comma or tab separated, from many hands."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from schemas.errors import UserError
from schemas.records import Rejects


def table_rows(path: Path, delimiter: str, columns: int, rejects: Rejects) -> Iterator[tuple[int, list[str]]]:
    """Rows with their numbers, which count the header and blank lines too, as an editor shows them.

    A byte order mark, line ends, quotes and blanks around cells are taken off. Each line is read alone, so
    that a stray quote spoils one row and not the rest of the file.

    Args:
        columns: a row with fewer is a reject.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                    row = next(csv.reader([text], delimiter=delimiter, strict=True), [])
                except (UnicodeDecodeError, csv.Error) as error:
                    rejects.add(path, f"row {number}", "unreadable row", error)
                    continue
                cells = [cell.strip() for cell in row]
                if len(cells) >= columns:
                    yield number, cells
                elif any(cells):
                    rejects.add(path, f"row {number}", "too few columns", f"{len(cells)} of {columns}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def named_rows(
    path: Path, delimiter: str, needed: Collection[str], rejects: Rejects
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table with a header, as `table_rows`, by the names of their columns.

    Args:
        needed: columns it must have; it may have more.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    rows = table_rows(path, delimiter, 1, rejects)
    number, header = next(rows, (0, []))
    for column in needed:
        if column not in header:
            found = f"its first row is {delimiter.join(header)[:80]!r}" if number else "it is empty"
            if any(row.source_file == str(path) and row.reason == "unreadable row" for row in rejects.rows):
                found = "its first row cannot be read as UTF-8"
            raise UserError(f"{path} has no column {column!r}: {found}; fetch the file again")
    for number, cells in rows:
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            reason = "too few columns" if len(cells) < len(header) else "too many columns"
            rejects.add(path, f"row {number}", reason, f"{len(cells)} of {len(header)}")
