"""File names: BIDS entities in, output folders and stems out, and which file belongs to which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_seg.errors import InputError

EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh.gz", ".mgh", ".hdr.gz", ".hdr", ".img.gz", ".img")
OUR_SEGMENTATION = "ppl"  # the value of `seg-` in what we write
NOT_SCANS = frozenset({"dseg", "probseg", "mask", "defacemask", "roi", "entropy", "draws", "aseg", "wmparc", "ribbon"})
_ENTITY = re.compile(r"([a-zA-Z]+)-([a-zA-Z0-9+]+)")
_AFTER_SEG = ("res", "den", "label", "desc")  # the order of entities in BIDS: ..., seg, res, den, label, desc
_SAY_NOTHING_OF_THE_SOURCE = frozenset({"seg", "desc", "label"})


@dataclass(frozen=True)
class Name:
    """A file name taken apart. `suffix` is None and `entities` empty where the name is not BIDS."""

    stem: str
    entities: dict[str, str]
    suffix: str | None
    extension: str


def parse_name(path: Path | str) -> Name:
    """Entities, suffix and extension of `sub-01_ses-1_T1w.nii.gz`; other names are a mere stem.

    A volume of FreeSurfer has its subject's entities, `sub-01_ses-1/mri/orig.mgz` for one.
    """
    name = Path(path).name
    extension = next((e for e in EXTENSIONS if name.lower().endswith(e)), Path(name).suffix)
    stem = name[: len(name) - len(extension)]
    *parts, suffix = stem.split("_")
    if entities := _entities(parts):
        return Name(stem, entities, suffix, extension) if suffix.isalnum() else Name(stem, {}, None, extension)
    entities = _entities((freesurfer_subject(path) or "").split("_"))
    return Name(stem, entities, stem if entities else None, extension)


def freesurfer_subject(path: Path | str) -> str | None:
    """Folder name of the subject whose mri/ folder holds this .mgz; None of other files."""
    path = Path(path).absolute()
    return path.parent.parent.name if path.parent.name == "mri" and path.suffix.lower() in (".mgz", ".mgh") else None


def person_of(path: Path | str) -> str | None:
    """The `sub-` entity, or FreeSurfer's subject; None where the name says neither."""
    return parse_name(path).entities.get("sub") or freesurfer_subject(path)


def _entities(parts: Sequence[str]) -> dict[str, str]:
    """`sub-01`, `ses-1` as a dict; empty where a part is no entity or none is `sub`."""
    matches = [_ENTITY.fullmatch(part) for part in parts]
    entities = {m[1]: m[2] for m in matches if m}
    return entities if all(matches) and "sub" in entities else {}


def last_word(path: Path | str) -> str:
    """What follows the last underscore of the stem: the BIDS suffix, and for other names often the same."""
    return parse_name(path).stem.rsplit("_", 1)[-1]


def is_scan_name(path: Path | str) -> bool:
    """False for names of label maps, masks, probabilities and our own outputs."""
    last = last_word(path)
    known = last in NOT_SCANS or last.endswith("+aseg")
    return not known and parse_name(path).entities.get("seg") != OUR_SEGMENTATION


def output_location(
    path: Path | str, base: Path | str | None = None, contrasts: Sequence[str] = ()
) -> tuple[Path, str]:
    """Folder below the output folder, and stem, of a scan's outputs.

    `sub-01_ses-1_T1w.nii.gz` gives `sub-01/ses-1/anat`, `sub-01_ses-1_seg-ppl_desc-T1w`; `contrasts` are the
    channels' suffixes where there are several (`desc-T1wFLAIR`). A name that is not BIDS keeps its path below
    `base` (the folder the user gave; None: no folder), and its stem; FreeSurfer's subject is always part of it.
    """
    path = Path(path)
    name = parse_name(path)
    if name.suffix is None:
        folder, subject = (path.parent.relative_to(base) if base is not None else Path()), freesurfer_subject(path)
        return (Path(subject, "mri") if subject and subject not in folder.parts else folder), name.stem
    folder = Path(f"sub-{name.entities['sub']}")
    if "ses" in name.entities:
        folder /= f"ses-{name.entities['ses']}"
    kept = {key: value for key, value in name.entities.items() if key not in ("seg", *_AFTER_SEG)}
    kept["seg"] = OUR_SEGMENTATION
    kept |= {key: name.entities[key] for key in _AFTER_SEG if key in name.entities}
    kept["desc"] = name.entities.get("desc", "") + ("".join(contrasts) or name.suffix)
    return folder / "anat", "_".join(f"{key}-{value}" for key, value in kept.items())


def counterparts(
    files: Sequence[tuple[Path, Path | None]], others: Sequence[tuple[Path, Path | None]]
) -> list[list[Path]]:
    """For each of `files` those of `others` that belong to it; each with the folder it was found under, or None.

    BIDS names match by shared entities, volumes of FreeSurfer by their subject, other names by their path below
    that folder without extension, `_dseg` and `_mask`.
    """
    keys = [_Key.of(other, root) for other, root in others]
    return [
        [other for (other, _), key in zip(others, keys, strict=True) if own.fits(key)]
        for own in (_Key.of(path, base) for path, base in files)
    ]


def match_files(
    left: Sequence[tuple[Path, Path | None]], right: Sequence[tuple[Path, Path | None]]
) -> tuple[list[tuple[Path, Path]], list[Path], list[Path]]:
    """Pairs each file of `left` with its one of `counterparts` in `right`: (pairs, left alone, right alone).

    Several may share a counterpart; a file with two of them is an InputError that lists them.
    """
    pairs, alone, used = [], [], set()
    for (path, _), found in zip(left, counterparts(left, right), strict=True):
        if len(found) > 1:
            raise InputError(f"{path}: several files match it: {', '.join(map(str, found))}; keep one of them")
        if found:
            pairs.append((path, found[0]))
            used.add(found[0])
        else:
            alone.append(path)
    return pairs, alone, [path for path, _ in right if path not in used]


@dataclass(frozen=True)
class _Key:
    """What a file is matched by."""

    entities: dict[str, str]
    subject: str | None  # of FreeSurfer
    folder: str  # what would be FreeSurfer's subject
    plain: str

    @classmethod
    def of(cls, path: Path, base: Path | None) -> _Key:
        name = parse_name(path)
        below = path.parent.relative_to(base) if base is not None else Path()
        plain = str(below / name.stem.removesuffix("_dseg").removesuffix("_mask"))
        return cls(name.entities, freesurfer_subject(path), path.absolute().parent.parent.name, plain)

    def fits(self, other: _Key) -> bool:
        if self.entities and other.entities:
            return _agree(self.entities, other.entities)
        if self.subject or other.subject:
            return self.folder == other.folder
        return self.plain == other.plain


def _agree(first: dict[str, str], second: dict[str, str]) -> bool:
    """Whether two BIDS names agree in every entity both have (sub at least), `seg`, `desc`, `label` aside."""
    shared = (first.keys() & second.keys()) - _SAY_NOTHING_OF_THE_SOURCE
    return "sub" in shared and all(first[key] == second[key] for key in shared)
