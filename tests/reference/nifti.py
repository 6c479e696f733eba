"""NIfTI files the plain way: a header packed and unpacked field by field, by the text of the standard."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass, field

import numpy as np

CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm


@dataclass
class Nifti:
    """A file: voxels as they are stored (any shape of 1 to 5 axes) and what the header says of them."""

    stored: np.ndarray
    slope: float = 1.0
    inter: float = 0.0
    pixdim: tuple[float, float, float] = (1.0, 1.0, 1.0)
    qfac: float = 1.0
    unit: int = 2
    sform_code: int = 0
    qform_code: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.eye(4)[:3])
    quaternion: tuple[float, float, float] = (0.0, 0.0, 0.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    version: int = 1
    order: str = "<"
    gap: int = 0  # bytes between header and voxels

    def content(self, compressed: bool = False) -> bytes:
        """The bytes of the file."""
        kind = f"{self.stored.dtype.kind}{self.stored.dtype.itemsize}"
        dim = [self.stored.ndim, *self.stored.shape, *[1] * (7 - self.stored.ndim)]
        pixdim = [self.qfac, *self.pixdim, 0, 0, 0, 0]
        affine = [*self.quaternion, *self.offset, *self.rows.ravel()]
        bits = 8 * self.stored.dtype.itemsize
        if self.version == 1:
            start = 352 + self.gap
            head = struct.pack(self.order + "i35xB", 348, 0) + struct.pack(self.order + "8h", *dim)
            head += struct.pack(self.order + "14x3h", CODES[kind], bits, 0)
            head += struct.pack(self.order + "8f3f", *pixdim, start, self.slope, self.inter)
            head += struct.pack(self.order + "3xB", self.unit) + bytes(128)
            head += struct.pack(self.order + "2h18f", self.qform_code, self.sform_code, *affine)
            head += bytes(16) + b"n+1\0"
            assert len(head) == 348
        else:
            start = 544 + self.gap
            head = struct.pack(self.order + "i8s2h", 540, b"n+2\0\r\n\x1a\n", CODES[kind], bits)
            head += struct.pack(self.order + "8q", *dim) + bytes(24)
            head += struct.pack(self.order + "8dq2d", *pixdim, start, self.slope, self.inter) + bytes(152)
            head += struct.pack(self.order + "2i18d", self.qform_code, self.sform_code, *affine)
            head += struct.pack(self.order + "4xi", self.unit) + bytes(36)
            assert len(head) == 540
        voxels = self.stored.astype(self.stored.dtype.newbyteorder(self.order)).tobytes(order="F")
        whole = head + bytes(start - len(head)) + voxels
        return gzip.compress(whole, 1) if compressed else whole

    @property
    def values(self) -> np.ndarray:
        """The intensities: slope × stored + inter, unless the slope is 0."""
        stored = self.stored.astype(np.float64)
        return stored * self.slope + self.inter if self.slope else stored

    @property
    def affine(self) -> np.ndarray:
        """Voxel to mm: the sform, else the qform, else the voxel sizes alone, x to the left and centred."""
        size = np.array(self.pixdim)
        if self.sform_code > 0:
            rows = np.array(self.rows, np.float64)
        elif self.qform_code > 0:
            b, c, d = self.quaternion
            a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
            rotation = np.array(
                [
                    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
                ]
            )
            rows = np.column_stack([rotation * size * [1, 1, -1 if self.qfac < 0 else 1], self.offset])
        else:
            shape = np.array([*self.stored.shape, 1, 1][:3])
            scale = size * [-1, 1, 1]
            rows = np.column_stack([np.diag(scale), -scale * (shape - 1) / 2])
        return np.vstack([rows * UNITS[self.unit], [0, 0, 0, 1]])
