"""Bytes on disk to a nibabel image, by content rather than by extension, with the errors a user can act on.

nibabel picks a reader by the file's name. Names lie (`.nii` that is gzip, `.nii.gz` that is not), so the
first bytes decide here, and the readers get the decompressed bytes.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ppl_seg.data.geometry import UNKNOWN_SIDES
from ppl_seg.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
PAIR_EXTENSIONS = (".hdr", ".img", ".hdr.gz", ".img.gz")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_image(path: Path) -> tuple[Any, list[str]]:
    """The nibabel image (Nifti1, Nifti2, MGH or Analyze) in `path`, and warnings about its format.

    Raises InputError where the file is missing, a pointer to content kept elsewhere, empty, truncated or of
    another format. The voxels of single files are in memory, those of header/image pairs are read on access.
    """
    if path.name.lower().endswith(PAIR_EXTENSIONS):
        check_present(path)
        try:
            pair: Any = nib.load(path)
        except Exception as error:
            raise InputError(f"{path}: not a readable header/image pair ({error}); convert it to .nii.gz") from error
        nifti = isinstance(pair.header, nib.Nifti1Header)
        return pair, [] if nifti else [f"{path}: an Analyze image, so {UNKNOWN_SIDES}"]
    content = _read_bytes(path)
    kind = _image_class(content, path)
    try:
        image = kind.from_bytes(content)
    except Exception as error:  # nibabel raises many kinds for a damaged header
        raise InputError(f"{path}: the header is damaged ({error}); copy the file again") from error
    # the "good RAS" flag; nibabel fills in a default orientation and forgets that it did
    unknown = kind is nib.MGHImage and content[28:30] == b"\x00\x00"
    return image, [f"{path}: the file carries no orientation, so {UNKNOWN_SIDES}"] if unknown else []


def read_voxels(image: Any, path: Path, dtype: type | None = None) -> np.ndarray:
    """The voxels, scaled as the header says, as `dtype` or their own. InputError where some are missing."""
    kind = image.get_data_dtype()
    if kind.fields is not None or kind.kind not in "iufb":
        raise InputError(f"{path}: voxels are {kind} (colour or complex); expected one real number per voxel")
    try:
        voxels = np.asanyarray(image.dataobj) if dtype is None else np.asarray(image.dataobj, dtype=dtype)
    except Exception as error:
        raise InputError(f"{path}: truncated, voxels are missing ({error}); copy the file again") from error
    return voxels


def check_present(path: Path) -> None:
    """Raises InputError where `path` is no file, or a link or pointer to content that is not on this disk."""
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        if ".git/annex" in target:
            raise InputError(f"{path}: its content is not here (git-annex); get it with `datalad get {path.name}`")
        raise InputError(f"{path}: a link to {target}, which does not exist")
    if path.is_dir():
        raise InputError(f"{path}: a folder; expected an image file")
    if not path.exists():
        raise InputError(f"{path}: no such file")


def _read_bytes(path: Path) -> bytes:
    check_present(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not content:
        raise InputError(f"{path}: the file is empty (0 bytes); copy it again")
    if content.startswith(_LFS_POINTER):
        raise InputError(f"{path}: its content is not here (Git LFS pointer); get it with `git lfs pull`")
    if content.startswith(b"/annex/objects/"):
        raise InputError(f"{path}: its content is not here (git-annex); get it with `datalad get {path.name}`")
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: truncated or damaged gzip file ({error}); copy it again") from error
    return content


def _image_class(content: bytes, path: Path) -> Any:
    """The nibabel class that reads `content`, from its first bytes."""
    for order in "<>":
        if len(content) >= 352 and struct.unpack(order + "i", content[:4])[0] == 348:
            if content[344:347] == b"n+1":
                _check_slope(content, order, path)
                return nib.Nifti1Image
            raise InputError(f"{path}: the header half of a header/image pair; give the .hdr/.img files, or a .nii.gz")
        if len(content) >= 544 and struct.unpack(order + "i", content[:4])[0] == 540 and content[4:7] == b"n+2":
            return nib.Nifti2Image
    if len(content) >= 284 and content[:4] == b"\x00\x00\x00\x01":
        return nib.MGHImage
    raise InputError(f"{path}: not a NIfTI or .mgz image (starts with {content[:8]!r}); expected .nii, .nii.gz, .mgz")


def _check_slope(content: bytes, order: str, path: Path) -> None:
    slope, intercept = struct.unpack(order + "2f", content[112:120])
    if not np.isfinite(slope) or (slope != 0 and not np.isfinite(intercept)):  # slope 0: no scaling
        raise InputError(
            f"{path}: the header's scl_slope, scl_inter are {slope}, {intercept}: intensities are unknown; "
            "repair the header"
        )
