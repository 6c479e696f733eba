"""The label network's training: its loss, its batches, and what the network makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_seg.guides.label_network import LabelNetwork
from ppl_seg.inference.label_training import (
    PATCH,
    LabelCrossEntropy,
    LabelTask,
    log_label_marginals,
)
from ppl_seg.inference.trainer import TrainingOptions, fit
from tests.inference.balls import GRID, LABELS, population


def untouched(
    scan: Tensor, observed: Tensor, targets: Tensor, box: Sequence[slice], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    here = (slice(None), slice(None), *box)
    return scan[here], observed[here], targets[here]


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
