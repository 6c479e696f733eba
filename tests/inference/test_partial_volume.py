"""Partial volume: voxels that fluid and tissue share, against a phantom whose shares are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_seg.data.loading import nearest_voxels
from ppl_seg.inference.expectation import expectation_maximisation
from ppl_seg.inference.networks import build_shape_prior
from ppl_seg.inference.partial_volume import WIDTH, OwnVoxels, _pure_fluid, learn_beside_shared, with_shared_voxels
from ppl_seg.models.guided_intensity import with_label_factor, with_log_factor
from ppl_seg.models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ppl_seg.models.segmentation import SegmentationModel

pytestmark = pytest.mark.usefixtures("float64")

THICK = 1.5  # own voxels, of a cortex
SIDE, FINE = 12, 5  # voxels along an axis; points along an axis in each
GRID = (SIDE, SIDE, SIDE)
MODEL = IntensityModel([0, 1, 2, 2], [1, 2, 2])  # background, tissue, and two labels of fluid
FLUID = 2


def shares(radius: float) -> Tensor:
    """How much of each voxel lies in a ball, (*GRID)."""
    axis = (torch.arange(SIDE * FINE) + 0.5) / FINE - SIDE / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    parts = (distance < radius).double().view(SIDE, FINE, SIDE, FINE, SIDE, FINE)
    return parts.mean((1, 3, 5))


def theta(fluid: float = 0.1, border: float = 0.45, tissue: float = 0.8) -> IntensityParameters:
    """One scan's, of one channel: fluid learned its border, too."""
    mean = torch.tensor([0.0, tissue - 0.02, tissue + 0.02, fluid, border]).view(1, -1, 1)
    return IntensityParameters(mean, torch.full_like(mean, 0.08), torch.tensor([[1.0, 0.5, 0.5, 0.6, 0.4]]).log())


