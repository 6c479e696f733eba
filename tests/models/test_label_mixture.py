"""LabelMixture and the enumerated program against a sum over every label map of three voxels."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro import poutine

from ppl_seg.models.label_mixture import LabelMixture
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, make_problem

THREE_VOXELS = {"grid": (3, 1), "class_of_label": (0, 1, 2), "components": (2, 1, 2)}


def mixture(problem: Problem, *, draws: int = 1) -> tuple[LabelMixture, torch.Tensor]:
    z = torch.stack([problem.z(d) for d in range(draws)])
    shape = problem.shape_prior()
    scores = shape.label_scores(z)
    return LabelMixture(scores, shape.log_location_prior, problem.theta(), problem.intensity(), problem.observed), z


@pytest.mark.parametrize("mask", ["none", "some", "channel"])
@pytest.mark.parametrize("maps", [False, True])
def test_brute_force_over_all_label_maps(mask: str, maps: bool) -> None:
    problem = make_problem(**THREE_VOXELS, mask=mask, maps=maps)
    distribution, z = mixture(problem, draws=4)
    exact, jensen = distribution.log_prob(problem.scan), distribution.expected_log_prob(problem.scan)
    log_f, ll = problem.log_f(z), problem.label_ll()
    for draw, b in itertools.product(range(4), range(2)):
        one = (log_f[draw, b], ll[b])
        torch.testing.assert_close(exact[draw, b], slow.exact_by_enumeration(*one), rtol=1e-10, atol=0)
        torch.testing.assert_close(jensen[draw, b], slow.jensen_by_enumeration(*one), rtol=1e-10, atol=0)


@pytest.mark.parametrize("maps", [False, True])
def test_enumerated_program_summed_over_all_label_maps(maps: bool) -> None:
    """log Σ_s p(z, s, x) of the enumerated program, one run a label map, is the collapsed log p(z, x)."""
    problem = make_problem(**THREE_VOXELS, mask="none", maps=maps, num_scans=1)
    arguments = (problem.scan, problem.observed, problem.theta())
    z = problem.z()
    collapsed = poutine.trace(poutine.condition(problem.model("collapsed"), {"z": z})).get_trace(*arguments)
    terms = []
    for labels in itertools.product(range(3), repeat=3):
        data = {"z": z, "labels": torch.tensor(labels)[:, None]}
        enumerated = poutine.condition(problem.model("enumerated"), data)
        terms.append(poutine.trace(enumerated).get_trace(*arguments).log_prob_sum())
    torch.testing.assert_close(torch.stack(terms).logsumexp(0), collapsed.log_prob_sum(), rtol=1e-10, atol=0)


def test_shapes_with_leading_draws() -> None:
    problem = make_problem(draws=5)
    distribution, _ = mixture(problem, draws=5)
    assert distribution.batch_shape == (5, 2) and distribution.event_shape == (2, 3, 2)
    assert distribution.log_prob(problem.scan).shape == (5, 2)
    assert distribution.expected_log_prob(problem.scan).shape == (5, 2)
    assert distribution.sample().shape == (5, 2, 2, 3, 2)


@pytest.mark.parametrize(("maps", "outliers"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_samples_have_the_moments_of_the_mixture(maps: bool, outliers: float) -> None:
    """Voxel means, second moments and products of channels of 20 000 samples lie within 5 standard errors.

    24 + 24 + 12 comparisons in each of three cases: failure rate over seeds about 180 × 6e-7 = 1e-4; the seed is fixed.
    """
    problem = make_problem(mask="none", maps=maps, outliers=outliers)
    with torch.no_grad():
        distribution, z = mixture(problem)
        pyro.set_rng_seed(3)
        draws = distribution.sample(torch.Size((20_000,)))[:, 0].flatten(3)
        theta = problem.theta()
        f = problem.log_f(z)[0].exp()
        J = f.shape[-1]
        weight = theta.log_weight.exp()[..., None].repeat(1, 1, J)
        if theta.log_weight_maps is not None:
            weight[:, : problem.components[0]] = theta.log_weight_maps.exp()
        first, second = torch.zeros(2, 2, J).double(), torch.zeros(2, 2, J).double()
        product = torch.zeros(2, J).double()
        for m in range(len(problem.class_of_label)):
            for q in slow.components_of_label(problem.class_of_label, problem.components, m):
                p = (f[:, m] * weight[:, q])[:, None]
                first += p * theta.mean[:, q, :, None]
                second += p * (theta.mean[:, q] ** 2 + theta.sd[:, q] ** 2)[..., None]
                product += p[:, 0] * theta.mean[:, q].prod(1)[:, None]
    first = (1 - outliers) * first + outliers * 0.5  # uniform from -0.5 to 1.5: variance 1/3
    second = (1 - outliers) * second + outliers * (0.5**2 + 1 / 3)
    product = (1 - outliers) * product + outliers * 0.5**2  # an outlier is one in all channels
    draws = draws.double()
    for values, expected in ((draws, first), (draws**2, second), (draws.prod(2), product)):
        error = values.std(0) / len(values) ** 0.5
        assert bool(((values.mean(0) - expected).abs() < 5 * error).all())
    assert bool((draws.flatten(1).std(0) > 0).all())


def test_unobserved_voxels_are_sampled_as_zero() -> None:
    problem = make_problem(mask="channel")
    draw = mixture(problem)[0].sample()[0]
    assert not draw[~problem.observed].any() and bool(draw[problem.observed].all())
