"""Which latent code a scan starts from: the program's own joint density decides, on a lattice too."""

from __future__ import annotations

import pyro
import pytest
import torch

from ppl_seg.inference import posterior
from ppl_seg.inference.posterior import best_start
from ppl_seg.models.decoders import build_decoder
from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapePrior
from tests.reference.problems import make_problem


@pytest.mark.parametrize("form", ["collapsed", "enumerated"])
@pytest.mark.parametrize("maps", [False, True])
def test_the_code_of_the_highest_joint_density(maps: bool, form: str) -> None:
    problem = make_problem(grid=(6, 5), maps=maps, mask="channel", latent_dim=3, num_scans=3)
    theta = problem.theta().detach()
    codes = torch.randn(9, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = best_start(problem.model(form, beta=8.0), codes, problem.scan, problem.observed, theta)
    collapsed, densities = problem.model(beta=8.0), []
    for code in [torch.zeros_like(codes[0]), *codes]:
        known = pyro.condition(collapsed, data={"z": code.expand(3, -1)})
        trace = pyro.poutine.trace(known).get_trace(problem.scan, problem.observed, theta)
        trace.compute_log_prob()
        densities.append(trace.nodes["z"]["log_prob"] + trace.nodes["scan"]["log_prob"])
    best = torch.stack(densities).argmax(0)
    assert len(best.unique()) > 1  # the scans do not agree
    assert torch.equal(found, torch.cat([torch.zeros_like(codes[:1]), codes])[best])


def test_on_a_lattice_the_true_code_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (12, 11, 9)
    torch.manual_seed(0)
    location = torch.randn(4, *grid).softmax(0)
    decoder = build_decoder("convolutional", 3, 4, grid, width=4)
    torch.nn.init.normal_(decoder.to_scores.weight)  # type: ignore[union-attr, arg-type]
    shape = ShapePrior(location, decoder, 3).requires_grad_(False)
    model = SegmentationModel(shape, IntensityModel([0, 1, 2, 3], [1, 1, 1, 1]))
    values = torch.tensor([[[0.1], [0.4], [0.6], [0.9]]])
    theta = IntensityParameters(values, torch.full_like(values, 0.05), torch.zeros(1, 4))
    codes = torch.randn(6, 3)
    scan = pyro.condition(model, data={"z": codes[4:5]})(None, None, theta)
    monkeypatch.setattr(posterior, "LARGE_GRID", 100)
    found = best_start(model, codes, scan, torch.ones_like(scan, dtype=torch.bool), theta)
    assert torch.equal(found, codes[4:5])
