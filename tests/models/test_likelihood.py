"""The fused voxel factor against loops and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.likelihood import label_mixture_expected_log_prob, label_mixture_log_prob
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, assert_same, make_problem

FUSED = {"exact": label_mixture_log_prob, "jensen": label_mixture_expected_log_prob}
PLAIN = {"exact": slow.exact, "jensen": slow.jensen}
VARIANTS = {
    "plain": {},
    "maps": {"maps": True},
    "maps of all classes": {"maps": "all"},
    "channel mask": {"mask": "channel"},
    "maps, channel mask": {"maps": True, "mask": "channel"},
    "nothing observed": {"mask": "all"},
    "a class a label, K = 1": {"class_of_label": (0, 1, 2), "components": (1, 1, 1), "mask": "none"},
    "shared classes": {"class_of_label": (0, 2, 1, 2), "components": (3, 1, 2), "channels": 1},
}


def scores_of(problem: Problem, *sample: int) -> Tensor:
    shape = (*sample, problem.num_scans, len(problem.class_of_label), problem.scan_flat.shape[-1])
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def fused(
    problem: Problem, form: str, scores: Tensor, theta: IntensityParameters | None = None, **options: int
) -> Tensor:
    log_prior = problem.location_prior.log().flatten(1)
    arguments = (
        log_prior,
        problem.scan_flat,
        problem.observed_flat,
        theta or problem.theta(),
        problem.intensity(),
    )
    return FUSED[form](scores, *arguments, **options)


def plain(problem: Problem, form: str, scores: Tensor) -> Tensor:
    log_f = slow.log_label_probs(scores, problem.location_prior.log().flatten(1))
    return PLAIN[form](log_f, problem.label_ll())


def leaves_of(problem: Problem, scores: Tensor) -> dict[str, Tensor]:
    theta = {k: v for k, v in problem.leaves().items() if k in ("mean", "log_sd", "weight_scores", "background")}
    return {"scores": scores} | theta


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FUSED)
def test_value_and_gradient_are_those_of_the_plain_expression(form: str, variant: str) -> None:
    problem = make_problem(**VARIANTS[variant])
    scores = scores_of(problem)
    value, expected = fused(problem, form, scores), plain(problem, form, scores)
    assert value.shape == (2,)
    if variant == "nothing observed":
        assert torch.equal(value, torch.zeros_like(value))
        assert not torch.autograd.grad(value.sum(), scores)[0].any()
        return
    assert_same(value, expected, leaves_of(problem, scores))


@pytest.mark.parametrize("form", FUSED)
def test_gradient_is_weighted_scan_by_scan_and_draw_by_draw(form: str) -> None:
    problem = make_problem(maps=True)
    scores = scores_of(problem, 3, 2)
    value, expected = fused(problem, form, scores), plain(problem, form, scores)
    assert value.shape == (3, 2, 2)
    weights = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(3, 2, 2)
    assert_same(value * weights, expected * weights, leaves_of(problem, scores))


@pytest.mark.parametrize("form", FUSED)
def test_one_theta_for_all_scans(form: str) -> None:
    problem = make_problem()
    with torch.no_grad():
        problem.mean[1], problem.log_sd[1], problem.weight_scores[1] = (
            problem.mean[0], problem.log_sd[0], problem.weight_scores[0],
        )  # fmt: skip
    scores = scores_of(problem)
    leaves = leaves_of(problem, scores)
    full = problem.theta()
    shared = IntensityParameters(full.mean[:1], full.sd[:1], full.log_weight[:1])
    value, expected = fused(problem, form, scores, shared), fused(problem, form, scores)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for name in ("mean", "log_sd", "weight_scores"):
        (together,) = torch.autograd.grad(value.sum(), leaves[name], retain_graph=True)
        (apart,) = torch.autograd.grad(expected.sum(), leaves[name], retain_graph=True)
        torch.testing.assert_close(together[0], apart.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FUSED)
def test_gradcheck(form: str) -> None:
    problem = make_problem(maps=True, mask="channel")
    scores = scores_of(problem)

    def function(scores: Tensor, mean: Tensor, sd: Tensor, log_weight: Tensor, maps: Tensor) -> Tensor:
        return fused(problem, form, scores, IntensityParameters(mean, sd, log_weight, maps))

    theta = problem.theta()
    assert theta.log_weight_maps is not None
    inputs = (theta.mean, theta.sd, theta.log_weight, theta.log_weight_maps)
    assert torch.autograd.gradcheck(function, (scores, *(t.detach().clone().requires_grad_() for t in inputs)))


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 6, 1000])
@pytest.mark.parametrize("form", FUSED)
def test_chunk_size_changes_nothing(form: str, chunk: int) -> None:
    problem = make_problem(maps=True)
    scores = scores_of(problem, 2)
    in_chunks, at_once = fused(problem, form, scores, chunk=chunk), fused(problem, form, scores)
    assert_same(in_chunks, at_once, leaves_of(problem, scores), rtol=1e-13)


def in_float32(problem: Problem) -> tuple[Tensor, Tensor, Tensor, IntensityParameters, IntensityModel]:
    """All arguments but the scores."""
    theta = problem.theta().detach()
    theta32 = IntensityParameters(theta.mean.float(), theta.sd.float(), theta.log_weight.float())
    log_prior = problem.location_prior.log().flatten(1).float()
    return log_prior, problem.scan_flat.float(), problem.observed_flat, theta32, problem.intensity().float()


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_summed_in_float32(form: str, low: torch.dtype) -> None:
    problem = make_problem(grid=(40, 30), mask="some")
    scores = scores_of(problem).detach().to(low)
    arguments = in_float32(problem)
    half, full = scores.clone().requires_grad_(), scores.float().requires_grad_()
    value, expected = FUSED[form](half, *arguments), FUSED[form](full, *arguments)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)  # the sum over 1200 voxels would lose whole units in bfloat16
    (grad_half,), (grad_full,) = (
        torch.autograd.grad(value.sum(), half),
        torch.autograd.grad(expected.sum(), full),
    )
    assert grad_half.dtype == low
    torch.testing.assert_close(grad_half, grad_full.to(low))


@pytest.mark.parametrize("form", FUSED)
def test_float32_under_bf16_autocast(form: str) -> None:
    """A network under autocast hands over bfloat16 scores; the factor stays float32 in the same context."""
    problem = make_problem(grid=(40, 30))
    network = nn.Linear(2, 3 * 1200)
    z = torch.ones(2, 2)
    arguments = in_float32(problem)
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(z).view(2, 3, 1200)
        value = FUSED[form](scores, *arguments)
    assert scores.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert torch.equal(value, FUSED[form](scores.detach(), *arguments))
    value.sum().backward()
    assert network.weight.grad is not None and bool(network.weight.grad.isfinite().all())


@pytest.mark.parametrize("form", FUSED)
def test_extreme_scores_and_intensities_stay_finite(form: str) -> None:
    """Label probabilities that underflow, intensities far from all means: finite value, finite gradient."""
    problem = make_problem(mask="none")
    with torch.no_grad():
        problem.scan[0] += 1e3
        scores = scores_of(problem) * 1e4
    scores.requires_grad_()
    value = fused(problem, form, scores)
    grad = torch.autograd.grad(value.sum(), (scores, problem.mean, problem.log_sd))
    assert bool(value.isfinite().all()) and all(bool(g.isfinite().all()) for g in grad)


def test_jensen_is_below_the_exact_factor() -> None:
    problem = make_problem()
    scores = scores_of(problem, 50)
    gap = fused(problem, "exact", scores) - fused(problem, "jensen", scores)
    log_f = slow.log_label_probs(scores, problem.location_prior.log().flatten(1))
    assert bool((gap > 0).all())
    torch.testing.assert_close(gap, slow.kl_labels(log_f, problem.label_ll()), rtol=1e-10, atol=1e-12)
