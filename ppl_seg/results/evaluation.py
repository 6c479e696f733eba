"""Segmentations against true label maps: which belongs to which, scores of each pair, means over persons."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppl_seg.data import freesurfer
from ppl_seg.data.cohort import Found, find_label_maps
from ppl_seg.data.images import Image, check_same_grid, read_label_map
from ppl_seg.data.names import freesurfer_subject, match_files, parse_name
from ppl_seg.data.tables import describe_parcels, parcels_map, read_groups, read_table, table_for
from ppl_seg.errors import InputError
from ppl_seg.results.dataset import TABLE
from ppl_seg.results.metrics import COLUMNS, evaluate_pair, structures_of_table, summary_rows
from ppl_seg.results.tables import format_cell, write_table
from ppl_seg.results.tables import read_table as read_tsv

PathLike = str | os.PathLike[str]
Structures = dict[str, tuple[int, ...]]
ROW_COLUMNS = ("scan", "truth", "person", *COLUMNS)
_SUBJECT = re.compile(r"sub-[a-zA-Z0-9+]+")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        rows: one for each pair of files and structure (ROW_COLUMNS); `scan` and `truth` are the files' paths
            below the folders given.
        summary: one row a structure, `mean` over structures last: means over scans and 95 % bootstrap
            intervals over persons (`dice`, `dice_low`, `dice_high`, the same for hd95_mm and asd_mm, `scans`,
            `missed`).
        unmatched: files of either side without a counterpart.
        messages: what was assumed, one line each.
    """

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    unmatched: list[Path] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where files were left without a counterpart, else 0."""
        return int(bool(self.unmatched))


def evaluate(
    segmentations: PathLike | Sequence[PathLike],
    truth: PathLike | Sequence[PathLike],
    labels: PathLike | None = None,
    groups: PathLike | None = None,
    out: PathLike | None = None,
    force: bool = False,
) -> Evaluation:
    """Score label maps against the truth: Dice, surface distances in mm, volumes in mm³.

    Args:
        segmentations, truth: files, folders (their `*_dseg`) or globs, matched by shared BIDS entities, other
            names by their path below the folder.
        labels: label table that names the structures; by default the one beside the segmentations, else as
            for a prior without a table. Structures that occur in no file are left out.
        groups: TSV (index, group) of structures to score as one, instead of the single labels.
        out: TSV for the rows; one with other content is replaced with `force` only.

    Raises:
        InputError: nothing matches, a file that is no label map, a pair on different grids, a bad table.
    """
    if out is not None and Path(out).is_dir():
        raise InputError(f"{out}: a folder; give a file for the table, such as {Path(out) / 'scores.tsv'}")
    found, true = find_label_maps(segmentations), find_label_maps(truth)
    pairs, alone, unused = match_files(_with_base(found), _with_base(true))
    if not pairs:
        raise InputError(
            f"no segmentation matches a true label map ({found[0].path} and {true[0].path}, for example); "
            "names match by shared BIDS entities (sub-, ses-, ...), others by their path below the folder"
        )
    inputs = [*(file.path for file in (*found, *true)), *(table for table in (labels, groups) if table is not None)]
    if out is not None and os.path.realpath(out) in [os.path.realpath(path) for path in inputs]:
        raise InputError(f"{out}: is an input; give another file for the table")
    values, warnings = _check(pairs)
    structures, messages = _structures(values, [file.base for file in found], labels, groups)
    names = _names(found) | _names(true)
    rows = [row for pair in pairs for row in _score(pair, names, structures)]
    person_of = {str(row["scan"]): str(row["person"]) for row in rows}
    times = Counter(path for _, path in pairs)
    if several := [path for path, count in times.items() if count > 1]:
        shared = sum(times[path] for path in several)
        warnings.append(f"{shared} segmentations share {len(several)} true label maps, {several[0]} for one")
    evaluation = Evaluation(rows, summary_rows(rows, person_of.__getitem__), [*alone, *unused], [*warnings, *messages])
    if out is not None:
        _write(Path(out), rows, force)
    return evaluation


def _with_base(found: Sequence[Found]) -> list[tuple[Path, Path | None]]:
    return [(file.path, file.base) for file in found]


def _read(pair: tuple[Path, Path]) -> tuple[Image, Image]:
    return read_label_map(pair[0], empty_ok=True), read_label_map(pair[1], empty_ok=True)


def _check(pairs: Sequence[tuple[Path, Path]]) -> tuple[list[int], list[str]]:
    """The label values that occur, and what is odd, once all pairs are known to be two files on one grid."""
    values: set[int] = set()
    warnings: list[str] = []
    for pair in pairs:
        if os.path.samefile(*pair):
            raise InputError(f"{pair[0]}: given as segmentation and as truth; give two folders")
        images = _read(pair)
        check_same_grid(images[::-1], "evaluate in the scan's own voxels, or resample one of them")
        for image in images:
            values.update(np.unique(image.data).tolist())
            warnings += image.warnings
    return sorted(values - {0}), list(dict.fromkeys(warnings))


def _structures(
    values: Sequence[int], bases: Sequence[Path | None], labels: PathLike | None, groups: PathLike | None
) -> tuple[Structures, list[str]]:
    """What is scored, and what was assumed."""
    messages: list[str] = []
    beside = [base / TABLE for base in dict.fromkeys(bases) if base and (base / TABLE).is_file()]
    source = groups or labels or next(iter(beside), None)
    if groups is not None:
        structures: Structures = read_groups(groups)
        known = freesurfer.structures()
        parcels = parcels_map(values, {v: known.get(v, ("",))[0] for members in structures.values() for v in members})
    elif source is not None:
        table = read_table(source)
        parcels = parcels_map(values, dict(zip(table.indices.tolist(), table.names, strict=True)))
        table = table.restricted_to([*values, *parcels.values()]).check_names(source)
        structures = structures_of_table(table)
        messages += [f"structures are named by {source}"] if labels is None else []
    else:
        table, parcels, messages = table_for(values)
        structures = structures_of_table(table)
    if source is not None:
        messages += describe_parcels(parcels)
    structures = {
        name: (*members, *(parcel for parcel, whole in parcels.items() if whole in members))
        for name, members in structures.items()
    }
    scored = {value for members in structures.values() for value in members}
    if not scored & set(values):
        raise InputError(f"{source}: none of its structures occurs in the files, which hold {_listed(values)}")
    if foreign := [value for value in values if value not in scored]:
        messages.append(f"{source}: values {_listed(foreign)} are not in it; they are not scored")
    return structures, messages


def _score(pair: tuple[Path, Path], names: Mapping[Path, str], structures: Structures) -> list[dict[str, Any]]:
    segmentation, truth = _read(pair)
    scan, true = names[pair[0]], names[pair[1]]
    about = {"scan": scan, "truth": true, "person": _person(scan, true)}
    scores = evaluate_pair(segmentation.data, truth.data, truth.affine, structures)
    return [{**about, **row} for row in scores]


def _names(found: Sequence[Found]) -> dict[Path, str]:
    """The path below the folder given; the whole path where that names two files, or a file stood alone."""
    short = {f.path: (f.path.relative_to(f.base) if f.base else f.path).as_posix() for f in found}
    times = Counter(short.values())
    return {path: name if times[name] == 1 else path.as_posix() for path, name in short.items()}


def _person(scan: str, truth: str) -> str:
    """`sub-01` of the name, FreeSurfer's subject, or `sub-01` of a folder; the scan where nothing names a person."""
    for name in (scan, truth):
        if subject := parse_name(name).entities.get("sub"):
            return f"sub-{subject}"
    if subject := freesurfer_subject(truth) or freesurfer_subject(scan):
        return subject
    folders = [part for name in (scan, truth) for part in Path(name).parent.parts]
    return next((part for part in folders if _SUBJECT.fullmatch(part)), scan)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], force: bool) -> None:
    if path.exists() and not force:
        text = [{name: format_cell(row[name]) for name in ROW_COLUMNS} for row in rows]
        if read_tsv(path) != text:
            raise InputError(f"{path}: is there and holds something else; --force replaces it")
    write_table(path, rows, ROW_COLUMNS)


def _listed(values: Sequence[int], most: int = 12) -> str:
    text = ", ".join(map(str, values[:most]))
    return text + (f", ... ({len(values)} in all)" if len(values) > most else "")
