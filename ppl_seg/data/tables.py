"""Label tables and value maps from text files, and the table to use where the user gives none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ppl_seg.data import freesurfer
from ppl_seg.data.content import check_present
from ppl_seg.data.labels import Color, LabelEntry, LabelTable, make_entry, parse_color
from ppl_seg.errors import InputError

ENOUGH_FREESURFER_VALUES = 8  # so many of its values occur: the maps are taken for FreeSurfer's


def read_table(path: str | os.PathLike[str]) -> LabelTable:
    """A label table from a TSV (index, name, optional class and color) or FreeSurfer's LUT text.

    Without a class, FreeSurfer names get the built-in one, other names one each. A byte order mark, CRLF and
    BIDS' further columns are accepted. Raises InputError with the line for a duplicate index, a label with
    two classes, a missing column or a bad value.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise InputError(f"{path}: the label table is empty; expected the columns index, name")
    is_lut = _is_int(lines[0][1].split()[0])
    rows = [_lut_row(path, n, line) for n, line in lines] if is_lut else _tsv_rows(path, lines)
    seen: dict[int, tuple[int, LabelEntry]] = {}
    for number, entry in rows:
        if entry.index in seen:
            before, other = seen[entry.index]
            what = "duplicate index"
            if entry.intensity_class != other.intensity_class:
                what = f"two classes ({other.intensity_class}, {entry.intensity_class}) for index"
            raise InputError(f"{path}, line {number}: {what} {entry.index} (first on line {before}); keep one line")
        seen[entry.index] = (number, entry)
    return LabelTable(tuple(entry for _, entry in seen.values()))


def read_value_map(path: str | os.PathLike[str]) -> dict[int, int]:
    """The TSV of `--map` (from, to; 0 drops) as a dict. Raises InputError with the line it can't read."""
    path = Path(path)
    mapping: dict[int, int] = {}
    for number, cells in _records(path, _lines(path), ("from", "to")):
        value = _integer(path, number, "from", cells["from"])
        if value in mapping:
            raise InputError(f"{path}, line {number}: the value {value} is mapped twice; keep one line")
        mapping[value] = _integer(path, number, "to", cells["to"])
    return mapping


