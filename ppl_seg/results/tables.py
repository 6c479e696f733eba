"""Tab-separated tables, as BIDS has them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ppl_seg.errors import InputError
from ppl_seg.files import write_text

Cell = str | float | int | bool | None
Row = dict[str, Cell]


def format_cell(value: Cell) -> str:
    """Text of one cell: four decimals, NaN empty, None `n/a` (BIDS), true/false."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return str(value)


def write_table(path: str | Path, rows: Iterable[Mapping[str, Cell]], columns: Sequence[str] | None = None) -> None:
    """Write `rows` as TSV, whole or not at all; `columns` default to the keys in order of appearance."""
    write_text(path, table_text(rows, columns))


def table_text(rows: Iterable[Mapping[str, Cell]], columns: Sequence[str] | None = None) -> str:
    """`rows` as TSV; `columns` default to the keys in order of appearance."""
    rows = list(rows)
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(names)
    writer.writerows([format_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def read_table(path: str | Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a TSV file (byte order mark and CRLF accepted).

    Raises:
        InputError: the file cannot be read, or lacks a column of `required`.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
            found = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the table {path}: {error}; expected tab-separated text") from error
    missing = [name for name in required if name not in found]
    if missing:
        raise InputError(
            f"{path}: expected the columns {', '.join(required)}, found {', '.join(found) or 'none'}; "
            "add the missing ones, separated by tabs"
        )
    return rows
