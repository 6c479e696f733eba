"""Seeded damage to files: flipped bits, missing and additional bytes, header fields that lie, gzip bombs."""

from __future__ import annotations

import gzip
import math
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

# field: (struct format, offset) of NIfTI-1 and NIfTI-2, little endian
_NIFTI1 = {
    "sizeof_hdr": ("i", 0), "dim": ("8h", 40), "intent_p1": ("f", 56), "datatype": ("h", 70), "bitpix": ("h", 72),
    "pixdim": ("8f", 76), "vox_offset": ("f", 108), "scl_slope": ("f", 112), "scl_inter": ("f", 116),
    "xyzt_units": ("B", 123), "qform_code": ("h", 252), "sform_code": ("h", 254), "quatern": ("3f", 256),
    "qoffset": ("3f", 268), "srow": ("12f", 280), "magic": ("4B", 344), "extension": ("4B", 348),
}  # fmt: skip
_NIFTI2 = {
    "sizeof_hdr": ("i", 0), "magic": ("8B", 4), "datatype": ("h", 12), "bitpix": ("h", 14), "dim": ("8q", 16),
    "pixdim": ("8d", 104), "vox_offset": ("q", 168), "scl_slope": ("d", 176), "scl_inter": ("d", 184),
    "qform_code": ("i", 344), "sform_code": ("i", 348), "quatern": ("3d", 352), "qoffset": ("3d", 376),
    "srow": ("12d", 400), "xyzt_units": ("i", 500),
}  # fmt: skip
_MGH = {
    "version": (">i", 0), "dims": (">4i", 4), "type": (">i", 20), "dof": (">i", 24), "good_ras": (">h", 28),
    "delta": (">3f", 30), "directions": (">9f", 42), "centre": (">3f", 78),
}  # fmt: skip
FIELDS = {"nii": _NIFTI1, "nii2": _NIFTI2, "mgh": _MGH, "hdr": _NIFTI1}
_INTEGERS = (0, 1, 2, 3, 4, 7, 8, 9, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, -2)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e-3, 1e3, 352.0, 1e9, 3e38, -3e38, math.nan, math.inf, -math.inf)


def mutate(content: bytes, kind: str, source: random.Random) -> bytes:
    """`content` of `kind` (nii, nii2, mgh, hdr, text, other), possibly gzip, with one to three damages."""
    for _ in range(source.choice((1, 1, 2, 3))):
        if content.startswith(b"\x1f\x8b") and source.random() < 0.6:
            try:
                content = gzip.compress(_damage(gzip.decompress(content), kind, source), 1, mtime=0)
                continue
            except (EOFError, OSError, zlib.error):
                pass  # damaged already
        content = _damage(content, kind, source)
    return content


@cache
def bombs() -> list[tuple[str, bytes]]:
    """Small files that say, or hold, a great deal: (kind, content)."""
    zeros = [gzip.compress(bytes(2**24), 9, mtime=0)]  # several members are one stream
    made = []
    for shape, code, size, members in (
        ((2000, 2000, 2000), 2, 1, 20),
        ((1000, 1000, 1000), 16, 4, 40),
        ((32767, 32767, 32767), 64, 8, 2),
        ((250, 250, 250), 2, 1, 1),  # what it says
        ((5, 5, 5), 2, 1, 40),  # far more than it says
    ):
        header = bytearray(352)
        struct.pack_into("<i", header, 0, 348)
        struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
        struct.pack_into("<2h", header, 70, code, 8 * size)
        struct.pack_into("<8f", header, 76, *[1.0] * 8)
        struct.pack_into("<3f", header, 108, 352, 1, 0)
        header[344:348] = b"n+1\0"
        made.append(("nii", gzip.compress(bytes(header), mtime=0) + zeros[0] * members))
    return made


def _damage(content: bytes, kind: str, source: random.Random) -> bytes:
    ways: list[Callable[..., bytes]] = [_flip, _flip_early, _cut, _append, _overwrite]
    if kind in FIELDS:
        ways += [_edit_field] * 6
    return source.choice(ways)(content, kind, source)


def _flip(content: bytes, _: str, source: random.Random, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for _ in range(source.choice((1, 2, 8, 64))):
        place = source.randrange(min(len(damaged), end or len(damaged)) or 1)
        if place < len(damaged):
            damaged[place] ^= 1 << source.randrange(8)
    return bytes(damaged)


def _flip_early(content: bytes, kind: str, source: random.Random) -> bytes:
    return _flip(content, kind, source, 352)


def _cut(content: bytes, _: str, source: random.Random) -> bytes:
    return content[: source.choice((0, 1, 4, 100, 284, 348, 352, 540, 544, source.randrange(len(content) + 1)))]


def _append(content: bytes, _: str, source: random.Random) -> bytes:
    return content + source.randbytes(source.choice((1, 7, 300, 5000)))


def _overwrite(content: bytes, _: str, source: random.Random) -> bytes:
    place, length = source.randrange(len(content) + 1), source.choice((1, 4, 50, 400))
    piece = source.choice((bytes(length), b"\xff" * length, source.randbytes(length)))
    return content[:place] + piece + content[place + length :]


def _edit_field(content: bytes, kind: str, source: random.Random) -> bytes:
    form, offset = source.choice(list(FIELDS[kind].values()))
    form = form if form[0] == ">" else "<" + form
    if len(content) < offset + struct.calcsize(form):
        return content
    values: list[Any] = list(struct.unpack_from(form, content, offset))
    for place in range(len(values)):
        if source.random() < 0.5 or len(values) == 1:
            values[place] = _lie(form[-1], source)
    damaged = bytearray(content)
    struct.pack_into(form, damaged, offset, *values)
    return bytes(damaged)


def _lie(letter: str, source: random.Random) -> float | int:
    if letter in "fd":
        return source.choice((*_FLOATS, source.gauss(0, 100)))
    bits = 8 * struct.calcsize(letter)
    low, high = (0, 2**bits - 1) if letter == "B" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return min(max(source.choice((*_INTEGERS, low, high, high // 2, source.randint(low, high))), low), high)
