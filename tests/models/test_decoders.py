"""Decoders: shapes, a start without opinion, no mixing of scans, leading sample dimensions."""

from __future__ import annotations

import pytest
import torch

from ppl_seg.models.decoders import DECODERS, build_decoder
from ppl_seg.models.shape_prior import ShapePrior

GRIDS = [(24, 20), (17, 13), (16, 12, 20), (9, 11, 7), (24, 20, 1), (6, 5), (3, 2), (8, 6, 4)]


def perturbed(name: str, grid: tuple[int, ...]) -> torch.nn.Module:
    """A decoder in float64 whose last layer is not zero."""
    decoder = build_decoder(name, 4, 3, grid).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return decoder


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_f_is_the_location_prior_at_step_0(name: str, grid: tuple[int, ...]) -> None:
    location_prior = torch.rand(3, *grid).softmax(0)
    shape = ShapePrior(location_prior, build_decoder(name, 4, 3, grid), 4)
    z = 5 * torch.randn(2, 4)
    assert shape.label_scores(z).shape == (2, 3, *grid)
    torch.testing.assert_close(shape.log_label_probs(z), location_prior.log().expand(2, 3, *grid), rtol=0, atol=1e-6)
    assert not shape.label_scores(z).any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_leading_dimensions_and_no_mixing(name: str, grid: tuple[int, ...]) -> None:
    decoder = perturbed(name, grid)
    z = torch.randn(5, 2, 4, dtype=torch.float64)
    scores = decoder(z)
    assert scores.shape[:3] == (5, 2, 3) and scores.dim() == 3 + len(grid)
    torch.testing.assert_close(scores[3, 1], decoder(z[3, 1]), rtol=1e-10, atol=1e-12)


def test_z_and_every_parameter_matter() -> None:
    decoder = perturbed("convolutional", (17, 13))
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(decoder(z).square().sum(), [z, *decoder.parameters()])
    assert all(bool(g.ne(0).any()) for g in gradients)
    assert bool(gradients[0].ne(0).all())


def test_scores_are_smooth() -> None:
    """Nothing is computed at full resolution: the grid's finest checkerboard is absent from the scores."""
    shape = ShapePrior(torch.ones(3, 32, 32).double() / 3, perturbed("convolutional", (32, 32)), 4)
    scores = shape.label_scores(torch.randn(4, 4, dtype=torch.float64)).detach()
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    checkerboard = 1.0 - 2.0 * ((rows + columns) % 2)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    projection = (scores[inner] * checkerboard[1:-1, 1:-1]).mean((-2, -1)).abs()
    assert float(projection.max()) < 1e-3 * float(scores.std())


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="convolutional"):
        build_decoder("transformer", 4, 3, (8, 8))


@pytest.mark.parametrize("grid", [(17, 13), (9, 11, 8), (24, 20, 1)], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_a_lattice_is_a_part_of_the_whole(name: str, grid: tuple[int, ...]) -> None:
    shape = ShapePrior(torch.rand(3, *grid).double().softmax(0), perturbed(name, grid), 4)
    z = torch.randn(2, 4, dtype=torch.float64)
    lattice = tuple(slice(n > 5, None, min(n, 2)) for n in grid)
    whole = shape.label_scores(z)[(slice(None), slice(None), *lattice)]
    torch.testing.assert_close(shape.label_scores(z, lattice), whole)
