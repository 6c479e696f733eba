"""The read-out against loops, outside the grid, and one slice of a 3-D grid against 2-D."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl_seg.models.decoders import LocationDecoder
from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapePrior
from ppl_seg.results.readout import first_argmax, read_out

SHAPE = (4, 3, 2)


class Ramp(torch.nn.Module):
    """Scores that depend on z and on the voxel: z · (label) · (voxel number)."""

    def __init__(self, labels: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        voxels = torch.linspace(-1, 1, int(np.prod(grid)), dtype=torch.float64).view(grid)
        self.register_buffer("ramp", torch.stack([m * voxels for m in range(labels)]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.sum(-1)[(..., *[None] * self.ramp.dim())] * self.ramp


def program(grid: tuple[int, ...], maps: bool) -> tuple[SegmentationModel, IntensityParameters]:
    generator = torch.Generator().manual_seed(3)
    location = torch.rand(3, int(np.prod(grid)), generator=generator, dtype=torch.float64) + 0.1
    location = (location / location.sum(0)).view(3, *grid)
    shape = ShapePrior(location, Ramp(3, grid), 2)
    intensity = IntensityModel([0, 1, 1], [2, 1], 1)
    weights = torch.rand(2, location[0].numel(), generator=generator, dtype=torch.float64) + 0.1
    theta = IntensityParameters(
        torch.tensor([[[0.1], [0.9], [0.5]]], dtype=torch.float64),
        torch.tensor([[[0.2], [0.3], [0.1]]], dtype=torch.float64),
        torch.tensor([[0.4, 0.6, 1.0]], dtype=torch.float64).log(),
        (weights / weights.sum(0)).log() if maps else None,
    )
    return SegmentationModel(shape, intensity), theta


def scan_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    scan = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    return scan, torch.rand(1, *shape, generator=generator) > 0.2


@pytest.mark.parametrize("maps", [False, True])
def test_marginals_against_loops(maps: bool) -> None:
    model, theta = program(SHAPE, maps)
    scan, observed = scan_of(SHAPE)
    z = torch.tensor([[0.3, 0.4], [-1.0, 0.2]], dtype=torch.float64)
    found = read_out(model, z, theta, scan, observed, np.eye(4), keep_draws=True)
    f = model.shape_prior.log_label_probs(z).exp()
    expected = torch.zeros(3, *SHAPE, dtype=torch.float64)
    for place in np.ndindex(*SHAPE):
        flat = int(np.ravel_multi_index(place, SHAPE))
        x = scan[(0, *place)]
        normal = torch.exp(-0.5 * ((x - theta.mean[0, :, 0]) / theta.sd[0, :, 0]) ** 2) / theta.sd[0, :, 0]
        weight = theta.background_log_weight[:, flat].exp() if maps else theta.log_weight[0, :2].exp()  # type: ignore[index]
        likelihood = torch.stack([(weight * normal[:2]).sum(), normal[2], normal[2]])
        for draw in f:
            joint = draw[(slice(None), *place)] * (likelihood if observed[(0, *place)] else 1.0)
            expected[(slice(None), *place)] += joint / joint.sum() / 2
    torch.testing.assert_close(found.marginals, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.labels, expected.argmax(0))
    assert found.draws is not None
    assert found.draws.shape == (2, *SHAPE)
    assert torch.equal(
        found.counts, torch.stack([torch.bincount(d.flatten().long(), minlength=3) for d in found.draws])
    )
    torch.testing.assert_close(found.entropy, -(expected * expected.log()).sum(0), rtol=1e-8, atol=1e-10)


def test_outside_the_grid_is_background() -> None:
    model, theta = program(SHAPE, True)
    bigger = (8, 3, 2)
    scan, observed = scan_of(bigger)
    matrix = np.eye(4)
    matrix[0, 3] = 2  # the grid's first voxel is the scan's third
    found = read_out(model, torch.zeros(1, 2, dtype=torch.float64), theta, scan, observed, matrix)
    outside = torch.cat([found.marginals[:, :2], found.marginals[:, 6:]], 1)
    assert torch.equal(outside[0], torch.ones_like(outside[0]))
    assert not bool((found.marginals[1:, 2:6] == 0).any())


@pytest.mark.parametrize("name", ["marginals", "decoder"])
def test_one_slice_is_2d(name: str) -> None:
    flat_model, theta = program((4, 3), True)
    thick_model, _ = program((4, 3, 1), True)
    scan, observed = scan_of((4, 3, 1))
    z = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    found = [read_out(m, z, theta, scan, observed, np.eye(4), name) for m in (flat_model, thick_model)]  # type: ignore[arg-type]
    assert torch.equal(found[0].marginals, found[1].marginals)


def test_the_location_decoder_reads_out_the_location_prior() -> None:
    model, theta = program(SHAPE, False)
    location = model.shape_prior.log_location_prior.exp()
    alone = SegmentationModel(ShapePrior(location, LocationDecoder(2, 3, SHAPE), 2), model.intensity)
    scan, observed = scan_of(SHAPE)
    found = read_out(alone, torch.zeros(2, 2, dtype=torch.float64), theta, scan, observed, np.eye(4), "decoder")
    torch.testing.assert_close(found.marginals, location, rtol=1e-10, atol=1e-12)


def test_first_argmax() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [0.0, 3.0, 4.0]])
    assert first_argmax(values).tolist() == values.argmax(0).tolist() == [0, 1, 2]
