"""Scans drawn from label maps: each class and label of a random brightness, blurred, in slices, biased, noisy, masked.

After SynthSeg (Billot et al., Medical Image Analysis 2023), which draws every label's brightness by itself. In
nearly every contrast the nuclei lie between grey and white matter, so that most scans here are drawn like that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.fields import brain_labels
from ppl_seg.data.labels import FLUID, LabelTable
from ppl_seg.data.mirror import other_side

# Where a class lies between grey matter, 0, and white matter, 1, in most contrasts.
BETWEEN = {
    "grey-matter": 0.0, "hippocampus-amygdala": 0.0, "cerebellum-cortex": 0.0, "putamen": 0.3, "thalamus": 0.5,
    "pallidum": 0.7, "ventral-dc": 0.7, "brain-stem": 0.8, "cerebellum-white-matter": 0.95, "white-matter": 1.0,
}  # fmt: skip
SMALLEST_BRAIN = 100  # voxels, of which percentiles are taken


@dataclass(frozen=True)
class Simulation:
    """How scans are drawn. Brightness is from 0 to 1; what is called `most` is drawn uniformly from 0 on.

    Attributes:
        ordered: share of the scans whose tissues lie as BETWEEN has them, with this `spread`, sd of the fraction.
        label_sd: of a label's brightness around its class's, both sides alike.
        most_variation, most_grain: sd within a label, smooth over millimetres and from voxel to voxel.
        most_blur: sd, voxels of the label map. sliced: share of the scans in slices of up to `most_slice` such voxels.
        most_bias: sd of the field's logarithm. most_noise: sd, in the scan's voxels.
        masked: share of the heads' scans that show the brain alone. cleared: of the others, those without the air.
        cut: share of the scans that end within the grid, on one side of it.
        contrast, brightness, gamma: sd of what percentiles leave open.
    """

    ordered: float = 0.75
    spread: float = 0.15
    label_sd: float = 0.05
    most_variation: float = 0.06
    most_grain: float = 0.08
    most_blur: float = 1.2
    sliced: float = 0.15
    most_slice: int = 5
    most_bias: float = 0.25
    most_noise: float = 0.06
    masked: float = 0.5
    cleared: float = 0.3
    cut: float = 0.1
    contrast: float = 0.1
    brightness: float = 0.07
    gamma: float = 0.2


class ScanSimulator:
    """Draws scans of label maps, at half the maps' resolution.

    Args:
        table: the labels. field_of_view: of the label maps: brain, head or crop. simulation: how.
    """

    def __init__(self, table: LabelTable, field_of_view: str, simulation: Simulation | None = None) -> None:
        self.field_of_view, self.how = field_of_view, simulation or Simulation()
        self.class_of_label = torch.tensor(table.class_of_label)
        self.kinds = [name.lower() for name in table.class_names]
        self.outside = torch.from_numpy(~brain_labels(table))
        self.pair = torch.minimum(other_side(table), torch.arange(len(table)))

    def draw(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A normalised scan and where it is observed, (1, 1, *half), and the labels that it shows, (X, Y, Z).

        Args:
            labels: positions, (X, Y, Z), all of them even; UNKNOWN where nothing is known, and the scan ends.
        """
        how, uniform = self.how, _uniform(generator)
        known, labels = labels != UNKNOWN, labels.clamp(min=0)
        alone = self.field_of_view == "brain" or (self.field_of_view == "head" and uniform() < how.masked)
        if alone:
            labels = torch.where(self.outside[labels], 0, labels)
        classes, values = self.brightness(generator)
        grain = how.most_grain * torch.rand(len(values), generator=generator)
        scan = values[labels]
        if alone or self.field_of_view == "crop":
            scan = torch.where(labels == 0, self._around(classes, labels.shape, generator), scan)
        scan = scan + how.most_variation * uniform() * smooth_field(labels.shape, 6 + 20 * uniform(), generator)
        scan = scan + grain[labels] * torch.randn(labels.shape, generator=generator)
        scan = blur(scan, 0.3 + (how.most_blur - 0.3) * uniform())
        if uniform() < how.sliced:
            scan = in_slices(scan, generator, how.most_slice)
        scan = scan * (how.most_bias * uniform() * smooth_field(labels.shape, 30 + 30 * uniform(), generator)).exp()
        scan = functional.avg_pool3d(scan[None, None], 2)
        scan = scan + how.most_noise * uniform() * torch.randn(scan.shape, generator=generator)
        observed = halved(known) > 0.5
        if uniform() < how.cut:
            observed = observed & cut_off(observed.shape[2:], generator)
        region, brain = observed, halved(~self.outside[labels])
        if alone:  # a mask that closes sulci, and is narrow or wide
            observed = region = observed & (softened(brain, 0.5 + 1.5 * uniform()) > 0.2 + 0.35 * uniform())
        elif self.field_of_view == "head":  # normalised by its brain; the air around it may have been cleared
            region = observed & (brain > 0.5)
            if uniform() < how.cleared:
                observed = observed & (softened(halved(labels > 0), 0.5 + 1.5 * uniform()) > 0.2)
        return self._normalise(scan, observed, region, generator), observed, labels

    def brightness(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N,) of each class, and (M,) of each label."""
        how = self.how
        classes = torch.rand(len(self.kinds), generator=generator)
        ordered = torch.rand((), generator=generator) < how.ordered
        grey, white = torch.rand(2, generator=generator)
        for i, kind in enumerate(self.kinds):
            if ordered and kind in BETWEEN:
                fraction = BETWEEN[kind] + how.spread * torch.randn((), generator=generator)
                classes[i] = grey + (white - grey) * fraction
        jitter = how.label_sd * torch.randn(len(self.pair), generator=generator)[self.pair]
        return classes, classes[self.class_of_label] + jitter

    def _around(self, classes: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """What lies around a brain within its mask, or a crop's structures: fluid, and patches of something else."""
        uniform = _uniform(generator)
        fluid = classes[self.kinds.index(FLUID)] if FLUID in self.kinds else torch.rand((), generator=generator)
        share = 1.5 * uniform() - 0.2
        return torch.where(smooth_field(shape, 6, generator) < share, fluid, uniform())

    def _normalise(self, scan: Tensor, observed: Tensor, region: Tensor, generator: torch.Generator) -> Tensor:
        """By percentiles of a region in this part of a scan, and a little off, since a whole scan has others."""
        how = self.how
        ranked = scan[region].sort().values
        if len(ranked) < SMALLEST_BRAIN:
            return torch.zeros_like(scan)
        low, high = ranked[int(0.02 * len(ranked))], ranked[int(0.98 * len(ranked))]
        contrast, brightness, gamma = torch.randn(3, generator=generator)
        scan = (scan - low) / (high - low).clamp(min=1e-3)
        scan = scan * (1 + how.contrast * contrast) + how.brightness * brightness
        scan = scan.sign() * scan.abs().clamp(min=1e-4) ** (how.gamma * gamma).exp()
        return torch.where(observed, scan.clamp(-0.5, 1.5), 0.0)


