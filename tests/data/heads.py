"""Synthetic heads: nested ellipsoids, off centre so that every turn shows, and their scans in any contrast."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ppl_seg.data.alignment import Atlas
from ppl_seg.data.grids import Grid
from ppl_seg.data.images import Image

SHAPE, SPACING = (44, 52, 46), 4.0
# class: centre and semi-axes, mm; later ones lie on top. 1 skin, 2 skull, 3 cortex, 4 white matter, 5 to 7 inside
PARTS = {
    1: ((0, 0, -4), (80, 95, 84)),
    2: ((0, 0, 0), (72, 88, 74)),
    3: ((0, 0, 6), (62, 76, 58)),
    4: ((0, 2, 6), (50, 62, 46)),
    5: ((-18, 10, 12), (9, 24, 14)),
    6: ((20, 14, 2), (11, 16, 12)),
    7: ((6, -46, -26), (24, 18, 14)),
}
BRAIN = (3, 4, 5, 6, 7)


def head_labels(heads: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Classes (X, Y, Z) and the affine; 0 around the brain unless `heads`."""
    affine = np.diag([SPACING] * 3 + [1.0])
    affine[:3, 3] = -SPACING * (np.array(SHAPE) - 1) / 2
    world = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING + affine[:3, 3]
    classes = np.zeros(SHAPE, np.int64)
    for value, (centre, axes) in PARTS.items():
        if heads or value in BRAIN:
            classes[(((world - centre) / axes) ** 2).sum(-1) < 1] = value
    return classes, affine


def resized(labels: np.ndarray, size: float) -> np.ndarray:
    """The same head so many times as large, about the middle: another person."""
    centre = (np.array(labels.shape) - 1) / 2
    return np.asarray(ndimage.affine_transform(labels, np.eye(3) / size, centre - centre / size, order=0), np.uint8)


def atlas(heads: bool = True) -> Atlas:
    classes, affine = head_labels(heads)
    brain = ndimage.gaussian_filter(np.isin(classes, BRAIN).astype(np.float32), 0.5)
    return Atlas(Grid(SHAPE, affine), classes, brain, "head" if heads else "brain")


def scan_of(classes: np.ndarray, affine: np.ndarray, contrast: tuple[float, ...], noise: float = 2.0) -> Image:
    """Noise everywhere for heads; exactly 0 around a brain."""
    random = np.random.default_rng(0)
    data = np.asarray(contrast, np.float32)[classes] + random.normal(0, noise, classes.shape)
    if not (classes == 1).any():
        data = np.where(classes > 0, data, 0)
    return Image(data.astype(np.float32), affine, Path("sub-01_T1w.nii.gz"), nib.Nifti1Header())


BRIGHT = (0.0, 90.0, 15.0, 60.0, 100.0, 20.0, 75.0, 85.0)
INVERTED = (10.0, 60.0, 12.0, 80.0, 50.0, 130.0, 70.0, 62.0)
