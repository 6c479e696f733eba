"""What priors sketch of a draw gives the label probabilities that the whole grid has."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_seg.models.decoders import build_decoder
from ppl_seg.models.shape_prior import LabelPrior, ShapePrior
from ppl_seg.models.warped_atlas import WarpedAtlas

DRAWS = 3


class Plain(torch.nn.Module):
    """A decoder of a user's, whose scores are those of the grid."""

    def __init__(self, labels: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (labels, *grid)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-1, 1, math.prod(self.shape), dtype=z.dtype).view(self.shape)
        return z.sum(-1)[(..., *[None] * len(self.shape))] * ramp


def priors(grid: tuple[int, ...]) -> dict[str, LabelPrior]:
    generator = torch.Generator().manual_seed(0)
    location = (2 * torch.randn(4, *grid, generator=generator, dtype=torch.float64)).softmax(0)
    torch.manual_seed(0)
    decoder = build_decoder("convolutional", 5, 4, grid, width=4).double()
    torch.nn.init.normal_(decoder.to_scores.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return {
        "coarse scores": ShapePrior(location, decoder, 5),
        "scores": ShapePrior(location, Plain(4, grid), 5),
        "places": WarpedAtlas(location, control=3, spacing=4.0),
    }


@pytest.mark.parametrize("grid", [(9, 8, 7), (10, 6), (8, 7, 1)], ids=str)
@pytest.mark.parametrize("name", ["coarse scores", "scores", "places"])
def test_probabilities_from_sketches(name: str, grid: tuple[int, ...]) -> None:
    prior = priors(grid)[name]
    z = 2 * torch.randn(DRAWS, prior.latent_dim, dtype=torch.float64)
    voxels, labels = torch.randperm(math.prod(grid))[:30], torch.tensor([0, 3])
    with torch.no_grad():
        sketches = prior.sketch(z).movedim(0, -1)
        found = prior.sketched_probs(sketches, voxels, labels)
        expected = prior.log_label_probs(z).exp().flatten(2)[:, labels][:, :, voxels].movedim(0, -1)
    assert found.shape == (2, 30, DRAWS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
