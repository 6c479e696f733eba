"""q(s|x): what the network sees, what it does not, and where it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_seg.guides.label_network import AnyContrastNetwork, LabelNetwork, pack, unpack

GRIDS = [(12, 9), (8, 9, 7), (5, 6, 1)]
LABELS = 4


def network(grid: tuple[int, ...]) -> LabelNetwork:
    torch.manual_seed(0)
    made = LabelNetwork(2, LABELS, grid, width=4).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return made


def scans(grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    observed = (torch.arange(2 * math.prod(grid)) % 3 != 1).reshape(2, 1, *grid)
    return torch.randn(2, 2, *grid, dtype=torch.float64), observed


@pytest.mark.parametrize("grid", GRIDS)
def test_cells_become_channels_and_voxels_again(grid: tuple[int, ...]) -> None:
    volume = torch.randn(2, 3, *grid)
    cells = pack(volume)
    assert cells.shape == (2, 3 * 2 ** len(grid), *(-(-n // 2) for n in grid))
    assert torch.equal(unpack(cells, grid), volume)
    first = tuple(slice(None, None, 2) for _ in grid)
    assert torch.equal(cells[:, :: 2 ** len(grid)], volume[(slice(None), slice(None), *first)])


@pytest.mark.parametrize("grid", GRIDS)
def test_says_the_location_prior_before_it_has_learned(grid: tuple[int, ...]) -> None:
    scan, observed = scans(grid)
    scores = LabelNetwork(2, LABELS, grid, width=4).double()(scan, observed)
    assert scores.shape == (2, LABELS, *grid)
    assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize("grid", GRIDS)
def test_unobserved_voxels_and_the_rest_of_the_batch_have_no_influence(grid: tuple[int, ...]) -> None:
    scan, observed = scans(grid)
    made = network(grid)
    scores = made(scan, observed)
    assert scores.std() > 0
    spoiled = torch.where(observed, scan, math.nan)
    assert torch.equal(made(spoiled, observed), scores)
    torch.testing.assert_close(made(scan[:1], observed[:1]), scores[:1], rtol=1e-10, atol=1e-10)


def test_a_box_knows_where_on_the_grid_it_lies() -> None:
    grid = (8, 9, 7)
    made, cells = network(grid), torch.zeros(1, 1, 2, 3, 2, dtype=torch.float64)
    whole = made._places(torch.zeros(1, 1, 4, 5, 4, dtype=torch.float64), None)
    box = (slice(2, 6), slice(4, 9), slice(0, 4))
    assert torch.equal(made._places(cells, box), whole[:, :, 1:3, 2:5, 0:2])
    scan, observed = scans(grid)
    inside = (slice(None), slice(None), *box)
    assert made(scan[inside], observed[inside], box).shape == (2, LABELS, 4, 5, 4)


def test_what_scores_are_added_to_is_saved_with_them() -> None:
    """A prior of heads becomes one of brains, with another location prior, when it is fitted to brains."""
    grid, classes = (8, 9, 7), (0, 1, 2, 1)
    head, brain = (
        torch.randn(LABELS, *grid, generator=torch.Generator().manual_seed(i)).log_softmax(0) for i in (0, 1)
    )
    made = AnyContrastNetwork(head, classes, width=4, levels=2)
    torch.nn.init.normal_(made.to_scores.weight)
    loaded = AnyContrastNetwork(brain, classes, width=4, levels=2)
    loaded.load_state_dict(made.state_dict())
    scan, observed = torch.rand(1, 1, *grid), torch.ones(1, 1, *grid, dtype=torch.bool)
    assert torch.equal(loaded(scan, observed), made(scan, observed)) and made(scan, observed).std() > 0
    assert torch.equal(loaded.location(brain), made.location(head)) and loaded.location(brain).dtype == brain.dtype
