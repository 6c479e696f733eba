"""The collapsed voxel factor and Jensen's counterpart: one fused autograd function, chunk by chunk.

marginal:  Σ_j o_j log Σ_m f_jm p(x_j | m) = Σ_j o_j [lse_m(a_jm + ℓ_jm) − lse_m(a_jm)],   gradient in a: r − f
jensen:    Σ_j o_j Σ_m f_jm ℓ_jm,                                                          gradient in a: f (ℓ − Σ f ℓ)

with a = scores + log p_loc and f = softmax(a). Nothing of size M × J is kept between forward and backward but the
scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .intensity import IntensityModel, IntensityParameters
from .voxels import Voxels, put, seen_by_any, take

CHUNK = 32768  # voxels


def label_mixture_log_prob(
    scores: Tensor,
    log_location_prior: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    intensity: IntensityModel,
    chunk: int = CHUNK,
) -> Tensor:
    """Exact log p(x | z), labels summed out, (*S, B).

    Args:
        scores: decoder output, (*S, B, M, J), any floating type; computed in float32 at least.
        log_location_prior: log p_loc, (M, J); no gradient flows to it.
        scan: normalised intensities, (B, C, J), finite everywhere.
        observed: bool, (B, C, J).
        theta: intensity parameters; gradients flow to them.
        intensity: the intensity model.
        chunk: voxels at a time; changes speed only.
    """
    return _apply(scores, log_location_prior, scan, observed, theta, intensity, chunk, False)


def label_mixture_expected_log_prob(
    scores: Tensor,
    log_location_prior: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    intensity: IntensityModel,
    chunk: int = CHUNK,
) -> Tensor:
    """Jensen's expected log-likelihood under f, (*S, B); arguments as `label_mixture_log_prob`."""
    return _apply(scores, log_location_prior, scan, observed, theta, intensity, chunk, True)


def _apply(
    scores: Tensor,
    log_location_prior: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    intensity: IntensityModel,
    chunk: int,
    expected: bool,
) -> Tensor:
    settings = (intensity, chunk, expected)
    arguments = (theta.mean, theta.sd, theta.log_weight, theta.log_weight_maps)
    factor: Tensor = _VoxelFactor.apply(scores, log_location_prior, scan, observed, settings, *arguments)
    return factor


def _chunks(observed: Tensor, size: int) -> list[Voxels]:
    """The voxels that count, so many at a time."""
    seen, total = seen_by_any(observed), observed.shape[-1]
    if isinstance(seen, slice):
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]
    return list(seen.split(size)) if len(seen) else []


def _theta_of(arguments: tuple[Tensor | None, ...], voxels: Voxels) -> IntensityParameters:
    mean, sd, log_weight, maps = arguments
    assert mean is not None and sd is not None and log_weight is not None
    return IntensityParameters(mean, sd, log_weight, maps).at(voxels)


class _VoxelFactor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        log_prior: Tensor,
        scan: Tensor,
        observed: Tensor,
        settings: tuple[IntensityModel, int, bool],
        *arguments: Tensor | None,
    ) -> Tensor:
        intensity, chunk, expected = settings
        dtype = torch.promote_types(scores.dtype, torch.promote_types(scan.dtype, torch.float32))
        total = scores.new_zeros(scores.shape[:-2], dtype=dtype)
        for voxels in _chunks(observed, chunk):
            a = take(scores, voxels).to(dtype) + take(log_prior, voxels)
            seen = take(observed, voxels)
            log_likelihood = intensity.label_log_prob(take(scan, voxels), seen, _theta_of(arguments, voxels))
            if expected:
                factor = (a.softmax(-2) * log_likelihood).sum(-2)
            else:
                factor = (a + log_likelihood).logsumexp(-2) - a.logsumexp(-2)
            total += torch.where(seen.any(-2), factor, 0.0).sum(-1)
        ctx.settings = settings
        ctx.save_for_backward(scores, log_prior, scan, observed, *arguments)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        scores, log_prior, scan, observed, *arguments = ctx.saved_tensors
        intensity, chunk, expected = ctx.settings
        wanted = [a is not None and a.requires_grad for a in arguments]
        grad_scores = torch.zeros_like(scores) if ctx.needs_input_grad[0] else None
        grad_theta = [torch.zeros_like(a) if want else None for a, want in zip(arguments, wanted, strict=True)]
        scale = grad_output[..., None, None]
        batch = scan.shape[0]
        for voxels in _chunks(observed, chunk):
            a = take(scores, voxels).to(grad_output.dtype) + take(log_prior, voxels)
            seen = take(observed, voxels)
            leaves = [
                None if x is None else x.detach().requires_grad_(w) for x, w in zip(arguments, wanted, strict=True)
            ]
            with torch.set_grad_enabled(any(wanted)):
                ell = intensity.label_log_prob(take(scan, voxels), seen, _theta_of(tuple(leaves), voxels))
            f = a.softmax(-2)
            ell_value = ell.detach()
            if expected:
                grad_ell = f
                grad_a = f * (ell_value - (f * ell_value).sum(-2, keepdim=True))
            else:
                grad_ell = (a + ell_value).softmax(-2)
                grad_a = grad_ell - f
            weight = torch.where(seen.any(-2).unsqueeze(-2), scale, 0.0)
            if grad_scores is not None:
                put(grad_scores, voxels, (grad_a * weight).to(scores.dtype))
            if any(wanted):
                outer = (grad_ell * weight).reshape(-1, batch, *ell.shape[1:]).sum(0)
                targets = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
                found = torch.autograd.grad(ell, targets, outer.expand_as(ell), allow_unused=True)
                sums = [total for total in grad_theta if total is not None]
                for total, part in zip(sums, found, strict=True):
                    if part is not None:
                        total += part
        return (grad_scores, None, None, None, None, *grad_theta)
