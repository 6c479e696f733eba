"""Image files to headers and voxels, by content rather than by extension, with errors a user can act on.

nibabel picks a reader by the file's name, and names lie (`.nii` that is gzip, `.nii.gz` that is not): the first
bytes decide here. nibabel's classes read the headers; voxels are read piece by piece, after the sizes that the
header declares were compared with the file.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spm2analyze import Spm2AnalyzeHeader

from ppl_seg.data.content import check_present, opened
from ppl_seg.data.geometry import UNKNOWN_SIDES
from ppl_seg.errors import InputError

PAIR_EXTENSIONS = (".hdr", ".img", ".hdr.gz", ".img.gz")
MOST_VOXELS = 2**27  # 512³; a larger image than memory holds is most often a damaged header
_LONGEST_HEADER = 2**26  # bytes before the voxels, header extensions included
_HEADER_BYTES = 544
_PIECE = 2**20  # voxels
_QUIET = logging.getLogger(f"{__name__}.nibabel")  # nibabel tells of small repairs, on stderr by default
_QUIET.propagate = False
_QUIET.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Source:
    """An image file whose header was read: nibabel's header, the file with the voxels, and warnings."""

    header: Any
    voxels: Path
    offset: int
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file says it."""
        return tuple(int(n) for n in self.header.get_data_shape())


def open_image(path: Path) -> Source:
    """Read the header of a NIfTI-1, NIfTI-2, .mgz or Analyze image.

    Raises InputError where the file is missing, a pointer to content kept elsewhere, empty, too short or of another
    format, and for voxels that are not one real number each.
    """
    head_path, voxels = _files(path)
    with opened(head_path) as content:
        head = content.take(_HEADER_BYTES)
    kind, length = _header_class(head, head_path, paired=voxels != head_path)
    try:
        header = kind(head[:length], check=False)
        stated = header.copy()
        header.check_fix(logger=_QUIET, error_level=40)
        offset = 0 if voxels != head_path else int(header.get_data_offset())
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
    except Exception as error:  # nibabel raises many kinds for a damaged header
        raise InputError(f"{path}: the header is damaged ({_reason(error)}); copy the file again") from error
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are {dtype} (colour or complex); expected one real number per voxel")
    nearest = 0 if voxels != head_path else 284 if kind is MGHHeader else length + 4  # 4 bytes tell of extensions
    if not shape or min(shape) < 1 or not nearest <= offset <= _LONGEST_HEADER:
        raise InputError(
            f"{path}: the header is damaged (shape {_plain(shape)}, voxels from byte {offset}); copy it again"
        )
    if math.prod(int(n) for n in shape) > MOST_VOXELS:
        raise InputError(f"{path}: its shape is {_plain(shape)}; expected at most {MOST_VOXELS} voxels; resample it")
    _check_slope(header, path)
    _check_sizes(stated, path)  # nibabel repairs them without a word
    return Source(header, voxels, offset, _format_warnings(kind, head, path))


def read_voxels(source: Source, path: Path, dtype: type | None = None) -> np.ndarray:
    """The voxels, scaled as the header says, as `dtype` or their own. InputError where some are missing.

    Without `dtype` and scale the file's own type comes back, in this machine's byte order; scaled voxels are float64.
    """
    stored = source.header.get_data_dtype()
    slope, inter = _scale(source.header)
    scaled = (slope, inter) != (1.0, 0.0)
    shape = source.shape
    count = math.prod(shape)
    with opened(source.voxels) as content:
        if source.offset + count * stored.itemsize > content.limit:
            raise _truncated(path, shape)
        content.skip(source.offset)
        voxels = np.empty(count, dtype or (np.float64 if scaled else stored.newbyteorder("=")))
        with np.errstate(all="ignore"):  # beyond the range of float32: infinite, and said to be
            for start in range(0, count, _PIECE):
                length = min(_PIECE, count - start)
                data = content.take(length * stored.itemsize)
                if len(data) < length * stored.itemsize:
                    raise _truncated(path, shape)
                piece = np.frombuffer(data, stored)
                voxels[start : start + length] = piece.astype(np.float64) * slope + inter if scaled else piece
        content.finish()
    return voxels.reshape(shape, order="F")


def _files(path: Path) -> tuple[Path, Path]:
    """The file with the header and the one with the voxels."""
    name = path.name
    lower = name.lower()
    check_present(path)
    if not lower.endswith(PAIR_EXTENSIONS):
        return path, path
    stem = name[: lower.rindex(".hdr" if ".hdr" in lower else ".img")]
    found = []
    for role in ("hdr", "img"):
        names = [f"{stem}.{e}" for e in (role, role.upper(), f"{role}.gz")]
        there = [path.with_name(n) for n in names if path.with_name(n).exists()]
        if not there:
            raise InputError(f"{path}: {names[0]} is not beside it; give both files of the pair, or a .nii.gz")
        found.append(there[0])
    return found[0], found[1]


def _header_class(head: bytes, path: Path, paired: bool) -> tuple[Any, int]:
    """nibabel's class for a header that begins with `head`, and the header's length in bytes."""
    if len(head) >= 348 and head[:4] in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c"):  # 348 in either byte order
        if paired:
            return (Nifti1PairHeader if head[344:346] == b"ni" else Spm2AnalyzeHeader), 348
        if head[344:347] == b"n+1":
            return Nifti1Header, 348
        raise InputError(f"{path}: the header half of a header/image pair; give the .hdr/.img files, or a .nii.gz")
    if len(head) >= 540 and head[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c"):  # 540
        return (Nifti2PairHeader if paired else Nifti2Header), 540
    if len(head) >= 284 and head[:4] == b"\x00\x00\x00\x01" and not paired:
        return MGHHeader, 284
    raise InputError(f"{path}: not a NIfTI or .mgz image (starts with {head[:8]!r}); expected .nii, .nii.gz, .mgz")


def _format_warnings(kind: Any, head: bytes, path: Path) -> tuple[str, ...]:
    if kind is Spm2AnalyzeHeader:
        return (f"{path}: an Analyze image, so {UNKNOWN_SIDES}",)
    # the "good RAS" flag; nibabel fills in a default orientation and forgets that it did
    if kind is MGHHeader and head[28:30] == b"\x00\x00":
        return (f"{path}: the file carries no orientation, so {UNKNOWN_SIDES}",)
    return ()


def _check_sizes(header: Any, path: Path) -> None:
    """InputError for sizes of voxels that are no lengths, where nothing else in the header says them."""
    if isinstance(header, MGHHeader) or (isinstance(header, Nifti1Header) and header["sform_code"] > 0):
        return
    sizes = [float(s) for s, n in zip(header["pixdim"][1:4], header.get_data_shape(), strict=False) if n > 1]
    if not all(0 < size < math.inf for size in sizes):
        raise InputError(
            f"{path}: voxels of {'x'.join(f'{size:g}' for size in sizes)} mm; expected sizes above 0; repair the header"
        )


def _check_slope(header: Any, path: Path) -> None:
    if not isinstance(header, Nifti1Header):
        return
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or (slope != 0 and not np.isfinite(intercept)):  # slope 0: no scaling
        raise InputError(
            f"{path}: the header's scl_slope, scl_inter are {slope}, {intercept}: intensities are unknown; "
            "repair the header"
        )


def _scale(header: Any) -> tuple[float, float]:
    slope, inter = header.get_slope_inter() if hasattr(header, "get_slope_inter") else (None, None)
    return (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))


def _truncated(path: Path, shape: tuple[int, ...]) -> InputError:
    return InputError(f"{path}: truncated, voxels are missing (the header says {_plain(shape)}); copy the file again")


def _plain(shape: Any) -> str:
    return "x".join(str(int(n)) for n in shape)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