def _uniform(generator: torch.Generator) -> Callable[[], float]:
    return lambda: float(torch.rand((), generator=generator))


def smooth_field(shape: Sequence[int], knots: float, generator: torch.Generator) -> Tensor:
    """(X, Y, Z) of mean 0 and sd 1, interpolated between normal values so many voxels apart."""
    coarse = [max(3, math.ceil(n / knots) + 2) for n in shape]
    values = torch.randn(1, 1, *coarse, generator=generator)
    field = functional.interpolate(values, tuple(shape), mode="trilinear", align_corners=True)[0, 0]
    return (field - field.mean()) / field.std().clamp(min=1e-6)


def blur(volume: Tensor, sd: float) -> Tensor:
    """A Gaussian, to two standard deviations and at least two voxels, along each axis of (X, Y, Z); edges replicated.

    Sums of shifted volumes: for so few voxels several times faster than a convolution.
    """
    reach = max(2, math.ceil(2 * sd))
    weights = [math.exp(-0.5 * (k / sd) ** 2) for k in range(-reach, reach + 1)]
    for axis in range(3):
        n = volume.shape[axis]
        first, last = volume.narrow(axis, 0, 1), volume.narrow(axis, n - 1, 1)
        padded = torch.cat([*[first] * reach, volume, *[last] * reach], axis)
        volume = torch.zeros_like(volume)
        for k, weight in enumerate(weights):
            volume.add_(padded.narrow(axis, k, n), alpha=weight / sum(weights))
    return volume


def halved(volume: Tensor) -> Tensor:
    """(1, 1, *half): means of 2 x 2 x 2 voxels of (X, Y, Z)."""
    return functional.avg_pool3d(volume.float()[None, None], 2)


def softened(volume: Tensor, sd: float) -> Tensor:
    """`blur` of (1, 1, X, Y, Z)."""
    return blur(volume[0, 0], sd)[None, None]


def cut_off(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(X, Y, Z) bool: False beyond a plane, which leaves at least half of one axis."""
    axis, end = (int(torch.randint(n, (), generator=generator)) for n in (3, 2))
    n = shape[axis]
    left = n - int(torch.randint(n // 2 + 1, (), generator=generator))
    kept = torch.zeros(tuple(shape), dtype=torch.bool)
    kept.narrow(axis, 0 if end else n - left, left).fill_(True)
    return kept


def in_slices(volume: Tensor, generator: torch.Generator, most: int) -> Tensor:
    """(X, Y, Z) as means over slices of 2 to `most` voxels along one axis, interpolated back; a rest stays."""
    axis = int(torch.randint(3, (), generator=generator))
    along = volume.movedim(axis, -1)
    thickness = int(torch.randint(2, min(most, along.shape[-1]) + 1, (), generator=generator))
    count = along.shape[-1] // thickness
    slices = along[..., : count * thickness].unflatten(-1, (count, thickness)).mean(-1)
    back = functional.interpolate(slices.reshape(-1, 1, count), count * thickness, mode="linear")
    thick = torch.cat([back.reshape(*slices.shape[:2], -1), along[..., count * thickness :]], -1)
    return thick.movedim(-1, axis)
