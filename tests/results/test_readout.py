"""The read-out against loops, outside the grid, and one slice of a 3-D grid against 2-D."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ppl_seg.models.decoders import LocationDecoder, build_decoder
from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapePrior
from ppl_seg.models.warped_atlas import WarpedAtlas
from ppl_seg.results import blocks as results_blocks
from ppl_seg.results import readout
from ppl_seg.results.readout import first_argmax, read_out
from tests.reference.readout import read_out as slow_read_out

SHAPE = (4, 3, 2)
SPACING = (2.0, 2.0, 2.0)


class Ramp(torch.nn.Module):
    """Scores that depend on z and on the voxel: z · (label) · (voxel number)."""

    def __init__(self, labels: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        voxels = torch.linspace(-1, 1, int(np.prod(grid)), dtype=torch.float64).view(grid)
        self.register_buffer("ramp", torch.stack([m * voxels for m in range(labels)]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.sum(-1)[(..., *[None] * self.ramp.dim())] * self.ramp


def program(grid: tuple[int, ...], maps: bool, of_all: bool = False) -> tuple[SegmentationModel, IntensityParameters]:
    generator = torch.Generator().manual_seed(3)
    location = torch.rand(3, int(np.prod(grid)), generator=generator, dtype=torch.float64) + 0.1
    location = (location / location.sum(0)).view(3, *grid)
    shape = ShapePrior(location, Ramp(3, grid), 2)
    intensity = IntensityModel([0, 1, 1], [2, 1], 1)
    weights = torch.rand(2, location[0].numel(), generator=generator, dtype=torch.float64) + 0.1
    weights = (weights / weights.sum(0)).log()
    weights = torch.cat([weights, torch.zeros_like(weights[:1])]) if of_all else weights
    theta = IntensityParameters(
        torch.tensor([[[0.1], [0.9], [0.5]]], dtype=torch.float64),
        torch.tensor([[[0.2], [0.3], [0.1]]], dtype=torch.float64),
        torch.tensor([[0.4, 0.6, 1.0]], dtype=torch.float64).log(),
        weights if maps else None,
    )
    return SegmentationModel(shape, intensity), theta


def scan_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    scan = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    return scan, torch.rand(1, *shape, generator=generator) > 0.2


@pytest.mark.parametrize(("maps", "of_all"), [(False, False), (True, False), (True, True)])
def test_marginals_against_loops(maps: bool, of_all: bool) -> None:
    model, theta = program(SHAPE, maps, of_all)
    scan, observed = scan_of(SHAPE)
    z = torch.tensor([[0.3, 0.4], [-1.0, 0.2]], dtype=torch.float64)
    found = read_out(model, z, theta, scan, observed, np.eye(4), SPACING, keep_draws=True, keep_marginals=True)
    f = model.shape_prior.log_label_probs(z).exp()
    expected = torch.zeros(3, *SHAPE, dtype=torch.float64)
    for place in np.ndindex(*SHAPE):
        flat = int(np.ravel_multi_index(place, SHAPE))
        x = scan[(0, *place)]
        normal = torch.exp(-0.5 * ((x - theta.mean[0, :, 0]) / theta.sd[0, :, 0]) ** 2) / theta.sd[0, :, 0]
        weight = theta.log_weight_maps[:2, flat].exp() if maps else theta.log_weight[0, :2].exp()  # type: ignore[index]
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
    found = read_out(
        model, torch.zeros(1, 2, dtype=torch.float64), theta, scan, observed, matrix, SPACING, keep_marginals=True
    )
    outside = torch.cat([found.marginals[:, :2], found.marginals[:, 6:]], 1)
    assert torch.equal(outside[0], torch.ones_like(outside[0]))
    assert not bool((found.marginals[1:, 2:6] == 0).any())


@pytest.mark.parametrize("name", ["marginals", "decoder"])
def test_one_slice_is_2d(name: str) -> None:
    flat_model, theta = program((4, 3), True)
    thick_model, _ = program((4, 3, 1), True)
    scan, observed = scan_of((4, 3, 1))
    z = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    flat, thick = (
        read_out(model, z, theta, scan, observed, np.eye(4), SPACING, name, keep_marginals=True)  # type: ignore[arg-type]
        for model in (flat_model, thick_model)
    )
    assert torch.equal(flat.marginals, thick.marginals)  # type: ignore[arg-type]


def test_the_location_decoder_reads_out_the_location_prior() -> None:
    model, theta = program(SHAPE, False)
    location = model.shape_prior.log_location_prior.exp()
    alone = SegmentationModel(ShapePrior(location, LocationDecoder(2, 3, SHAPE), 2), model.intensity)
    scan, observed = scan_of(SHAPE)
    z = torch.zeros(2, 2, dtype=torch.float64)
    found = read_out(alone, z, theta, scan, observed, np.eye(4), SPACING, "decoder", keep_marginals=True)
    torch.testing.assert_close(found.marginals, location, rtol=1e-10, atol=1e-12)


def test_first_argmax() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [0.0, 3.0, 4.0]])
    assert first_argmax(values).tolist() == values.argmax(0).tolist() == [0, 1, 2]


def brain(labels: int = 5, grid: tuple[int, ...] = (12, 14, 10)) -> tuple[SegmentationModel, IntensityParameters]:
    """A convolutional decoder of half resolution with an opinion, weight maps, labels that share classes."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    location = (2 * torch.randn(labels, *grid, generator=generator, dtype=torch.float64)).softmax(0)
    decoder = build_decoder("convolutional", 3, labels, grid, width=4).double()
    torch.nn.init.normal_(decoder.to_scores.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    shape = ShapePrior(location, decoder, 3)
    shape.calibrate(torch.tensor([0.1, 0.2, -0.3]).double(), torch.diag(torch.tensor([0.5, 1.0, 2.0])).double())
    intensity = IntensityModel([0, 1, 1, 2, 3][:labels], [2, 1, 1, 1], 2)
    theta = IntensityParameters(
        torch.rand(1, 5, 2, generator=generator, dtype=torch.float64),
        0.1 + torch.rand(1, 5, 2, generator=generator, dtype=torch.float64),
        torch.tensor([[0.4, 0.6, 1.0, 1.0, 1.0]], dtype=torch.float64).log(),
        torch.randn(2, int(np.prod(grid)), generator=generator, dtype=torch.float64).log_softmax(0),
    )
    return SegmentationModel(shape.requires_grad_(False), intensity), theta


def turned(angle: float, steps: tuple[float, float, float], shift: tuple[float, float, float]) -> np.ndarray:
    """Grid voxel to scan voxel: turned about two axes, scaled, shifted."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(steps) @ [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ [[1, 0, 0], [0, c, s], [0, -s, c]]
    matrix[:3, 3] = shift
    return matrix


PLACES = {
    "finer, turned": (turned(0.1, (2.0, 2.1, 1.9), (1, -2, 0)), (25, 27, 19)),
    "thick slices": (turned(0.05, (2.0, 2.0, 0.4), (0, 0, 0)), (25, 27, 4)),
    "coarser": (turned(0.0, (0.5, 0.5, 0.5), (0, 0, 0)), (6, 7, 5)),
    "shifted": (turned(0.0, (1.0, 1.0, 1.0), (2, -1, 3)), (13, 14, 12)),
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "with a label guide"])
@pytest.mark.parametrize("small", ["", "slabs", "all"], ids=["at once", "in slabs", "in pieces"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_against_the_whole_scan_at_once(
    place: tuple[np.ndarray, tuple[int, int, int]], small: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marginals, label map, entropy, evidence, counts of the drawn labels.

    In pieces: groups of draws, slabs of blocks and blocks of voxels much smaller than the scan. In slabs: of all draws.
    """
    if small == "all":
        monkeypatch.setattr(readout, "GROUP", 3 * 5 * results_blocks.BLOCK)
    if small:
        monkeypatch.setattr(readout, "SLAB", 5 * 2000)
        monkeypatch.setattr(results_blocks, "BLOCK", 400)
    model, theta = brain()
    matrix, own = place
    generator = torch.Generator().manual_seed(5)
    scan = torch.rand(2, *own, generator=generator, dtype=torch.float64)
    observed = torch.rand(2, *own, generator=generator) > 0.3
    region = torch.rand(own, generator=generator) > 0.1
    z = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    log_u = None
    if guided:
        log_u = (2 * torch.randn(5, *model.shape_prior.grid, generator=generator, dtype=torch.float64)).log_softmax(0)
    r, f, evidence = slow_read_out(model, z, theta, scan, observed, matrix, region, log_u, 0.5)
    options = {"keep_draws": True, "keep_marginals": True, "region": region, "log_u": log_u}
    for name, expected in (("marginals", r), ("decoder", f)):
        found = read_out(model, z, theta, scan, observed, matrix, SPACING, name, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found.marginals, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.log_likelihood, evidence, rtol=1e-9, atol=1e-9)
        assert torch.equal(found.labels, expected.argmax(0))
        torch.testing.assert_close(found.confidence, expected.amax(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.entropy, -torch.special.xlogy(expected, expected).sum(0))
        assert found.draws is not None and bool((found.draws[:, ~region] == 0).all())
        assert torch.equal(found.counts, torch.stack([d.flatten().long().bincount(minlength=5) for d in found.draws]))
    assert bool(found.labels[region].any())


def test_the_seed_decides_whatever_the_threads_and_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "FEWEST_BLOCKS", 0)
    model, theta = brain()
    matrix, own = PLACES["shifted"]
    scan, z = torch.rand(2, *own, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    threads, drawn = torch.get_num_threads(), []
    try:
        for count, block, share in ((1, results_blocks.BLOCK, 1.0), (2, results_blocks.BLOCK, 1.0), (1, 400, 1e-9)):
            monkeypatch.setattr(results_blocks, "BLOCK", block)
            torch.set_num_threads(count)
            torch.manual_seed(0)
            seen = torch.ones_like(scan, dtype=torch.bool)
            found = read_out(model, z, theta, scan, seen, matrix, SPACING, keep_draws=True, share=share)
            assert torch.get_num_threads() == count
            drawn.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in drawn[1:]:
        assert torch.equal(drawn[0].draws, other.draws)  # type: ignore[arg-type]
    assert torch.equal(drawn[0].log_likelihood, drawn[1].log_likelihood)


def test_a_warped_atlas_against_the_whole_grid_at_once() -> None:
    generator = torch.Generator().manual_seed(7)
    grid = (9, 10, 8)
    location = (2 * torch.randn(3, *grid, generator=generator, dtype=torch.float64)).softmax(0)
    atlas = WarpedAtlas(location, control=3, spacing=4.0)
    model = SegmentationModel(atlas, IntensityModel([0, 1, 1], [2, 1], 1))
    _, theta = program(grid, False)
    z = torch.randn(3, atlas.latent_dim, generator=generator, dtype=torch.float64)
    matrix = np.diag([1.3, 0.9, 1.1, 1.0])
    matrix[:3, 3] = 0.4, -0.3, 0.2
    scan, observed = scan_of((11, 9, 9))
    region = torch.rand(11, 9, 9, generator=generator) > 0.3
    found = read_out(model, z, theta, scan, observed, matrix, SPACING, keep_marginals=True, region=region)
    marginals, _, evidence = slow_read_out(model, z, theta, scan, observed, matrix, region)
    torch.testing.assert_close(found.marginals, marginals, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.log_likelihood, evidence, rtol=1e-8, atol=1e-8)


def test_a_power_tempers_what_the_scan_says() -> None:
    model, theta = program(SHAPE, False)
    scan, observed = scan_of(SHAPE)
    z = torch.tensor([[0.3, -0.2]], dtype=torch.float64)

    def marginals(power: float) -> torch.Tensor:
        found = read_out(model, z, theta, scan, observed, np.eye(4), SPACING, keep_marginals=True, power=power)
        assert found.marginals is not None
        return found.marginals

    f = model.shape_prior.log_label_probs(z[0]).exp()
    torch.testing.assert_close(marginals(1e-12), f, rtol=1e-8, atol=1e-10)
    odds = (marginals(1.0) / f).log()
    tempered = (marginals(0.5) / f).log()
    torch.testing.assert_close(tempered[1] - tempered[0], 0.5 * (odds[1] - odds[0]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_a_label_guide_is_pooled(share: float) -> None:
    model, theta = program(SHAPE, False)
    scan, observed = scan_of(SHAPE)
    assert not observed.all()
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    labels = model.shape_prior.num_labels
    log_u = torch.randn(labels, *SHAPE, generator=generator, dtype=torch.float64).log_softmax(0)

    def marginals(some: torch.Tensor, **options: Any) -> torch.Tensor:
        found = read_out(
            model, some, theta, scan, observed, np.eye(4), SPACING, keep_marginals=True, power=0.5, **options
        )
        assert found.marginals is not None
        return found.marginals

    expected = []
    for draw in z.split(1):
        log_r = marginals(draw).log()
        said = ((1 - share) * log_r + share * log_u).softmax(0)
        expected.append(torch.where(observed, said, log_r.exp()))
    together = marginals(z, log_u=log_u, label_share=share)
    torch.testing.assert_close(together, torch.stack(expected).mean(0), rtol=1e-7, atol=1e-9)
    # where both say the same, so does the pool
    torch.testing.assert_close(marginals(z[:1], log_u=marginals(z[:1]).log(), label_share=share), marginals(z[:1]))
    if share == 0:
        torch.testing.assert_close(together, marginals(z))


def test_the_decoders_marginals_have_no_pool() -> None:
    model, theta = program(SHAPE, False)
    scan, observed = scan_of(SHAPE)
    z = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    log_u = torch.zeros(model.shape_prior.num_labels, *SHAPE, dtype=torch.float64)
    f = model.shape_prior.log_label_probs(z[0]).exp()
    options = {"keep_marginals": True, "log_u": log_u, "label_share": 0.3}
    found = read_out(model, z, theta, scan, observed, np.eye(4), SPACING, "decoder", **options)
    torch.testing.assert_close(found.marginals, f, rtol=1e-8, atol=1e-10)


def test_a_label_that_is_rare_in_a_block_has_its_marginals_and_is_not_drawn() -> None:
    """Three labels, the third hardly ever: what it has is what ten of the draws say of it; the others are drawn."""
    grid = (8, 9, 7)
    generator = torch.Generator().manual_seed(2)
    location = torch.rand(3, *grid, generator=generator, dtype=torch.float64) + 0.5
    location[2] *= 1e-5
    atlas = WarpedAtlas(location / location.sum(0), control=3, spacing=4.0)
    model = SegmentationModel(atlas, IntensityModel([0, 1, 2], [1, 1, 1], 1))
    theta = IntensityParameters(
        torch.tensor([[[0.3], [0.6], [0.5]]], dtype=torch.float64),
        torch.full((1, 3, 1), 0.4, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
    )
    z = torch.randn(40, atlas.latent_dim, generator=generator, dtype=torch.float64)
    scan, observed = scan_of(grid)
    region = torch.ones(grid, dtype=torch.bool)
    arguments = (model, z, theta, scan, observed, np.eye(4), SPACING)
    found = read_out(*arguments, keep_draws=True, keep_marginals=True)
    marginals, _, evidence = slow_read_out(*arguments[:-1], region)
    assert found.draws is not None and found.marginals is not None
    assert found.draws.unique().tolist() == [0, 1] and not bool(found.counts[:, 2].any())
    torch.testing.assert_close(found.marginals[2], marginals[2], rtol=0.4, atol=0)
    torch.testing.assert_close(found.marginals[:2], marginals[:2], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.log_likelihood, evidence, rtol=1e-5, atol=0)