def read_groups(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The TSV of `--groups` (index, group): group -> values scored as one. Raises InputError with the line."""
    path = Path(path)
    group_of: dict[int, str] = {}
    for number, cells in _records(path, _lines(path), ("index", "group")):
        index, group = _integer(path, number, "index", cells["index"]), cells["group"]
        if not group:
            raise InputError(f"{path}, line {number}: the group of index {index} is empty")
        if group_of.setdefault(index, group) != group:
            raise InputError(f"{path}, line {number}: index {index} is in {group_of[index]} and in {group}; keep one")
    groups: dict[str, tuple[int, ...]] = {}
    for index, group in group_of.items():
        groups[group] = (*groups.get(group, ()), index)
    return groups


def table_for(
    values: Iterable[int], labels_path: str | os.PathLike[str] | None = None
) -> tuple[LabelTable, dict[int, int], list[str]]:
    """The table for label maps in which `values` occur, them and the background alone: (table, map, messages).

    From `labels_path` where given (InputError for values it lacks); else FreeSurfer's where at least eight
    of its values occur, foreign values with a class each; else label-1, label-2, ... The map brings FreeSurfer's
    parcels (aparc+aseg, wmparc) that the table does not list to the cortex and white matter that it does. The
    messages say what was assumed.
    """
    occurring = sorted({int(value) for value in values} - {0})
    if labels_path is not None:
        table = read_table(labels_path)
        parcels = parcels_map(occurring, dict(zip(table.indices.tolist(), table.names, strict=True)))
        kept = sorted({parcels.get(value, value) for value in occurring})
        table.to_positions(_as_array(kept), labels_path)
        return table.restricted_to(kept).check_names(labels_path), parcels, describe_parcels(parcels)
    known = freesurfer.structures()
    parcels = parcels_map(occurring, {value: name for value, (name, _) in known.items()})
    kept = sorted({parcels.get(value, value) for value in occurring})
    familiar = [value for value in kept if value in known]
    foreign = [value for value in kept if value not in known]
    if len(familiar) < ENOUGH_FREESURFER_VALUES:
        table = LabelTable(tuple(make_entry(value, f"label-{value}") for value in occurring))
        return table, {}, ["no --labels: names label-1, label-2, ... and an intensity class each are assumed"]
    messages = [f"no --labels: FreeSurfer's names and intensity classes are assumed ({len(familiar)} structures)"]
    if foreign:
        listed = ", ".join(map(str, foreign))
        messages.append(f"not among FreeSurfer's values, an intensity class each: {listed}")
    names = {value: known[value][0] if value in known else f"label-{value}" for value in kept}
    table = LabelTable(tuple(make_entry(value, name) for value, name in names.items()))
    return table, parcels, messages + describe_parcels(parcels)


def parcels_map(values: Iterable[int], names: Mapping[int, str]) -> dict[int, int]:
    """For FreeSurfer's parcels among `values` that are not in a table (value -> name): the whole that is there."""
    found: dict[int, int] = {}
    for value in set(values) - names.keys():
        whole = freesurfer.whole_of_parcel(value)
        if whole is not None and whole in names:
            own, theirs = freesurfer.class_of_name(names[whole]), freesurfer.structures()[whole][0]
            if own == freesurfer.class_of_name(theirs):  # the table's 3 is a cortex, too
                found[value] = whole
    return dict(sorted(found.items()))


def describe_parcels(parcels: Mapping[int, int]) -> list[str]:
    """What the user is told of a `parcels_map`."""
    if not parcels:
        return []
    wholes = ", ".join(map(str, sorted(set(parcels.values()))))
    return [
        f"{len(parcels)} cortical and white matter parcels (FreeSurfer's aparc+aseg, wmparc) become aseg's {wholes}; "
        "to keep them, list them with --labels"
    ]


def _as_array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are neither blank nor comments."""
    check_present(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8") from error
    numbered = enumerate(text.splitlines(), start=1)
    return [(number, line) for number, line in numbered if line.strip() and not line.startswith("#")]


def _records(
    path: Path, lines: list[tuple[int, str]], required: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header line: their number and their cells by column."""
    columns = _columns(path, lines, required)
    for number, line in lines[1:]:
        yield number, _cells(path, number, line, columns)


def _columns(path: Path, lines: list[tuple[int, str]], required: tuple[str, ...]) -> list[str]:
    """Column names of the header line, in lower case."""
    number, header = lines[0] if lines else (1, "")
    columns = [name.strip().lower() for name in header.split("\t")]
    missing = [name for name in required if name not in columns]
    if missing:
        raise InputError(
            f"{path}, line {number}: missing column {', '.join(missing)}; expected tab-separated columns "
            f"{', '.join(required)}, found {', '.join(columns)}"
        )
    return columns


def _cells(path: Path, number: int, line: str, columns: list[str]) -> dict[str, str]:
    cells = [cell.strip() for cell in line.split("\t")]
    if len(cells) > len(columns):
        raise InputError(f"{path}, line {number}: {len(cells)} cells for {len(columns)} columns")
    return dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))


def _tsv_rows(path: Path, lines: list[tuple[int, str]]) -> list[tuple[int, LabelEntry]]:
    rows = []
    for number, cells in _records(path, lines, ("index", "name")):
        index = _integer(path, number, "index", cells["index"])
        if not cells["name"]:
            raise InputError(f"{path}, line {number}: the name of index {index} is empty")
        color: Color | None = None
        if cells.get("color", "n/a") not in ("", "n/a"):
            try:
                color = parse_color(cells["color"])
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
        intensity_class = cells.get("class", "")
        rows.append(
            (
                number,
                make_entry(index, cells["name"], "" if intensity_class == "n/a" else intensity_class, color),
            )
        )
    return rows


def _lut_row(path: Path, number: int, line: str) -> tuple[int, LabelEntry]:
    """FreeSurfer's `No. Label-Name R G B A`."""
    cells = line.split()
    if len(cells) not in (5, 6) or not all(_is_int(cell) for cell in [cells[0], *cells[2:]]):
        raise InputError(
            f"{path}, line {number}: expected 'number name R G B A' (FreeSurfer's), found {line.strip()!r}; tables of "
            "another kind begin with a line that names the columns"
        )
    red, green, blue = (_integer(path, number, "colour", cell) for cell in cells[2:5])
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise InputError(f"{path}, line {number}: expected colours of 0 to 255, found {red} {green} {blue}")
    return number, make_entry(_integer(path, number, "number", cells[0]), cells[1], color=(red, green, blue))


def _integer(path: Path, number: int, column: str, text: str) -> int:
    if not _is_int(text):
        raise InputError(f"{path}, line {number}: expected an integer as {column}, found {text!r}")
    if len(text) > 11 or not -(2**31) <= int(text) < 2**31:
        raise InputError(f"{path}, line {number}: expected the {column} to fit 32 bits, found {text[:20]}")
    return int(text)


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
