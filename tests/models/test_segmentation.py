"""The program in its two forms: sites, shapes, plates, simulation, where θ comes from."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.intensity_prior import SharedIntensity
from ppl_seg.models.segmentation import SegmentationModel
from tests.reference.problems import make_problem

FORMS = {"collapsed": {"z", "scan"}, "enumerated": {"z", "labels", "scan"}}


@pytest.mark.parametrize("grid", [(3, 2), (3, 2, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_sites_and_shapes(form: str, grid: tuple[int, ...]) -> None:
    problem = make_problem(grid=grid)
    model = problem.model(form)
    trace = poutine.trace(model).get_trace(*problem.arguments())
    names = {n for n, site in trace.nodes.items() if site["type"] == "sample" and n not in ("scans", "voxels")}
    assert names == FORMS[form]
    assert trace.nodes["z"]["value"].shape == (2, 2)
    if form == "collapsed":
        assert model.max_plate_nesting == 1
        fn = trace.nodes["scan"]["fn"]
        assert fn.batch_shape == (2,) and fn.event_shape == (2, *grid)
    else:
        assert model.max_plate_nesting == 2
        assert trace.nodes["labels"]["fn"].batch_shape == (len(problem.scan[0, 0].flatten()), 2)


@pytest.mark.parametrize("form", FORMS)
def test_one_set_of_parameters(form: str) -> None:
    problem = make_problem()
    names = {name for name, _ in problem.model(form).named_parameters()}
    assert names == {name for name, _ in problem.model("collapsed").named_parameters()}
    assert names == {"shape_prior.decoder.weight", "shape_prior.decoder.gain"}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_simulation_without_data(form: str, maps: bool) -> None:
    problem = make_problem(maps=maps, mask="channel")
    with torch.no_grad():
        scan = problem.model(form)(None, problem.observed, problem.theta())
        assert scan.shape == problem.scan.shape and bool(scan.isfinite().all())
        assert not scan[~problem.observed].any() and bool(scan[problem.observed].all())
        assert problem.model(form)(num_scans=3).shape == (3, 2, 3, 2)


def test_the_two_forms_simulate_the_same_distribution() -> None:
    """Means and second moments of 20 000 scans of one θ; 24 + 24 differences within 5 standard errors.

    Failure rate about 3e-5; fixed seed.
    """
    problem = make_problem(num_scans=1, mask="none")
    theta, draws = problem.theta().detach(), {}
    many = IntensityParameters(*(t.expand(20_000, *t.shape[1:]) for t in (theta.mean, theta.sd, theta.log_weight)))
    with torch.no_grad():
        for form in FORMS:
            draws[form] = problem.model(form)(theta=many, num_scans=20_000).flatten(1)
    for power in (1, 2):
        a, b = draws["collapsed"] ** power, draws["enumerated"] ** power
        error = ((a.var(0) + b.var(0)) / 20_000).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * error).all())


def test_theta_is_needed_for_a_scan() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="SharedIntensity"):
        problem.model()(problem.scan, problem.observed)


@pytest.mark.parametrize("form", FORMS)
def test_shared_theta_is_used_where_none_is_given(form: str) -> None:
    problem = make_problem(num_scans=1)
    shared = SharedIntensity(problem.intensity(), problem.theta().detach())
    model = SegmentationModel(problem.shape_prior(), problem.intensity(), form=form, shared_intensity=shared)
    z = {"z": problem.z()}
    given = poutine.trace(poutine.condition(problem.model("collapsed"), z)).get_trace(*problem.arguments())
    expected = given.log_prob_sum()
    if form == "collapsed":
        found = poutine.trace(poutine.condition(model, z)).get_trace(problem.scan, problem.observed)
        torch.testing.assert_close(found.log_prob_sum(), expected, rtol=1e-12, atol=0)
        found.log_prob_sum().backward()
        assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in shared.parameters())
    assert {n for n, _ in model.named_parameters() if n.startswith("shared")} == {
        "shared_intensity.mean", "shared_intensity.log_sd", "shared_intensity.weight_logits",
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_likelihood_power_scales_the_voxel_factors_alone(form: str, beta: float) -> None:
    problem = make_problem()
    trace = poutine.trace(poutine.condition(problem.model(form, beta), {"z": problem.z()})).get_trace(
        *problem.arguments()
    )
    trace.compute_log_prob()
    assert trace.nodes["z"]["scale"] == 1.0
    assert all(trace.nodes[name]["scale"] == beta for name in FORMS[form] - {"z"})


@pytest.mark.parametrize("form", FORMS)
def test_observed_defaults_to_everything(form: str) -> None:
    problem = make_problem(mask="none")
    model = poutine.condition(problem.model(form), {"z": problem.z()})
    data = {"labels": torch.zeros(6, 2, dtype=torch.long)} if form == "enumerated" else {}
    values = [
        poutine.trace(poutine.condition(model, data)).get_trace(problem.scan, observed, problem.theta()).log_prob_sum()
        for observed in (None, problem.observed)
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("options", [{}, {"maps": True, "mask": "channel"}], ids=["plain", "maps"])
def test_the_mean_over_all_parts_is_the_whole_likelihood(options: dict) -> None:
    problem = make_problem(grid=(5, 4), **options)
    model, theta = problem.model(beta=0.3), problem.theta()
    z = torch.randn(len(problem.scan), model.shape_prior.latent_dim, dtype=torch.float64, requires_grad=True)

    def log_prob(part: slice | None) -> torch.Tensor:
        conditioned = poutine.condition(model, {"z": z})
        trace = poutine.trace(conditioned).get_trace(problem.scan, problem.observed, theta, 1, part)
        trace.compute_log_prob()
        return trace.nodes["scan"]["log_prob"]

    parts = torch.stack([log_prob(slice(start, None, 3)) for start in range(3)])
    torch.testing.assert_close(parts.mean(0), log_prob(None))
    for leaf in (z, *model.shape_prior.decoder.parameters()):
        (of_parts,) = torch.autograd.grad(parts.mean(0).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(of_parts, torch.autograd.grad(log_prob(None).sum(), leaf)[0])
    assert float(parts.detach().std(0).min()) > 0


def test_a_part_is_of_the_collapsed_form() -> None:
    problem = make_problem(grid=(5, 4))
    with pytest.raises(ValueError, match="part"):
        problem.model(form="enumerated")(problem.scan, problem.observed, problem.theta(), 1, slice(0, None, 2))
