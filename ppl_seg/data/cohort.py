"""From what the user typed (files, folders, globs) to sorted lists of label maps, scans and masks."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_seg.data.content import is_annexed
from ppl_seg.data.folders import READABLE, images_in, is_raw_dataset, taken_subject
from ppl_seg.data.names import freesurfer_subject, is_scan_name, last_word, output_location, parse_name, person_of
from ppl_seg.errors import InputError

LABEL_VOLUME, SCAN_VOLUME, MASK_VOLUME = "aseg", "orig", "brainmask"  # of FreeSurfer's subjects
Given = str | os.PathLike[str]
_CONTRAST = re.compile(r"(T1|T2|PD|T2star)w?|FLAIR|SWI|DWI|MPRAGE|t1|t2|pd|flair|swi|dwi|mprage")  # of plain names


@dataclass(frozen=True)
class Found:
    """A subject's file, or its channels' files in order, and the folder given by the user they lie below."""

    paths: tuple[Path, ...]
    base: Path | None = None

    @property
    def path(self) -> Path:
        """The first channel's file, which lends its grid, mask and name."""
        return self.paths[0]

    @property
    def contrasts(self) -> tuple[str, ...]:
        """The channels' suffixes where there are several, for the name of what is made from them."""
        words = tuple("".join(filter(str.isalnum, last_word(path))) for path in self.paths)
        return words if len(words) > 1 else ()


@dataclass(frozen=True)
class Selection:
    """Participants and sessions to take, with or without `sub-`, `ses-`; none given: all."""

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()

    def of(self, found: Sequence[Found]) -> list[Found]:
        """Those of `found` that are wanted. InputError for a participant or session that nobody has."""
        kept = list(found)
        for what, entity, wanted in (
            ("participant", "sub", {label.removeprefix("sub-") for label in self.participants}),
            ("session", "ses", {label.removeprefix("ses-") for label in self.sessions}),
        ):
            if not wanted:
                continue
            labels = [_label(file.path, entity) for file in kept]
            if absent := sorted(wanted - set(labels)):
                there = ", ".join(sorted({label for label in labels if label})) or "none"
                raise InputError(f"--{what}-label {', '.join(absent)}: no such {what}; there are: {there}")
            kept = [file for file, label in zip(kept, labels, strict=True) if label in wanted]
        return kept


EVERYBODY = Selection()


def find_label_maps(inputs: Given | Sequence[Given], selection: Selection = EVERYBODY) -> list[Found]:
    """Label maps: files as given, `*_dseg` in folders and globs (a glob without any is taken whole). Sorted.

    Of FreeSurfer's subjects mri/aseg.mgz. Raises InputError for what is missing, a folder without label maps, and a
    file given twice.
    """

    def is_label_map(path: Path) -> bool:
        return last_word(path) == "dseg" or (freesurfer_subject(path) is not None and not is_scan_name(path))

    what = "label maps (*_dseg.nii.gz)"
    found = [
        file
        for given in _several(inputs)
        for file in _expand(os.fspath(given), is_label_map, what, (LABEL_VOLUME,), names_matter=False)
    ]
    return _sorted_once(selection.of(found), "label maps")


def find_scans(
    inputs: Given | Sequence[Given],
    suffix: str | None = None,
    channels: str | Sequence[str] = (),
    selection: Selection = EVERYBODY,
) -> list[Found]:
    """Scans: files, folders, globs; `suffix` selects a contrast (`T1w`), `channels` groups several a session.

    Label maps, masks and our own outputs are never taken: passed over in folders and globs, an error where
    named. Of FreeSurfer's subjects mri/orig.mgz, or the volumes that suffix or channels name. `a.nii.gz,b.nii.gz` as
    one argument is one scan of two channels. Sorted by the first channel's path.

    Raises InputError for what is missing, a folder without scans, a file given twice, several contrasts where
    neither `suffix` nor `channels` chooses, and for a channel that a session lacks or has twice.
    """
    channels = (channels,) if isinstance(channels, str) else channels
    if suffix and channels:
        raise InputError(f"--suffix {suffix} and --channels {','.join(channels)}: give one of the two")
    wanted = tuple(channels) or ((suffix,) if suffix else ())
    grouped, single = [], []
    for given in (os.fspath(one) for one in _several(inputs)):
        if "," in given and not os.path.lexists(given):
            grouped.append(Found(tuple(_named_file(Path(part.strip())) for part in given.split(","))))
        else:
            single += _expand(given, is_scan_name, "scans", wanted or (SCAN_VOLUME,), names_matter=True)
    if wanted:
        kept = [file for file in single if last_word(file.path) in wanted]
        if single and not kept:
            there = ", ".join(sorted({last_word(file.path) for file in single}))
            raise InputError(f"no scan ends in {' or '.join('_' + w for w in wanted)}; there are: {there}")
        single = kept
    single, grouped = _split(selection.of(_below_one_folder([*single, *grouped])))
    for file in [*single, *grouped]:
        for path in file.paths:
            if not is_scan_name(path):
                raise InputError(f"{path}: a label map, mask or one of our outputs where a scan is expected")
    single = _sorted_once(single, "scans") if single or not grouped else []
    if channels:
        single = _group_channels(single, channels)
    elif not suffix:
        _check_one_contrast(single)
    scans = _sorted_once(single + grouped, "scans")
    for scan in scans:
        if len(scan.paths) != len(scans[0].paths):
            raise InputError(
                f"{scan.path}: {len(scan.paths)} channels, {scans[0].path} has {len(scans[0].paths)}; give all scans "
                "the same channels"
            )
    return scans


