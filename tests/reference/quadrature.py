"""Expectations over a one-dimensional Gaussian by Gauss-Hermite quadrature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tests.reference import likelihood as slow
from tests.reference.problems import Problem


def nodes_and_weights(loc: float, scale: float, order: int = 96) -> tuple[Tensor, Tensor]:
    """Nodes (order,) and weights summing to 1, so that E[g(z)] ≈ Σ w g(node) for z ~ N(loc, scale²)."""
    x, w = np.polynomial.hermite.hermgauss(order)
    nodes = loc + math.sqrt(2.0) * scale * torch.from_numpy(x)
    return nodes, torch.from_numpy(w) / math.sqrt(math.pi)


def gaussian_kl(loc: Tensor, covariance: Tensor) -> Tensor:
    """KL(N(loc, covariance) ‖ N(0, I)) = ½(tr Σ + |μ|² − D − log det Σ); (..., D), (..., D, D) -> (...)."""
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + loc.square().sum(-1) - loc.shape[-1] - torch.logdet(covariance))


class ByQuadrature:
    """E_q[exact], E_q[jensen], KL(q‖p), log p(x), E_q Σ_j KL(f_j‖r_j) for one scan and z of one dimension."""

    def __init__(self, problem: Problem, order: int = 96) -> None:
        with torch.no_grad():
            loc, scale = float(problem.raw[0, 0]), float(problem.raw[0, 1].exp())
            ll = problem.label_ll()
            nodes, weights = nodes_and_weights(loc, scale, order)
            log_f = problem.log_f(nodes[:, None, None])  # (order, 1, M, J)
            self.exact = float(weights @ slow.exact(log_f, ll)[:, 0])
            self.jensen = float(weights @ slow.jensen(log_f, ll)[:, 0])
            self.gap = float(weights @ slow.kl_labels(log_f, ll)[:, 0])
            nodes, weights = nodes_and_weights(0.0, 1.0, order)
            log_likelihood = slow.exact(problem.log_f(nodes[:, None, None]), ll)[:, 0]
            self.evidence = float((log_likelihood + weights.log()).logsumexp(0))
            self.kl = float(problem.analytic_kl())
