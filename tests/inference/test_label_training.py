"""The label network's training: its loss, its batches, and targets that agree with the prior on average."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ppl_seg.guides.label_network import LabelNetwork
from ppl_seg.inference.label_training import (
    PATCH,
    LabelCrossEntropy,
    LabelTask,
    border_steepness,
    log_label_marginals,
    match_location,
)
from ppl_seg.inference.trainer import TrainingOptions, fit

GRID, LABELS = (10, 9, 8), 3


def untouched(
    scan: Tensor, observed: Tensor, targets: Tensor, box: Sequence[slice], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    here = (slice(None), slice(None), *box)
    return scan[here], observed[here], targets[here]


def population(scans: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balls at random places, bright with noise: scans, observed, their probabilities, and log p_loc of such balls."""
    random = torch.Generator().manual_seed(1)
    axes = torch.stack(torch.meshgrid(*[torch.arange(n) for n in GRID], indexing="ij"), -1).float()

    def balls(number: int) -> Tensor:
        centre = 4.0 + torch.randn(number, 1, 1, 1, 3, generator=random)
        inside = torch.sigmoid(4 * (3.0 - (axes - centre).norm(dim=-1)))
        left = torch.sigmoid(4 * (centre[..., 0] - axes[..., 0]))
        return torch.stack([1 - inside, inside * left, inside * (1 - left)], 1)

    probabilities, many = balls(scans), balls(400)
    scan = 1 - probabilities[:, :1] + 0.1 * torch.randn(scans, 1, *GRID, generator=random)
    observed = torch.ones(scans, 1, *GRID, dtype=torch.bool)
    observed[:, :, :, :, -1] = False
    return scan, observed, probabilities, many.mean(0).clamp(min=1e-3).log().log_softmax(0)


