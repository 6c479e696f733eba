"""Scans simulated from label maps: a brightness for each label, then blur, a bias field and noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from ppl_seg.data.images import Image
from ppl_seg.data.labels import LabelTable

BLUR, BIAS, BIAS_LENGTH = 0.5, 0.15, 40.0  # mm; sd of the bias field's logarithm; mm
NOISE = (0.01, 0.06)  # sd, where the brightest class is about 1
JITTER = 0.02  # sd of a structure's brightness within its class, both sides alike, in a contrast that has a name

# Brightness of the intensity classes (`ppl_seg.data.freesurfer`), cerebrospinal fluid and white matter as in textbooks
CONTRASTS = {
    "t1": {"csf": 0.20, "grey-matter": 0.58, "white-matter": 0.85, "cerebellum-cortex": 0.55}
    | {"cerebellum-white-matter": 0.82, "thalamus": 0.70, "putamen": 0.63, "pallidum": 0.75, "ventral-dc": 0.76}
    | {"hippocampus-amygdala": 0.56, "brain-stem": 0.78, "vessel": 0.35, "lesion": 0.50},
    "t2": {"csf": 0.95, "grey-matter": 0.52, "white-matter": 0.35, "cerebellum-cortex": 0.50}
    | {"cerebellum-white-matter": 0.36, "thalamus": 0.44, "putamen": 0.44, "pallidum": 0.30, "ventral-dc": 0.36}
    | {"hippocampus-amygdala": 0.54, "brain-stem": 0.40, "vessel": 0.20, "lesion": 0.70},
    "flair": {"csf": 0.12, "grey-matter": 0.68, "white-matter": 0.55, "cerebellum-cortex": 0.64}
    | {"cerebellum-white-matter": 0.55, "thalamus": 0.60, "putamen": 0.62, "pallidum": 0.50, "ventral-dc": 0.56}
    | {"hippocampus-amygdala": 0.70, "brain-stem": 0.57, "vessel": 0.15, "lesion": 0.95},
}


def random_brightness(table: LabelTable, generator: np.random.Generator) -> np.ndarray:
    """(M,) of each label: air is dark, every other class of any brightness."""
    means = generator.uniform(0.1, 1.0, max(table.class_of_label) + 1)
    means[0] = 0.0
    return np.asarray(means[np.asarray(table.class_of_label)])


def named_brightness(table: LabelTable, contrast: Mapping[str, float], generator: np.random.Generator) -> np.ndarray:
    """(M,) of each label: that of its class in one of CONTRASTS; at random where the contrast lacks it."""
    values = random_brightness(table, generator)
    own = [name.lower().removeprefix("left-").removeprefix("right-") for name in table.names]
    shift = dict(zip(dict.fromkeys(own), generator.normal(0, JITTER, len(set(own))), strict=True))
    for position, place in enumerate(table.class_of_label):
        kind = table.class_names[place].lower().removeprefix("left-").removeprefix("right-")
        if kind in contrast:
            values[position] = contrast[kind] + shift[own[position]]
    return values


def simulate(labels: Image, table: LabelTable, generator: np.random.Generator) -> np.ndarray:
    """(X, Y, Z) float32: a scan of a label map; air is dark, all else of any brightness."""
    values = random_brightness(table, generator)[table.to_positions(labels.data, labels.path)]
    return acquire(values, labels.spacing, generator)


def acquire(values: np.ndarray, spacing: tuple[float, float, float], generator: np.random.Generator) -> np.ndarray:
    """(X, Y, Z) float32: a scan of voxels of given brightness, with blur, bias field and noise."""
    values = ndimage.gaussian_filter(values, BLUR / np.array(spacing))
    values *= np.exp(BIAS * smooth_noise(generator, values.shape, spacing))
    sd = generator.uniform(*NOISE)
    noisy = np.hypot(values + generator.normal(0, sd, values.shape), generator.normal(0, sd, values.shape))
    return np.asarray(1000 * noisy, dtype=np.float32)


def smooth_noise(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
    length: float = BIAS_LENGTH,
) -> np.ndarray:
    """(X, Y, Z) noise of mean 0 and standard deviation 1, smooth over so many mm."""
    coarse = [max(2, round(n * size / length) + 1) for n, size in zip(shape, spacing, strict=True)]
    knots = generator.standard_normal(coarse)
    steps = [np.linspace(0, count - 1, n) for count, n in zip(coarse, shape, strict=True)]
    field = ndimage.map_coordinates(knots, np.meshgrid(*steps, indexing="ij"), order=3, mode="nearest")
    return np.asarray((field - field.mean()) / field.std())


def in_thirds(data: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first, second and third of every three neighbours along an axis; a rest is left out."""
    kept = np.moveaxis(data, axis, 0)[: data.shape[axis] // 3 * 3]
    one, two, three = (np.moveaxis(kept[start::3], 0, axis) for start in range(3))
    return one, two, three


def thick_slices(values: np.ndarray, axis: int) -> np.ndarray:
    """Means over slices of three voxels."""
    return np.asarray(sum(in_thirds(values, axis)) / 3)


def thick_labels(labels: np.ndarray, axis: int) -> np.ndarray:
    """Of every three voxels the label that most of them have; the middle one's where all differ."""
    one, two, three = in_thirds(labels, axis)
    return np.where(one == three, one, two)


def thick_affine(affine: np.ndarray, axis: int) -> np.ndarray:
    """(4, 4) of the slices: three times as thick, centred on the middle of each three."""
    thick = np.array(affine, np.float64)
    thick[:3, 3] += affine[:3, axis]
    thick[:3, axis] *= 3
    return thick
