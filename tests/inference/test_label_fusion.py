"""Local label fusion: weights against a slow reference, and what a template of weighed label maps is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from ppl_seg.inference.label_fusion import DOUBT, map_weights
from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.warped_atlas import BLUR, TRUST, WarpedAtlas

GRID, M, MAPS = (12, 10, 9), 3, 4
MEANS = (0.2, 0.5, 0.8)


def label_maps(grid: tuple[int, ...] = GRID) -> torch.Tensor:
    """A ball of label 1 in label 0, of another size in each map, with a corner of label 2: (n, *grid)."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in grid]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    maps = torch.stack([(radius < 2 + n).long() for n in range(MAPS)])
    maps[:, :3, :3] = 2
    return maps


def atlas(grid: tuple[int, ...] = GRID) -> WarpedAtlas:
    """The label maps' own, each as it is."""
    maps = label_maps(grid)
    counts = torch.stack([(maps == m).double().mean(0) for m in range(M)])
    location = 0.97 * counts + 0.01
    made = WarpedAtlas(location, control=3, spacing=2.0, label_maps=MAPS)
    made.carry(maps, torch.zeros(MAPS, made.latent_dim, dtype=torch.float64))
    return made


def program(shape: WarpedAtlas) -> SegmentationModel:
    return SegmentationModel(shape, IntensityModel([0, 1, 2], (1, 1, 1), 1), 0.1).double()


def theta() -> IntensityParameters:
    mean = torch.tensor(MEANS, dtype=torch.float64).view(1, M, 1)
    return IntensityParameters(mean, torch.full_like(mean, 0.1), torch.zeros(1, M, dtype=torch.float64))


def scan_of(labels: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A scan of a label map, and what of it is observed, (1, 1, *grid)."""
    noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scan = torch.tensor(MEANS, dtype=torch.float64)[labels] + 0.1 * noise
    observed = torch.ones_like(scan, dtype=torch.bool)
    observed[..., -1] = False
    return scan[None, None], observed[None, None]


@pytest.mark.parametrize("grid", [GRID, (12, 10), (12, 10, 1)])
def test_weights_against_a_slow_reference(grid: tuple[int, ...]) -> None:
    shape, power, sd = atlas(grid), 0.05, 1.5
    z = 0.5 * torch.randn(shape.latent_dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scan, observed = scan_of(label_maps(grid)[1])
    if grid[-1] == 1:
        observed[...] = True
    found = map_weights(program(shape), z, scan, observed, theta(), sd, power)
    density = np.stack([np.exp(-0.5 * ((scan[0, 0].numpy() - mean) / 0.1) ** 2) for mean in MEANS])
    density = np.where(observed[0, 0].numpy(), density / density.max(0), 1.0)
    places = shape.places(-z, slice(None)).numpy()
    there = np.stack([map_coordinates(d, places, order=1, mode="nearest").reshape(grid) for d in density])
    usual = (shape.log_location_prior.exp().numpy() * there).sum(0)
    axes = tuple(axis for axis, n in enumerate(grid) if n > 1)
    scores = []
    for labels in shape.label_maps.long().numpy():
        evidence = np.log((1 - DOUBT) * np.take_along_axis(there, labels[None], 0)[0] + DOUBT * usual)
        blurred = gaussian_filter(evidence, sd, mode="nearest", truncate=3.0, axes=axes)
        scores.append(power * (2 * np.pi * sd**2) ** (len(axes) / 2) * blurred)
    expected = np.exp(scores - np.max(scores, 0))
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(0), rtol=1e-8, atol=1e-12)


def test_equal_weights_leave_the_template() -> None:
    shape = atlas()
    weights = torch.full((MAPS, *GRID), 1 / MAPS, dtype=torch.float64)
    torch.testing.assert_close(shape.reweighted(weights).log_location_prior, shape.log_location_prior)


def test_a_template_counts_its_maps_as_they_weigh() -> None:
    shape = atlas()
    weights = torch.rand(MAPS, *GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights /= weights.sum(0)
    found = shape.reweighted(weights)
    maps = label_maps()
    ratio = []
    for m in range(M):
        counts = [(w * (maps == m)).sum(0).numpy() for w in (weights, torch.full_like(weights, 1 / MAPS))]
        now, before = (gaussian_filter(c, BLUR, mode="nearest", truncate=3.0) for c in counts)
        ratio.append((now + TRUST) / (before + TRUST))
    expected = shape.log_location_prior.exp().numpy() * np.stack(ratio)
    np.testing.assert_allclose(found.log_location_prior.exp().numpy(), expected / expected.sum(0), rtol=1e-6)
    assert found.label_maps is shape.label_maps and found.velocity_sd is shape.velocity_sd
    assert not torch.equal(found.log_location_prior, shape.log_location_prior)  # the model's own stays


@pytest.mark.parametrize("true", range(MAPS))
def test_the_map_that_a_scan_is_of_counts_most_and_explains_it_better(true: int) -> None:
    shape, labels = atlas(), label_maps()[true]
    z = torch.zeros(shape.latent_dim, dtype=torch.float64)
    arguments = (program(shape), z, *scan_of(labels), theta(), 2.0, 0.2)
    middle = (slice(None), *[n // 2 for n in GRID])
    weights = map_weights(*arguments)
    assert int(weights[middle].argmax()) == true
    of_truth = [a.log_location_prior.gather(0, labels[None]).mean() for a in (shape, shape.reweighted(weights))]
    assert of_truth[1] > of_truth[0]


def test_with_no_power_all_count_the_same() -> None:
    shape = atlas()
    z = torch.zeros(shape.latent_dim, dtype=torch.float64)
    weights = map_weights(program(shape), z, *scan_of(label_maps()[0]), theta(), 2.0, 0.0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / MAPS))