def test_loss_is_the_cross_entropy_of_observed_voxels() -> None:
    scan, observed, targets, location = population(2)
    scores = torch.randn(2, LABELS, *GRID, generator=torch.Generator().manual_seed(2), requires_grad=True)
    args = scan, observed, location, targets, tuple(slice(0, n) for n in GRID)
    loss = LabelCrossEntropy().differentiable_loss(None, lambda *_: scores, *args)
    u = (scores + location).softmax(1)
    expected = -(targets * u.log() * observed).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    (grad,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(grad, ((u - targets) * observed).detach(), rtol=1e-4, atol=1e-6)


def test_batches_are_patches_of_the_grid() -> None:
    grid = (PATCH + 5, 4, PATCH)
    scan = torch.arange(3.0 * grid[0] * grid[1] * grid[2]).view(3, 1, *grid)
    targets = torch.rand(3, LABELS, *grid)
    task = LabelTask(scan, scan >= 0, targets, torch.zeros(LABELS, *grid), 2, untouched)
    starts = set()
    for step in range(12):
        patch, _, location, labels, box = task.batch(step, torch.Generator().manual_seed(step)).args
        assert patch.shape == (2, 1, PATCH, 4, PATCH) and labels.shape[1:] == (LABELS, *patch.shape[2:])
        assert location.shape == labels.shape[1:]
        there = scan[(slice(None), slice(None), *box)]
        assert any(torch.equal(patch[0], one) for one in there)
        starts.add(box[0].start)
    assert starts > {0, 5} or len(starts) >= 4


def test_the_network_learns_what_the_targets_have_in_common() -> None:
    scan, observed, targets, location = population()
    torch.manual_seed(0)
    network = LabelNetwork(1, LABELS, GRID, width=8, levels=2)
    before = log_label_marginals(network, location, scan, observed)
    torch.testing.assert_close(before, location.expand_as(before))
    task = LabelTask(scan, observed, targets, location, 3, untouched)
    options = TrainingOptions(steps=40, learning_rate=1e-2, clip_norm=0.1, device="cpu")
    log = fit(nn.Identity(), network, LabelCrossEntropy(), task, options, progress=False)
    assert log.steps == 40
    after = log_label_marginals(network, location, scan, observed)
    single = log_label_marginals(network, location, scan[:1], observed[:1])
    torch.testing.assert_close(single, after[:1], rtol=1e-4, atol=1e-4)

    def divergence(log_u: Tensor) -> float:
        return float(((torch.xlogy(targets, targets) - targets * log_u).sum(1, keepdim=True) * observed).mean())

    assert divergence(after) < 0.5 * divergence(before)


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_that_lie_beside_the_prior_are_brought_back(shift: int) -> None:
    """Marginals all moved by a voxel: their mean agrees with the prior again, and most of the error is gone."""
    _, observed, truth, location = population(40)
    moved = truth.roll(shift, 3).clamp(min=1e-3)
    moved = moved / moved.sum(1, keepdim=True)
    matched = match_location(moved.clone(), observed, location, blur=2.0)
    torch.testing.assert_close(matched.sum(1), torch.ones_like(matched[:, 0]))
    seen = observed[:, 0].any(0)

    def away(targets: Tensor) -> float:
        return float((targets.mean(0) - truth.mean(0))[:, seen].abs().mean())

    def error(targets: Tensor) -> float:
        return float((targets - truth).abs().mean(1)[observed[:, 0]].mean())

    assert away(matched) < 0.5 * away(moved)
    assert error(matched) < error(moved)


def test_targets_that_agree_with_the_prior_stay() -> None:
    _, observed, truth, _ = population(40)
    mean = truth.mean(0).clamp(min=1e-4)
    matched = match_location(truth.clone(), observed, (mean / mean.sum(0)).log(), blur=2.0)
    assert float((matched - truth).abs()[observed.expand_as(truth)].mean()) < 0.01


def borders(places: Sequence[float], slopes: Sequence[float]) -> Tensor:
    """One plane border a scan, (n, 2, 40, 4, 3), at x = place, log r changing by its slope a voxel."""
    x = torch.arange(40.0).view(1, 40, 1, 1)
    place, slope = (torch.tensor(values).view(-1, 1, 1, 1) for values in (places, slopes))
    inside = torch.sigmoid(slope * (place - 0.5 - x)).expand(-1, 40, 4, 3)
    return torch.stack([1 - inside, inside], 1)


def test_steepness_is_the_slope_of_a_border() -> None:
    steep = border_steepness(borders([20, 20, 20], [3.0, 1.5, 0.75]), blur=6.0)[:, 0, 20, 2, 1]
    torch.testing.assert_close(steep[0] / steep[1], torch.tensor(2.0), rtol=0.1, atol=0.0)
    torch.testing.assert_close(steep[1] / steep[2], torch.tensor(2.0), rtol=0.1, atol=0.0)
    far = border_steepness(borders([20, 20], [3.0, 0.75]), blur=1.0)[:, 0, 2, 2, 1]
    torch.testing.assert_close(far, torch.ones(2), rtol=0.05, atol=0.0)  # no border: as all


def test_matching_moves_sharp_and_smeared_borders_equally_far() -> None:
    places = [18.0, 20.0, 22.0] * 4
    slopes = [4.0, 4.0, 4.0, 0.8, 0.8, 0.8] * 2
    location = borders(places, [4.0] * 12).mean(0).clamp(min=1e-6).log().log_softmax(0)
    found = borders([place + 1.0 for place in places], slopes)
    matched = match_location(found.clone(), torch.ones(12, 1, 40, 4, 3, dtype=torch.bool), location, blur=6.0)
    moved = (found - matched)[:, 1].sum(1).mean((1, 2))  # voxels that a border went back, of 1
    sharp, smeared = moved[torch.tensor(slopes) == 4.0].mean(), moved[torch.tensor(slopes) == 0.8].mean()
    assert 0.6 < float(sharp) < 1.4 and 0.6 < float(smeared) < 1.4
    assert abs(float(sharp - smeared)) < 0.3


def test_matching_asks_for_nothing_that_so_few_scans_cannot_show() -> None:
    """A thousand label maps reach places that forty sharp scans do not: no structure is made up there."""
    _, observed, truth, _ = population(40)
    sharp = torch.nn.functional.one_hot(truth.argmax(1), LABELS).movedim(-1, 1).clamp(1e-9, 1.0)
    location = 0.99 * sharp.mean(0)
    location[1] += 0.01  # it has been seen everywhere
    matched = match_location(sharp.clone(), observed, location.log(), blur=2.0)
    assert float((matched - sharp).abs()[:, :, 7:].mean()) < 1e-4  # far from all
