"""What a folder is (FreeSurfer's subjects, a BIDS dataset, a plain one) and which of its images are looked at."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppl_seg.data.names import EXTENSIONS, freesurfer_subject
from ppl_seg.errors import InputError

READABLE = tuple(e for e in EXTENSIONS if not e.startswith(".img"))  # the .hdr of a pair stands for both
DESCRIPTION = "dataset_description.json"
_NEVER_ENTERED = frozenset({"derivatives", "sourcedata", "code"})
_TEMPLATES = frozenset({"cvs_avg35", "cvs_avg35_inMNI152", "V1_average", "lh.EC_average", "rh.EC_average"})
_LOGGER = logging.getLogger("ppl_seg")


def images_in(folder: Path, volumes: Sequence[str]) -> list[Path]:
    """Images below `folder`, links followed, what is hidden left out.

    Of a subject of FreeSurfer: mri/VOLUME.mgz for each of `volumes`; templates and unfinished subjects are skipped and
    named. Of a raw BIDS dataset: images in anat/, nothing from derivatives or sourcedata. Of other folders: all images.
    """
    return list(_walk(folder, volumes, _inside_raw_dataset(folder), set()))


def taken_subject(path: Path) -> bool:
    """False for a volume of a template or of an unfinished subject of FreeSurfer, which is named."""
    if freesurfer_subject(path) is None:
        return True
    reason = _why_skipped(path.absolute().parent.parent)
    if reason:
        _LOGGER.info(f"{path}: {reason}; skipped")
    return reason is None


def is_raw_dataset(folder: Path) -> bool:
    """Whether `folder` has a dataset_description.json that does not speak of a derivative."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); repair it") from error
    return not (isinstance(description, dict) and description.get("DatasetType") == "derivative")


def _inside_raw_dataset(folder: Path) -> bool:
    """Whether `folder` is one subject of a raw dataset, or below it."""
    places = [folder.absolute(), *folder.absolute().parents]
    return any(
        below.name.startswith("sub-") and (place / DESCRIPTION).exists() and is_raw_dataset(place)
        for below, place in zip(places, places[1:], strict=False)
    )


def _walk(folder: Path, volumes: Sequence[str], raw: bool, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above
        return
    seen.add(real)
    if _is_subject(folder):
        yield from _volumes_of(folder, volumes)
        return
    raw = raw or is_raw_dataset(folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        _LOGGER.info(f"{folder}: cannot be read ({error.strerror}); skipped")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir():
            if not (raw and entry.name in _NEVER_ENTERED):
                yield from _walk(path, volumes, raw, seen)
        elif entry.name.lower().endswith(READABLE) and (not raw or folder.absolute().name == "anat"):
            yield path


def _is_subject(folder: Path) -> bool:
    """Whether `folder` is a subject of FreeSurfer, finished or not."""
    mri = folder / "mri"
    marks = ("orig.mgz", "rawavg.mgz", "aseg.mgz", "orig")
    return any(os.path.lexists(mri / mark) for mark in marks) or (
        mri.is_dir() and (folder / "surf").is_dir() and (folder / "label").is_dir()
    )


def _volumes_of(subject: Path, volumes: Sequence[str]) -> Iterator[Path]:
    wanted = [subject / "mri" / f"{volume}.mgz" for volume in volumes]
    missing = [path.name for path in wanted if not os.path.lexists(path)]
    reason = _why_skipped(subject) or (f"no mri/{missing[0]}" if missing else None)
    if reason is None:
        yield from wanted
    else:
        _LOGGER.info(f"{subject}: {reason}; skipped")


def _why_skipped(subject: Path) -> str | None:
    name = subject.absolute().name
    if name.startswith("fsaverage") or name in _TEMPLATES:
        return "FreeSurfer's template"
    if (subject / "base-tps").exists():
        return "FreeSurfer's mean of several visits"
    if ".long." in name:
        return "a visit that FreeSurfer has as itself, too"
    scripts = subject / "scripts"
    if any(scripts.glob("IsRunning*")):
        return "recon-all is not finished"
    return "recon-all ended with an error" if (scripts / "recon-all.error").exists() else None