def phantom(radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """A ball of fluid in tissue: log f (M, J) of a template that knows it within two voxels, scan and observed."""
    share = shares(radius)
    expected = torch.stack([shares(radius + more) for more in (-2, -1, 0, 1, 2)]).mean(0).flatten()
    f = torch.stack([torch.full_like(expected, 1e-6), 1 - expected, expected / 2, expected / 2]).clamp(min=1e-6)
    scan = (0.1 * share + 0.8 * (1 - share)).flatten() + 0.02 * torch.randn(SIDE**3)
    return (f / f.sum(0)).log(), scan.view(1, 1, -1), torch.ones(1, 1, SIDE**3, dtype=torch.bool)


def responsibilities(
    log_f: Tensor, model: IntensityModel, scan: Tensor, observed: Tensor, at: IntensityParameters
) -> Tensor:
    return (log_f + model.label_log_prob(scan, observed, at, 0.5)[0]).softmax(0)


@pytest.mark.parametrize("radius", [1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
def test_shared_voxels_belong_to_what_they_hold_more_of(radius: float) -> None:
    """A Gaussian that learned the border makes fluid of it; small ventricles come out half as large again."""
    log_f, scan, observed = phantom(radius)
    learned, share = theta(border=0.6), shares(radius).flatten()
    before = responsibilities(log_f, MODEL, scan, observed, learned)
    model, at = with_shared_voxels(MODEL, learned, before, FLUID, GRID, 1.0)
    after = responsibilities(log_f, model, scan, observed, at)
    clear = (share - 0.5).abs() > 0.05
    wrong = [((r[2:].sum(0) > 0.5) != (share > 0.5))[clear].sum() for r in (before, after)]
    size = [float(r[2:].sum() / share.sum()) for r in (before, after)]
    assert wrong[1] <= wrong[0] // 10, wrong
    assert size[0] > 1.25 and abs(size[1] - 1) < 0.16, size


def test_weights_are_of_each_class_and_depend_on_fluid_nearby() -> None:
    log_f, scan, observed = phantom(3.0)
    r = responsibilities(log_f, MODEL, scan, observed, theta())
    model, at = with_shared_voxels(MODEL, theta(), r, FLUID, GRID, 1.0)
    assert model.components == (1, 3, 3) and at.log_weight_maps is not None
    maps = at.log_weight_maps.exp()
    for s in model.slices:
        torch.testing.assert_close(maps[s].sum(0), torch.ones(SIDE**3))
    of_tissue, of_fluid = (maps[model.slices[n]][-1].view(GRID) for n in (1, FLUID))
    assert float(of_tissue.max()) == float(of_fluid.max()) == 0.5
    assert float(of_tissue[0, 0, 0]) < 1e-3 and float(of_fluid[6, 6, 6]) < float(of_fluid[6, 6, 9])
    uniform = torch.linspace(0, 0.5, 100_001)
    assert WIDTH == pytest.approx(float(uniform.std()), rel=1e-3)
    for n, mean in ((1, 0.8 - 0.7 / 4), (FLUID, 0.1 + 0.7 / 4)):
        last = model.slices[n].stop - 1
        assert float(at.mean[0, last, 0]) == pytest.approx(mean)
        assert float(at.sd[0, last, 0]) == pytest.approx(0.7 * WIDTH)
    pure, border = maps[model.slices[FLUID]][:2]
    # of the Gaussian at 0.45, the middle, half is fluid's
    torch.testing.assert_close(border / pure, torch.full_like(border, 0.5 * 0.4 / 0.6), rtol=1e-3, atol=0)


def test_contrast_is_not_asked_for() -> None:
    """Bright fluid in dark tissue is the same, and two channels of which one shows nothing."""
    log_f, scan, observed = phantom(3.0)
    plain, turned = theta(), theta(0.9, 0.55, 0.2)
    r = responsibilities(log_f, MODEL, scan, observed, plain)
    found = [with_shared_voxels(MODEL, at, r, FLUID, GRID, 1.0) for at in (plain, turned)]
    scores = [m.label_log_prob(x, observed, at)[0, 1:] for (m, at), x in zip(found, (scan, 1 - scan), strict=True)]
    torch.testing.assert_close(*scores)
    two = IntensityModel(MODEL.classes, MODEL.components, 2)
    blind = torch.full_like(plain.mean, 0.5)
    at = IntensityParameters(torch.cat([plain.mean, blind], -1), plain.sd.expand(-1, -1, 2), plain.log_weight)
    _, both = with_shared_voxels(two, at, r, FLUID, GRID, 1.0)
    torch.testing.assert_close(both.mean[..., :1], found[0][1].mean)
    torch.testing.assert_close(both.mean[..., 1:], torch.full_like(both.mean[..., 1:], 0.5))
    torch.testing.assert_close(both.log_weight_maps, found[0][1].log_weight_maps)


def test_nothing_changes_where_there_is_no_fluid() -> None:
    r = torch.zeros(4, SIDE**3)
    r[1] = 1.0
    at = theta()
    assert with_shared_voxels(MODEL, at, r, FLUID, GRID, 1.0) == (MODEL, at)


def test_pure_fluid_is_the_gaussian_farthest_from_tissue_that_is_not_rare() -> None:
    mean, sd = torch.tensor([[-0.5], [0.1], [0.6], [1.2]]), torch.full((4, 1), 0.1)
    pure, mostly = _pure_fluid(mean, sd, torch.tensor([0.05, 0.5, 0.4, 0.05]), torch.tensor([0.8]))
    assert float(pure) == 0.1  # what is rare and far may be of anything
    beyond = [1 - 0.5 * math.erfc((0.45 - m) / 0.1 / math.sqrt(2)) for m in (-0.5, 0.1, 0.6)]
    torch.testing.assert_close(mostly, torch.tensor([*beyond, 1e-6]))


def beside_fluid(share: Tensor) -> tuple[SegmentationModel, IntensityParameters]:
    """A program of fluid, cortex and white matter that knows their shares, (3, *grid), within a voxel; a θ."""
    near = torch.stack([share.roll(k, 1) for k in (-1, 0, 1)]).mean(0)[:, 1:-1]
    expected = torch.cat([share[:, :1], near, share[:, -1:]], 1).clamp(min=1e-3)
    location = torch.cat([torch.full((1, *share.shape[1:]), 1e-3), expected])
    prior = build_shape_prior(location / location.sum(0), "location", 1)
    mean = torch.tensor([0.9, 0.15, 0.55, 0.6]).view(1, 4, 1)
    start = IntensityParameters(mean, torch.full_like(mean, 0.08), torch.zeros(1, 4))
    return SegmentationModel(prior, IntensityModel([0, 1, 2, 3], [1] * 4), 0.4), start


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("across", [(12, 12), (48, 3), (144, 1)], ids=["block", "three slices", "a slice"])
def test_a_thin_cortex_beside_fluid_is_learned_from_what_is_its_own(across: tuple[int, int], guided: bool) -> None:
    """As in FLAIR: fluid 0.1, cortex of two voxels 0.68, white matter 0.6; all of the cortex' outer half is shared.

    Without Gaussians of shared voxels the cortex comes out too dark, its contrast a third of what it is.
    """
    grid, generator = (16, *across), torch.Generator().manual_seed(0)
    border = 5.5 + torch.rand(grid[1:], generator=generator)  # where fluid ends, voxels from the first face
    place = torch.arange(16.0)[:, None, None]
    fluid, white = (border - place).clamp(0, 1), (place >= 8).double().expand(grid)
    share = torch.stack([fluid, 1 - fluid - white, white])
    truth = torch.tensor([0.1, 0.68, 0.6])
    scan = torch.einsum("n,nxyz->xyz", truth, share) + 0.02 * torch.randn(grid, generator=generator)
    model, start = beside_fluid(share)
    data = (scan[None, None], torch.ones(1, 1, *grid, dtype=torch.bool))
    if guided:
        model, data = with_label_factor(model), with_log_factor(*data, torch.zeros(1, 4, *grid))
    z, pseudo = torch.zeros(2, 1, 1), PseudoCounts(sd=0.08, sd_share=1.0)
    plain = expectation_maximisation(model, *data, start, z, 30, pseudo=pseudo).mean[0, 1:, 0]
    found = learn_beside_shared(model, z, *data, start, 1, 1.0, pseudo, 12).mean[0, 1:, 0]
    assert float(plain[1]) < 0.64
    torch.testing.assert_close(found, truth, atol=0.02, rtol=0)


def test_a_cortex_as_thin_as_a_voxel_of_the_grid_is_learned_from_the_scans_own() -> None:
    """Learned from voxels of the grid, none of which holds cortex alone, it is hardly brighter than white matter."""
    fine, generator = (32, 24, 24), torch.Generator().manual_seed(0)
    border = 12 + 2 * torch.rand(fine[1:], generator=generator)  # where fluid ends, own voxels from the first face
    place = torch.arange(32.0)[:, None, None]
    fluid = (border - place).clamp(0, 1)
    share = torch.stack([fluid, (border + THICK - place).clamp(0, 1) - fluid, (place + 1 - border - THICK).clamp(0, 1)])
    truth = torch.tensor([0.1, 0.68, 0.6])
    own = torch.einsum("n,nxyz->xyz", truth, share) + 0.02 * torch.randn(fine, generator=generator)
    coarse = [t.unflatten(-3, (16, 2)).unflatten(-2, (12, 2)).unflatten(-1, (12, 2)) for t in (own, share)]
    scan, of_grid = (t.mean((-5, -3, -1)) for t in coarse)
    grid = tuple(scan.shape)
    model, start = beside_fluid(of_grid)
    data = (scan[None, None], torch.ones(1, 1, *grid, dtype=torch.bool))
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = 0.5
    voxels = OwnVoxels(*nearest_voxels(own[None], torch.ones(1, *fine, dtype=torch.bool), matrix, grid))
    words = (model, torch.zeros(2, 1, 1), *data, start, 1, 1.0, PseudoCounts(sd=0.08, sd_share=1.0), 16)
    of_grid, of_own = (learn_beside_shared(*words, own_voxels).mean[0, 1:, 0] for own_voxels in (None, voxels))
    assert float(of_grid[1] - of_grid[2]) < 0.03
    torch.testing.assert_close(of_own, truth, atol=0.02, rtol=0)
