"""The label network's training on simulated scans: its batches, its loss, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.simulated_anatomy import AnatomySimulator
from ppl_seg.data.simulated_scans import ScanSimulator
from ppl_seg.guides.label_network import AnyContrastNetwork
from ppl_seg.inference.label_sleep import FEWEST, OVERLAP, LabelOverlapLoss, SimulatedScanTask, label_shares
from ppl_seg.inference.label_training import PATCH, log_label_marginals
from ppl_seg.inference.trainer import TrainingOptions, fit

GRID = (16, 12, 10)
ENTRIES = [(0, "Background"), (2, "Left-Cerebral-White-Matter"), (41, "Right-Cerebral-White-Matter")]
TABLE = LabelTable(tuple(make_entry(index, name) for index, name in [*ENTRIES, (4, "Left-Lateral-Ventricle")]))


def label_maps() -> Tensor:
    """(3, *2·grid): two halves and a hole on the left, a little different."""
    maps = torch.zeros(3, *(2 * n for n in GRID), dtype=torch.uint8)
    for i in range(3):
        maps[i, 4 + i : 16, 4:20, 4:16], maps[i, 16 : 28 + i, 4:20, 4:16] = 1, 2
        maps[i, 8:13, 8 + i : 14, 6:14] = 3
    return maps


def log_location() -> Tensor:
    shares = torch.stack([label_shares(one.long(), 4) for one in label_maps()])
    return (shares.mean(0) + 0.01).log().log_softmax(0)


def task(maps: Tensor, location: Tensor) -> SimulatedScanTask:
    anatomy, scans = AnatomySimulator(maps.to(torch.int16), TABLE, 1.0), ScanSimulator(TABLE, "brain")
    return SimulatedScanTask(lambda box, random: scans.draw(anatomy.draw(box, random), random), location)


def test_shares_are_counts() -> None:
    labels = torch.randint(0, 3, (4, 6, 2), generator=torch.Generator().manual_seed(0))
    shares = label_shares(labels, 3)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 1))):
        x, y, z = (2 * place).tolist()
        counts = labels[x : x + 2, y : y + 2, z : z + 2].flatten().bincount(minlength=3)
        torch.testing.assert_close(shares[(slice(None), *place.tolist())], counts / 8)


def test_batches_are_drawn_by_their_generator() -> None:
    made = task(label_maps(), log_location())
    for step in range(4):
        one, again = (made.batch(step, torch.Generator().manual_seed(step)) for _ in range(2))
        scan, observed, location, targets, box = one.args
        assert torch.equal(scan, again.args[0]) and torch.equal(targets, again.args[3])
        assert scan.shape == observed.shape == (1, 1, *GRID) and targets.shape == (1, 4, *GRID)
        assert location.shape == (4, *GRID) and one.size == observed.sum()
        torch.testing.assert_close(targets.sum(1), torch.ones(1, *GRID))


def test_a_large_grid_comes_in_patches() -> None:
    sizes = (PATCH + 6, PATCH, 8)
    large = torch.zeros(1, *(2 * n for n in sizes), dtype=torch.uint8)
    large[:, 20:-20, 20:-20, 2:-2] = 1
    made = task(large, torch.zeros(4, *sizes))
    starts = set()
    for step in range(8):
        args = made.batch(step, torch.Generator().manual_seed(step)).args
        assert args[0].shape == (1, 1, PATCH, PATCH, 8) == (1, 1, *args[2].shape[1:])
        starts.add(args[4][0].start)
    assert len(starts) > 1


def test_the_loss_in_plain_loops() -> None:
    random = torch.Generator().manual_seed(4)
    scores = torch.randn(1, 4, *GRID, generator=random, dtype=torch.float64, requires_grad=True)
    scan, observed, location, targets, box = task(label_maps(), log_location()).batch(0, random).args
    loss = LabelOverlapLoss().differentiable_loss(None, lambda *_: scores, scan, observed, location, targets, box)
    seen = observed[0, 0]
    u = (scores.float() + location).softmax(1)[0][:, seen].double()
    wanted = targets[0][:, seen].double()
    expected = -(wanted * u.log()).sum()
    present = [m for m in (1, 2, 3) if wanted[m].sum() > FEWEST]
    assert {1, 2} <= set(present)
    dice = [2 * (u[m] * wanted[m]).sum() / (u[m] ** 2 + wanted[m] ** 2).sum() for m in present]
    expected = expected + OVERLAP * seen.sum() * (1 - torch.stack(dice)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss, scores)
    assert not grad[0][:, ~seen].any() and grad[0][:, seen].abs().max() > 0


def test_the_network_learns_from_simulated_scans() -> None:
    torch.manual_seed(0)
    network = AnyContrastNetwork(log_location(), TABLE.class_of_label, width=8, levels=2, features=4, hidden=8)
    made = task(label_maps(), network.location(log_location()))
    batches = [made.batch(0, torch.Generator().manual_seed(1000 + seed)).args for seed in range(8)]

    def divergence() -> float:
        """Mean cross-entropy of scans that were not learned from."""
        total = 0.0
        for scan, observed, _, targets, _ in batches:
            log_u = log_label_marginals(network, log_location(), scan, observed)
            total -= float((targets * log_u).sum(1)[observed[:, 0]].mean()) / len(batches)
        return total

    before = divergence()
    options = TrainingOptions(steps=60, learning_rate=5e-3, device="cpu")
    fit(nn.Identity(), network, LabelOverlapLoss(), made, options, progress=False)
    assert divergence() < 0.8 * before


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_are_averaged_where_they_are_observed(channels: int) -> None:
    torch.manual_seed(0)
    network = AnyContrastNetwork(log_location(), TABLE.class_of_label, width=4, levels=2, features=4, hidden=4)
    nn.init.normal_(network.to_scores.weight)
    scan, observed = torch.rand(2, channels, *GRID), torch.ones(2, channels, *GRID, dtype=torch.bool)
    observed[:, 0, :8] = False
    together = network(scan, observed)
    each = torch.stack([network(scan[:, c : c + 1], observed[:, c : c + 1]) for c in range(channels)])
    if channels > 1:
        torch.testing.assert_close(together[:, :, :8], each[1:, :, :, :8].mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:, :, 8:], each.mean(0)[:, :, 8:], rtol=1e-4, atol=1e-4)
