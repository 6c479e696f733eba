"""q(z|s), q(z|x), q(z) of a scan: what they see, what they don't, and where they start."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from torch import Tensor

from ppl_seg.guides.encoders import ConvolutionalEncoder
from ppl_seg.guides.families import FAMILIES, build_family
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.per_scan import PerScanGuide
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.networks import build_scan_guide
from ppl_seg.models.warped_atlas import WarpedAtlas

GRIDS = [(12, 9), (8, 9, 7)]


def encoder(in_channels: int, grid: tuple[int, ...], outputs: int) -> ConvolutionalEncoder:
    network = ConvolutionalEncoder(in_channels, grid, outputs, width=4).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return network


def scan_guide(grid: tuple[int, ...], channels: int = 2, name: str = "mean-field") -> ScanGuide:
    family = build_family(name, 3).double()
    return ScanGuide(encoder(2 * channels, grid, family.num_parameters), family)


def label_guide(grid: tuple[int, ...], labels: int = 4) -> LabelMapGuide:
    family = build_family("mean-field", 3).double()
    return LabelMapGuide(encoder(labels, grid, family.num_parameters), family, labels)


def scan_data(grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    observed = (torch.arange(2 * math.prod(grid)) % 3 != 1).reshape(2, 1, *grid)
    return torch.randn(2, 2, *grid, dtype=torch.float64), observed


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_scan_guide_samples_z_in_the_scans_plate(name: str, grid: tuple[int, ...]) -> None:
    guide = scan_guide(grid, name=name)
    trace = poutine.trace(guide).get_trace(*scan_data(grid))
    site = trace.nodes["z"]
    assert site["value"].shape == (2, 3) and site["value"].dtype == torch.float64
    assert [frame.name for frame in site["cond_indep_stack"]] == ["scans"]
    assert site["cond_indep_stack"][0].dim == -1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("content", [math.nan, math.inf, 1e9])
def test_scan_guide_does_not_see_unobserved_voxels(grid: tuple[int, ...], content: float) -> None:
    guide, (scan, observed) = scan_guide(grid), scan_data(grid)
    other = torch.where(observed, scan, content)
    raw, same = guide.raw(scan, observed), guide.raw(other, observed)
    assert torch.equal(raw, same)
    grads = [torch.autograd.grad(r.square().sum(), list(guide.parameters())) for r in (raw, same)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_scan_guide_sees_the_mask_and_the_scan() -> None:
    guide, (scan, observed) = scan_guide((12, 9)), scan_data((12, 9))
    raw = guide.raw(scan, observed)
    zeroed = torch.where(observed, scan, 0.0)
    assert not torch.equal(raw, guide.raw(zeroed, torch.ones_like(observed)))
    assert not torch.equal(raw, guide.raw(scan + 1, observed))


def test_scan_guide_takes_masks_per_channel_or_none() -> None:
    guide, (scan, observed) = scan_guide((12, 9)), scan_data((12, 9))
    raw = guide.raw(scan, observed)
    assert torch.equal(raw, guide.raw(scan, observed.expand_as(scan)))
    everything = torch.ones_like(observed)
    draws = []
    for mask in (None, everything):
        torch.manual_seed(0)
        draws.append(guide(scan, mask))
    assert torch.equal(*draws)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_batch_is_its_scans(grid: tuple[int, ...]) -> None:
    guide, (scan, observed) = scan_guide(grid), scan_data(grid)
    raw = guide.raw(scan, observed)
    for b in range(2):
        torch.testing.assert_close(
            raw[b : b + 1], guide.raw(scan[b : b + 1], observed[b : b + 1]), rtol=1e-10, atol=1e-12
        )
    labels = torch.randint(0, 4, (2, *grid))
    stage_1 = label_guide(grid)
    together = stage_1.posterior(labels, observed)
    alone = stage_1.posterior(labels[1:], observed[1:])
    torch.testing.assert_close(together.mean[1:], alone.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.variance[1:], alone.variance, rtol=1e-10, atol=1e-12)


def test_label_map_guide_does_not_see_unobserved_voxels() -> None:
    grid = (12, 9)
    guide, (_, observed) = label_guide(grid), scan_data(grid)
    labels = torch.randint(0, 4, (2, *grid))
    other = torch.where(observed[:, 0], labels, 255)  # not even a label
    assert torch.equal(guide.posterior(labels, observed).mean, guide.posterior(other, observed).mean)
    seen = torch.where(observed[:, 0], (labels + 1) % 4, labels)
    assert not torch.equal(guide.posterior(labels, observed).mean, guide.posterior(seen, observed).mean)


def test_label_map_guide_knows_labels_by_name_not_by_number() -> None:
    """Any integer type gives the same posterior."""
    grid = (12, 9)
    guide, (_, observed) = label_guide(grid), scan_data(grid)
    labels = torch.randint(0, 4, (2, *grid))
    expected = guide.posterior(labels, observed).mean
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(guide.posterior(labels.to(dtype), observed).mean, expected)


@pytest.mark.parametrize("grid", [*GRIDS, (3, 2), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_amortised_guides_start_near_the_prior(name: str, grid: tuple[int, ...]) -> None:
    """On any grid, tiny ones too; one nat per dimension away at most."""
    family = build_family(name, 3)
    guide = ScanGuide(ConvolutionalEncoder(2, grid, family.num_parameters, width=4), family)
    q = guide.posterior(torch.randn(2, 1, *grid), torch.ones(2, 1, *grid, dtype=torch.bool))
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)
    assert float(torch.distributions.kl_divergence(q, prior).max()) < 3.0


@pytest.mark.parametrize("name", FAMILIES)
def test_per_scan_guide_is_its_raw_numbers(name: str) -> None:
    family = build_family(name, 3).double()
    raw = torch.randn(2, family.num_parameters, dtype=torch.float64)
    guide = PerScanGuide(family, raw)
    torch.testing.assert_close(guide.posterior().mean, family(raw).mean)
    assert [tuple(p.shape) for p in guide.parameters()] == [(2, family.num_parameters)]
    with torch.no_grad():
        guide.raw.add_(1.0)
    assert not torch.equal(guide.raw, raw)  # the caller's tensor is not shared
    trace = poutine.trace(guide).get_trace(None, None, None)
    assert trace.nodes["z"]["value"].shape == (2, 3)


def test_bf16_networks_hand_over_float32() -> None:
    family = build_family("mean-field", 3)
    guide = ScanGuide(ConvolutionalEncoder(2, (12, 9), family.num_parameters, width=4), family)
    with torch.autocast("cpu", torch.bfloat16):
        raw = guide.raw(torch.randn(2, 1, 12, 9), torch.ones(2, 1, 12, 9, dtype=torch.bool))
        z = guide(torch.randn(2, 1, 12, 9))
    assert raw.dtype == torch.float32 and z.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_keeps_float32_under_bf16_autocast(name: str) -> None:
    """The KL is a difference of large terms: the family's own algebra must not run in bfloat16."""
    family = build_family(name, 8)
    raw = torch.randn(3, family.num_parameters)
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(8), torch.ones(8)), 1)

    def kl_and_draw() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        q = family(raw)
        return torch.distributions.kl_divergence(q, prior), q.rsample()

    expected, expected_z = kl_and_draw()
    with torch.autocast("cpu", torch.bfloat16):
        kl, z = kl_and_draw()
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, expected_z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scan_guide_of_an_atlas_starts_at_the_template_and_sees_where_things_are(name: str) -> None:
    atlas = WarpedAtlas(torch.full((3, 96, 24), 1 / 3), control=3)
    guide = build_scan_guide(atlas, name, 1, width=4)
    scan, observed = torch.randn(2, 1, 96, 24), torch.ones(2, 1, 96, 24, dtype=torch.bool)
    q = guide.posterior(scan, observed)
    assert not q.mean.any() and float(q.variance.max()) < 0.1
    torch.nn.init.normal_(guide.scan_encoder.to_raw.weight)  # type: ignore[union-attr, arg-type]
    changed = scan.clone()
    changed[:, :, :8] += 3.0
    numbers = ("mean", "variance", "cov_factor", "cov_diag") if name == "low-rank" else ("mean", "variance")
    for number in numbers:
        there, here = (getattr(guide.posterior(x, observed), number).detach() for x in (changed, scan))
        moved = (there - here).unflatten(1, (2, *atlas.control_grid))
        assert moved[:, :, :2].any() and not moved[:, :, 20:].any(), number


def test_a_per_scan_guide_takes_what_the_program_takes() -> None:
    """By position or by name, as users call either."""
    family = build_family("mean-field", 2)
    guide = PerScanGuide(family, torch.zeros(3, family.num_parameters))
    for words in ({"theta": None}, {"scan": None, "observed": None, "theta": None}):
        assert guide(**words).shape == (3, 2)
    assert guide(None, None, None).shape == (3, 2)
