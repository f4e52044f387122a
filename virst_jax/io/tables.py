"""Tables that people write: CSV, also with semicolons or tabs, as spreadsheets save it."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from virst_jax.errors import UserError
from virst_jax.io.regular import read_text


def read_table(file: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table, each with its line's number, and texts by column without spaces around them.

    Args:
      columns: what it may have, for messages.
      needed: the columns that it must have.

    Raises:
      UserError: there is no such file, it is no table in UTF-8, or it lacks a column.
    """
    text = read_text(file, f"save it as CSV in UTF-8, with the columns {', '.join(columns)}")
    first = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    rows.fieldnames = found = [str(column).strip() for column in rows.fieldnames or ()]
    if not set(needed) <= set(found):
        shown = ", ".join(found)[:80] or "nothing"
        raise UserError(f"{file}: the first line has {shown}; it must name the columns {', '.join(columns)}")
    return _rows(rows, file)


def _rows(rows: "csv.DictReader[str]", file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        for row in rows:
            yield rows.line_num, {key: (row.get(key) or "").strip() for key in rows.fieldnames or ()}
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: is no CSV ({error}); save it again") from error
