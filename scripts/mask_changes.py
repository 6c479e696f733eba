"""Brain-extracted scans as another mask would have left them: 2 mm less, or 2 mm more with what lies there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from scipy import ndimage
from simulation import smooth_noise

from ppl_seg.data.images import Image, read_label_map, read_scan, write_image

CHANGES = ("eroded", "dilated")
WIDTH = 2.0  # mm
PATCH = 15.0  # mm: how long fluid or dura go on along the brain
FLUID, DURA = "Lateral-Ventricle", "Cerebral-Cortex"  # whose brightness they have; dura is about as bright as cortex


def change_mask(scan: Image, truth: np.ndarray, groups: dict[str, tuple[int, ...]], change: str) -> np.ndarray:
    """The scan (X, Y, Z) with its mask, its voxels above 0, WIDTH mm smaller or larger; outside is 0.

    The new shell is of fluid and of dura, in patches, with the mean and the spread that they have in the scan. The
    manual labels `truth` serve to measure these, and for nothing else.
    """
    mask = np.asarray(scan.data) > 0
    if change == "eroded":
        inside = ndimage.distance_transform_edt(mask, sampling=scan.spacing) > WIDTH
        return np.where(inside, scan.data, 0).astype(np.float32)
    near = ndimage.distance_transform_edt(~mask, sampling=scan.spacing)
    shell = (near > 0) & (near <= WIDTH)
    seed = int.from_bytes(hashlib.blake2b(scan.path.name.encode(), digest_size=4).digest(), "big")
    generator = np.random.default_rng(seed)
    fluid = smooth_noise(generator, mask.shape, scan.spacing, PATCH) > 0
    values = np.zeros(mask.shape)
    for where, structure in ((shell & fluid, FLUID), (shell & ~fluid, DURA)):
        like = scan.data[np.isin(truth, groups[structure]) & mask]
        drawn = generator.normal(like.mean(), like.std(), int(where.sum()))
        values[where] = np.maximum(drawn, 1e-3 * like.mean())  # 0 would be outside
    return np.where(shell, values, np.where(mask, scan.data, 0)).astype(np.float32)


def write_changed(scan: Path, truth: Path, groups: dict[str, tuple[int, ...]], change: str, folder: Path) -> None:
    """`change_mask` of a file, under the same name in `folder`."""
    image = read_scan(scan)
    write_image(folder / scan.name, change_mask(image, read_label_map(truth).data, groups, change), image)
