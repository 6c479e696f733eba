"""From what the user typed (files, folders, globs) to sorted lists of label maps and of scans."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_seg.data.names import EXTENSIONS, is_scan_name, last_word, parse_name
from ppl_seg.errors import InputError

_READABLE = tuple(e for e in EXTENSIONS if e != ".img")  # the .hdr of a pair stands for both
_NEVER_ENTERED = frozenset({"derivatives", "sourcedata", "code"})


@dataclass(frozen=True)
class Found:
    """A subject's file, or its channels' files in order, and the folder given by the user they lie below."""

    paths: tuple[Path, ...]
    base: Path | None = None

    @property
    def path(self) -> Path:
        """The first channel's file, which lends its grid, mask and name."""
        return self.paths[0]


def find_label_maps(inputs: Sequence[str | os.PathLike[str]]) -> list[Found]:
    """Label maps: files as given, `*_dseg` in folders and globs (a glob without any is taken whole). Sorted.

    Raises InputError for what is missing, a folder without label maps, and a file given twice.
    """

    def is_label_map(path: Path) -> bool:
        return last_word(path) == "dseg"

    what = "label maps (*_dseg.nii.gz)"
    found = [file for given in inputs for file in _expand(str(given), is_label_map, what, names_matter=False)]
    return _sorted_once(found, "label maps")


def find_scans(
    inputs: Sequence[str | os.PathLike[str]], suffix: str | None = None, channels: Sequence[str] = ()
) -> list[Found]:
    """Scans: files, folders, globs; `suffix` selects a contrast (`T1w`), `channels` groups several a session.

    Label maps, masks and our own outputs are never taken: passed over in folders and globs, an error where
    named. `a.nii.gz,b.nii.gz` as one argument is one scan of two channels. Sorted by the first channel's
    path.

    Raises InputError for what is missing, a folder without scans, a file given twice, several contrasts where
    neither `suffix` nor `channels` chooses, and for a channel that a session lacks or has twice.
    """
    grouped, single = [], []
    for given in map(str, inputs):
        if "," in given and not os.path.lexists(given):
            grouped.append(Found(tuple(_named_file(Path(part.strip())) for part in given.split(","))))
        else:
            single += _expand(given, is_scan_name, "scans", names_matter=True)
    wanted = tuple(channels) or ((suffix,) if suffix else ())
    if wanted:
        kept = [file for file in single if last_word(file.path) in wanted]
        if single and not kept:
            there = ", ".join(sorted({last_word(file.path) for file in single}))
            raise InputError(f"no scan ends in {' or '.join('_' + w for w in wanted)}; there are: {there}")
        single = kept
    for file in [*single, *grouped]:
        for path in file.paths:
            if not is_scan_name(path):
                raise InputError(f"{path}: a label map, mask or one of our outputs where a scan is expected")
    single = _sorted_once(single, "scans") if single or not grouped else []
    if channels:
        single = _group_channels(single, channels)
    elif not suffix:
        _check_one_contrast(single)
    return _sorted_once(single + grouped, "scans")


def _named_file(path: Path) -> Path:
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file")
    return path


def _expand(given: str, accept: Callable[[Path], bool], what: str, names_matter: bool) -> list[Found]:
    """The files that `given` stands for; those with a name that `accept` refuses are passed over.

    A glob none of whose matches has such a name is taken whole unless `names_matter`.
    """
    path = Path(given)
    if path.is_dir():
        found = [Found((file,), path) for file in _walk(path) if accept(file)]
        if not found:
            raise InputError(f"{path}: no {what} in this folder; give files, a folder or a quoted glob")
        return found
    if os.path.lexists(path):
        return [Found((path,))]
    if glob.has_magic(given):
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        base = Path(*path.parts[:plain])
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        matches = [match for match in matches if match.name.lower().endswith(_READABLE)]
        taken = [match for match in matches if accept(match)] or ([] if names_matter else matches)
        if not taken:
            raise InputError(f"{given}: no {what} match; give files, a folder or a quoted glob")
        return [Found((match,), base) for match in taken]
    raise InputError(f"{path}: no such file or folder")


def _walk(folder: Path) -> list[Path]:
    """Images below `folder`, hidden ones aside; of a raw BIDS dataset only those in anat/."""
    raw = _is_raw_dataset(folder)
    images = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and not (raw and f in _NEVER_ENTERED)]
        if "mri" in folders and os.path.lexists(Path(parent) / "mri" / "orig.mgz"):
            raise InputError(f"{folder}: a FreeSurfer tree; give the files, such as '{folder}/*/mri/orig.mgz'")
        if not raw or Path(parent).name == "anat":
            images += [Path(parent) / f for f in files if not f.startswith(".") and f.lower().endswith(_READABLE)]
    return images


def _is_raw_dataset(folder: Path) -> bool:
    try:
        description = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'dataset_description.json'}: cannot be read ({error})") from error
    return not (isinstance(description, dict) and description.get("DatasetType") == "derivative")


def _sorted_once(found: Sequence[Found], what: str) -> list[Found]:
    if not found:
        raise InputError(f"no {what} given; give files, a folder or a quoted glob")
    seen: dict[str, Path] = {}
    for path in (path for file in found for path in file.paths):
        real = os.path.realpath(path)
        if real in seen:
            same = f" ({seen[real]})" if seen[real] != path else ""
            raise InputError(f"{path}: given twice{same}; name each file once")
        seen[real] = path
    return sorted(found, key=lambda file: str(file.path))


def _check_one_contrast(scans: Sequence[Found]) -> None:
    contrasts = Counter(name.suffix for name in (parse_name(scan.path) for scan in scans) if name.suffix)
    if len(contrasts) > 1:
        listed = ", ".join(f"{contrast} ({count})" for contrast, count in sorted(contrasts.items()))
        raise InputError(f"several contrasts among the scans: {listed}; choose one with --suffix")


def _group_channels(scans: Sequence[Found], channels: Sequence[str]) -> list[Found]:
    """One `Found` per subject and session, with a file for each of `channels`."""
    sessions: dict[tuple[str, str | None], dict[str, list[Found]]] = {}
    for scan in scans:
        entities = parse_name(scan.path).entities
        if not entities:
            raise InputError(f"{scan.path}: not a BIDS name, so --channels cannot group it; give a,b as one argument")
        session = sessions.setdefault((entities["sub"], entities.get("ses")), {})
        session.setdefault(last_word(scan.path), []).append(scan)
    grouped = []
    for (sub, ses), files in sessions.items():
        label = f"sub-{sub}" + (f" ses-{ses}" if ses else "")
        for channel in channels:
            candidates = [str(scan.path) for scan in files.get(channel, [])]
            if len(candidates) != 1:
                found = ", ".join(candidates) or "none"
                raise InputError(f"{label}: expected one {channel} scan, found {found}; name the files, a,b as one")
        first = files[channels[0]][0]
        grouped.append(Found(tuple(files[channel][0].path for channel in channels), first.base))
    return grouped
