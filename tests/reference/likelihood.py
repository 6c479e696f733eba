"""The voxel factor written out: loops over scans, labels, voxels, components, channels; for autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def components_of_label(class_of_label: Sequence[int], components: Sequence[int], label: int) -> range:
    """Positions (in 0..Q-1) of the Gaussians of a label's class; classes lie one after the other."""
    start = sum(components[: class_of_label[label]])
    return range(start, start + components[class_of_label[label]])


def log_normal(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """log N(x | mean, sd²)."""
    return -0.5 * ((x - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)


def component_log_joint(scan: Tensor, observed: Tensor, theta: Any, b: int, q: int, j: int) -> Tensor:
    """log w_q(j) + Σ_c o_cj log N(x_cj | μ_qc, σ²_qc), one number; unobserved content is never read.

    A mixture of θ over one scan (B = 1) counts for every scan.
    """
    t = b if theta.mean.shape[0] > 1 else 0
    maps = theta.log_weight_maps
    total = maps[q, j] if maps is not None and q < maps.shape[0] else theta.log_weight[t, q]
    for c in range(scan.shape[1]):
        if observed[b, c, j]:
            total = total + log_normal(scan[b, c, j], theta.mean[t, q, c], theta.sd[t, q, c])
    return total


def joints(
    scan: Tensor, observed: Tensor, theta: Any, of_class: range, outliers: float, b: int, j: int
) -> tuple[Tensor, Tensor]:
    """(1 − ε) w_k N(...) of a class' Gaussians, (K,), and ε U, U uniform from −0.5 to 1.5 in each channel."""
    gaussians = torch.stack([component_log_joint(scan, observed, theta, b, q, j) for q in of_class]).exp()
    return (1 - outliers) * gaussians, outliers * gaussians.new_tensor(0.5) ** int(observed[b, :, j].sum())


def label_log_prob(
    scan: Tensor,
    observed: Tensor,
    theta: Any,
    class_of_label: Sequence[int],
    components: Sequence[int],
    outliers: float = 0.0,
) -> Tensor:
    """(B,M,J): log p(x_j | m) = log((1 − ε) Σ_k w_mk N(...) + ε U)."""
    B, _, J = scan.shape
    rows = []
    for b, m, j in itertools.product(range(B), range(len(class_of_label)), range(J)):
        of_class = components_of_label(class_of_label, components, m)
        gaussians, outlier = joints(scan, observed, theta, of_class, outliers, b, j)
        rows.append((gaussians.sum() + outlier).log())
    return torch.stack(rows).reshape(B, len(class_of_label), J)


def component_responsibilities(
    label_responsibilities: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: Any,
    class_of_label: Sequence[int],
    components: Sequence[int],
    outliers: float = 0.0,
) -> Tensor:
    """(B,Q,J): sum of the class's label responsibilities times the component's posterior within the class."""
    B, M, J = label_responsibilities.shape
    out = label_responsibilities.new_zeros(B, sum(components), J)
    for b, m, j in itertools.product(range(B), range(M), range(J)):
        of_class = components_of_label(class_of_label, components, m)
        gaussians, outlier = joints(scan, observed, theta, of_class, outliers, b, j)
        for q, share in zip(of_class, gaussians / (gaussians.sum() + outlier), strict=True):
            out[b, q, j] += label_responsibilities[b, m, j] * share
    return out


def log_label_probs(scores: Tensor, log_location_prior: Tensor) -> Tensor:
    """log f = log softmax_m(score + log p_loc); scores (..., M, J), log p_loc (M, J)."""
    a = scores + log_location_prior
    return a - a.exp().sum(-2, keepdim=True).log()


def exact(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """Σ_j log Σ_m f_jm p(x_j|m): (..., B). Unobserved voxels have p(x_j|m) = 1 and add 0."""
    return (log_f.exp() * label_ll.exp()).sum(-2).log().sum(-1)


def jensen(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """Σ_j Σ_m f_jm log p(x_j|m): (..., B)."""
    return (log_f.exp() * label_ll).sum((-2, -1))


def responsibilities(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """r_jm ∝ f_jm p(x_j|m): (..., B, M, J)."""
    joint = log_f.exp() * label_ll.exp()
    return joint / joint.sum(-2, keepdim=True)


def kl_labels(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """Σ_j KL(f_j ‖ r_j): (..., B)."""
    r = responsibilities(log_f, label_ll)
    return (log_f.exp() * (log_f - r.log())).sum((-2, -1))


def exact_by_enumeration(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """log Σ_s Π_j f_j(s_j) p(x_j|s_j) over all M^J label maps of one scan; log_f, label_ll (M,J)."""
    M, J = log_f.shape
    terms = [
        sum(log_f[m, j] + label_ll[m, j] for j, m in enumerate(labels))
        for labels in itertools.product(range(M), repeat=J)
    ]
    return torch.logsumexp(torch.stack(terms), 0)


def jensen_by_enumeration(log_f: Tensor, label_ll: Tensor) -> Tensor:
    """Σ_s [Π_j f_j(s_j)] Σ_j log p(x_j|s_j) over all label maps of one scan."""
    M, J = log_f.shape
    total = log_f.new_zeros(())
    for labels in itertools.product(range(M), repeat=J):
        weight = sum(log_f[m, j] for j, m in enumerate(labels)).exp()
        total = total + weight * sum(label_ll[m, j] for j, m in enumerate(labels))
    return total
