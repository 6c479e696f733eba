"""Label marginals whose mean over scans is the location prior: one smooth shift of borders for all scans.

If the program is right, its posteriors averaged over the scans are the prior, E_x p(s_j|x) = p(s_j). A boundary that
all scans have half a voxel too high shows in that mean, and no label is needed to see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.shape_prior import gaussian_blur

SMALLEST = 1e-8  # probability, in logarithms
STEPS, RATE = 15, 0.7
FLAT = 0.01  # doubt that is added to each voxel, as steep as all: where there is no border, it alone speaks


class BorderShift(nn.Module):
    """b(j, m), by which all scans' borders move equally far: t ∝ r exp(b g), g how steep a scan's own borders are.

    Where log r changes by b, the volume of a label changes by Σ_j r_j (1 − r_j) b: the wider its border is smeared, the
    more. Over the border's area that is how far it moves. So g is the area of a scan's borders over
    Σ_j (1 − Σ_m r_jm²), both within half the blur around a place, relative to that of the scans that b was learned
    from. Where there is no border it is 1.

    Args:
        shape: (M, *grid). blur: sd of the Gaussian that b is learned through, voxels.
        usual: border area over doubt of the scans that b is learned from, voxels.
    """

    shift: Tensor
    blur: Tensor
    usual: Tensor

    def __init__(self, shape: Sequence[int], blur: float = 1.0, usual: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(*shape))
        self.register_buffer("blur", torch.tensor(blur))
        self.register_buffer("usual", torch.tensor(usual))

    def forward(self, marginals: Tensor) -> Tensor:
        """b g of one scan, nats, (M, *grid).

        Args:
            marginals: r, (M, *grid).
        """
        return self.shift * steepness(*borders_and_doubt(marginals), self.usual, float(self.blur) / 2)

    def move(self, marginals: Tensor) -> Tensor:
        """t of one scan, (M, *grid)."""
        return _tilted(marginals, self(marginals))


def learn_shift(marginals: Tensor, observed: Tensor, log_location_prior: Tensor, blur: float) -> BorderShift:
    """b with which the mean of t over scans comes near the location prior.

    What fewer than one of n have at a place, n scans can't tell: there nothing is asked for.

    Args:
        marginals: r, (n, M, *grid). observed: (n, C or 1, *grid).
        blur: sd of the Gaussian through which the two are compared, voxels.
    """
    location, count = log_location_prior.exp(), len(marginals)
    seen = observed.any(1, keepdim=True)
    shown = seen.sum(0).to(location.dtype) + 1.0  # a scan that shows the prior itself: voxels nobody observes
    found = [borders_and_doubt(r) for r in marginals]
    area, doubt = (float(sum(part.sum() for part in parts)) for parts in zip(*found, strict=True))
    learned = BorderShift(location.shape, blur, area / max(doubt, SMALLEST) if area else 1.0).to(location.device)
    steep = [steepness(*of_scan, learned.usual, blur / 2) for of_scan in found]

    def smooth(volume: Tensor) -> Tensor:
        return gaussian_blur(volume.unsqueeze(0), blur)[0].clamp(min=1 / count).log()

    wanted = smooth(location)
    for _ in range(STEPS):
        mean = location.clone()
        for r, g, o in zip(marginals, steep, seen, strict=True):
            mean += _tilted(r, learned.shift * g) * o
        learned.shift += RATE * (wanted - smooth(mean / shown))
    return learned


def _tilted(marginals: Tensor, by: Tensor) -> Tensor:
    return (marginals.float().clamp(min=SMALLEST).log() + by).softmax(0)


def borders_and_doubt(marginals: Tensor) -> tuple[Tensor, Tensor]:
    """The area of borders between voxels of different labels, half on either side, and 1 − Σ_m r_m², both (1, *grid).

    Args:
        marginals: r, (M, *grid).
    """
    labels = marginals.argmax(0)
    area = torch.zeros(labels.shape, device=labels.device)
    for axis, n in enumerate(labels.shape):
        differ = (labels.narrow(axis, 1, n - 1) != labels.narrow(axis, 0, n - 1)).float() / 2
        area.narrow(axis, 1, n - 1).add_(differ)
        area.narrow(axis, 0, n - 1).add_(differ)
    return area.unsqueeze(0), (1 - marginals.float().square().sum(0)).unsqueeze(0)


def steepness(area: Tensor, doubt: Tensor, usual: Tensor, blur: float) -> Tensor:
    """How steeply label marginals change across their borders, (1, *grid), relative to the usual.

    Args:
        area, doubt: see `borders_and_doubt`. blur: sd of the Gaussian around a place, voxels.
    """
    here, doubted = gaussian_blur(torch.stack([area, doubt]), blur)
    return (here / usual + FLAT) / (doubted + FLAT)