def find_masks(given: Given) -> list[Found]:
    """Masks: a file, `*_mask` in a folder or glob (where there are none, all images). InputError for no mask."""
    given = os.fspath(given)
    if not Path(given).is_dir():
        return _expand(given, lambda path: last_word(path) == "mask", "masks", (), names_matter=False)
    images = images_in(Path(given), (MASK_VOLUME,))
    named = [path for path in images if last_word(path) in ("mask", MASK_VOLUME)]
    if not images:
        raise InputError(f"{given}: no masks (*_mask.nii.gz) in this folder; give one with masks, auto or none")
    return [Found((path,), Path(given)) for path in named or images]


def check_channels(found: Sequence[Found], channels: int) -> None:
    """Raises InputError where a scan has not as many `channels` as the model."""
    if other := [scan for scan in found if len(scan.paths) != channels]:
        raise InputError(
            f"{other[0].path}: the model was fitted to scans of {channels} channels; found {len(other[0].paths)}; "
            "see --channels"
        )


def check_output_apart(found: Sequence[Found], out: Given | None, others: Sequence[Given] = ()) -> None:
    """Raises InputError where `out` is a folder that inputs were found in, or one of `others`: before any work."""
    if out is None:
        return
    place = os.path.realpath(out)
    if place in map(os.path.realpath, others):
        raise InputError(f"{os.fspath(out)}: the output folder is an input, too; choose another --out")
    for file in found:
        folders = [path.parent for path in file.paths] + ([file.base] if file.base is not None else [])
        if place in map(os.path.realpath, folders):
            raise InputError(f"{os.fspath(out)}: the output folder is a folder of inputs; choose another --out")


def _several(inputs: Given | Sequence[Given]) -> Sequence[Given]:
    """A single path is a list of one."""
    return [inputs] if isinstance(inputs, str | os.PathLike) else inputs


def _label(path: Path, entity: str) -> str | None:
    return person_of(path) if entity == "sub" else parse_name(path).entities.get(entity)


def _split(found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    return [file for file in found if len(file.paths) == 1], [file for file in found if len(file.paths) > 1]


def _below_one_folder(found: Sequence[Found]) -> list[Found]:
    """Files that were named one by one, s1/T1.nii.gz s2/T1.nii.gz, told apart by their paths where names do not."""
    alone = [file for file in found if file.base is None]
    names = Counter(output_location(file.path, contrasts=file.contrasts) for file in alone)
    if max(names.values(), default=1) == 1 or len({_identity(file.path) for file in alone}) < len(alone):
        return list(found)
    common = Path(os.path.commonpath([os.path.abspath(file.path.parent) for file in alone]))
    return [
        file if file.base is not None else Found(tuple(common / os.path.relpath(p, common) for p in file.paths), common)
        for file in found
    ]


def _named_file(path: Path) -> Path:
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file")
    return path


def _expand(
    given: str, accept: Callable[[Path], bool], what: str, volumes: Sequence[str], names_matter: bool
) -> list[Found]:
    """The files that `given` stands for; those with a name that `accept` refuses are passed over.

    A glob none of whose matches has such a name is taken whole unless `names_matter`.
    """
    path = Path(given)
    if path.is_dir():
        found = [Found((file,), path) for file in images_in(path, volumes) if accept(file)]
        if not found:
            derived = is_raw_dataset(path) and (path / "derivatives").is_dir()
            hint = "its derivatives are not looked at, give their folder" if derived else "give files or a quoted glob"
            raise InputError(f"{path}: no {what} in this folder; {hint}")
        return found
    if os.path.lexists(path):
        return [Found((path,))]
    if glob.has_magic(given):
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        base = Path(*path.parts[:plain])
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        matches = [match for match in matches if match.name.lower().endswith(READABLE) and taken_subject(match)]
        taken = [match for match in matches if accept(match)] or ([] if names_matter else matches)
        if not taken:
            raise InputError(f"{given}: no {what} match; give files, a folder or a quoted glob")
        return [Found((match,), base) for match in taken]
    raise InputError(f"{path}: no such file or folder")


def _sorted_once(found: Sequence[Found], what: str) -> list[Found]:
    if not found:
        raise InputError(f"no {what} given; give files, a folder or a quoted glob")
    seen: dict[str, Path] = {}
    for path in (path for file in found for path in file.paths):
        real = _identity(path)
        if real in seen:
            same = f" ({seen[real]})" if seen[real] != path else ""
            raise InputError(f"{path}: given twice{same}; name each file once")
        seen[real] = path
    return sorted(found, key=lambda file: str(file.path))


def _identity(path: Path) -> str:
    """The file behind links and behind either name of a pair; a git-annex keeps equal files as one, they stay two."""
    for pair in (".img", ".img.gz"):
        if path.name.lower().endswith(pair):
            path = path.with_name(path.name[: -len(pair)] + ".hdr")
    return os.path.abspath(path) if is_annexed(path) else os.path.realpath(path)


def _check_one_contrast(scans: Sequence[Found]) -> None:
    contrasts = Counter(
        last_word(scan.path)
        for scan in scans
        if parse_name(scan.path).suffix or freesurfer_subject(scan.path) or _CONTRAST.fullmatch(last_word(scan.path))
    )
    if len(contrasts) > 1:
        listed = ", ".join(f"{contrast} ({count})" for contrast, count in sorted(contrasts.items()))
        raise InputError(f"several contrasts among the scans: {listed}; choose one with --suffix")


def _group_channels(scans: Sequence[Found], channels: Sequence[str]) -> list[Found]:
    """One `Found` per subject and session, with a file for each of `channels`."""
    sessions: dict[tuple[str, str | None], dict[str, list[Found]]] = {}
    for scan in scans:
        person = person_of(scan.path)
        if person is None:
            raise InputError(f"{scan.path}: not a BIDS name, so --channels cannot group it; give a,b as one argument")
        session = sessions.setdefault((person, _label(scan.path, "ses")), {})
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
