"""File names: BIDS entities in, output folders and stems out, and which file belongs to which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_seg.errors import InputError

EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img")
OUR_SEGMENTATION = "ppl"  # the value of `seg-` in what we write
NOT_SCANS = frozenset({"dseg", "probseg", "mask", "roi", "entropy", "draws"})
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
    """Entities, suffix and extension of `sub-01_ses-1_T1w.nii.gz`; other names are a mere stem."""
    name = Path(path).name
    extension = next((e for e in EXTENSIONS if name.lower().endswith(e)), Path(name).suffix)
    stem = name[: len(name) - len(extension)]
    *parts, suffix = stem.split("_")
    matches = [_ENTITY.fullmatch(part) for part in parts]
    entities = {m[1]: m[2] for m in matches if m}
    if "sub" not in entities or not all(matches) or not suffix.isalnum():
        return Name(stem, {}, None, extension)
    return Name(stem, entities, suffix, extension)


def last_word(path: Path | str) -> str:
    """What follows the last underscore of the stem: the BIDS suffix, and for other names often the same."""
    return parse_name(path).stem.rsplit("_", 1)[-1]


def is_scan_name(path: Path | str) -> bool:
    """False for names of label maps, masks, probabilities and our own outputs."""
    return last_word(path) not in NOT_SCANS and parse_name(path).entities.get("seg") != OUR_SEGMENTATION


def output_location(
    path: Path | str, base: Path | str | None = None, contrasts: Sequence[str] = ()
) -> tuple[Path, str]:
    """Folder below the output folder, and stem, of a scan's outputs.

    `sub-01_ses-1_T1w.nii.gz` gives `sub-01/ses-1/anat`, `sub-01_ses-1_seg-ppl_desc-T1w`; `contrasts` are the
    channels' suffixes where there are several (`desc-T1wFLAIR`). A name that is not BIDS keeps its path below
    `base` (the folder the user gave; None: no folder), and its stem.
    """
    path = Path(path)
    name = parse_name(path)
    if name.suffix is None:
        return (path.parent.relative_to(base) if base is not None else Path()), name.stem
    folder = Path(f"sub-{name.entities['sub']}")
    if "ses" in name.entities:
        folder /= f"ses-{name.entities['ses']}"
    kept = {key: value for key, value in name.entities.items() if key not in ("seg", *_AFTER_SEG)}
    kept["seg"] = OUR_SEGMENTATION
    kept |= {key: name.entities[key] for key in _AFTER_SEG if key in name.entities}
    kept["desc"] = name.entities.get("desc", "") + ("".join(contrasts) or name.suffix)
    return folder / "anat", "_".join(f"{key}-{value}" for key, value in kept.items())


def belong_together(a: Path | str, b: Path | str) -> bool:
    """Whether two BIDS names agree in every entity both have (sub at least), `seg`, `desc`, `label` aside."""
    first, second = parse_name(a).entities, parse_name(b).entities
    shared = (first.keys() & second.keys()) - _SAY_NOTHING_OF_THE_SOURCE
    return "sub" in shared and all(first[key] == second[key] for key in shared)


def match_files(
    left: Sequence[tuple[Path, Path | None]], right: Sequence[tuple[Path, Path | None]]
) -> tuple[list[tuple[Path, Path]], list[Path], list[Path]]:
    """Pairs each file of `left` with its counterpart in `right`: (pairs, left alone, right alone).

    Files come with the folder they were found under (or None). BIDS names match by shared entities, other
    names by their path below that folder without extension and `_dseg`. Several may share a counterpart; a
    file with two of them is an InputError that lists them.
    """
    pairs, alone, used = [], [], set()
    for path, base in left:
        found = [other for other, root in right if _match(path, base, other, root)]
        if len(found) > 1:
            raise InputError(f"{path}: several files match it: {', '.join(map(str, found))}; keep one of them")
        if found:
            pairs.append((path, found[0]))
            used.add(found[0])
        else:
            alone.append(path)
    return pairs, alone, [path for path, _ in right if path not in used]


def _match(path: Path, base: Path | None, other: Path, root: Path | None) -> bool:
    if parse_name(path).suffix is not None and parse_name(other).suffix is not None:
        return belong_together(path, other)
    return _plain_key(path, base) == _plain_key(other, root)


def _plain_key(path: Path, base: Path | None) -> str:
    folder = path.parent.relative_to(base) if base is not None else Path()
    return str(folder / parse_name(path).stem.removesuffix("_dseg"))
