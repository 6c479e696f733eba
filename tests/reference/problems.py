"""Tiny problems in float64: 2 scans, 2 channels, 3 labels, a 3×2 grid, a latent of 2; nothing is zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from tests.reference import likelihood as slow
from tests.reference.draws import Script, ScriptedFamily


class SmoothDecoder(nn.Module):
    """z (..., D) -> scores (..., M, *grid), tanh of a linear map; same numbers for (3,2) and (3,2,1)."""

    def __init__(self, latent_dim: int, num_labels: int, grid: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.shape = (num_labels, *grid)
        size = num_labels * math.prod(grid)
        self.weight = nn.Parameter(torch.randn(latent_dim, size, generator=generator, dtype=torch.float64))
        self.gain = nn.Parameter(1.0 + torch.rand(size, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return ((z @ self.weight).tanh() * self.gain).reshape(*z.shape[:-1], *self.shape)


@dataclass
class Problem:
    """A model with free parameters, data, and the library's objects on them. Build with `make_problem`."""

    grid: tuple[int, ...]
    class_of_label: tuple[int, ...]
    components: tuple[int, ...]
    latent_dim: int
    location_prior: Tensor
    decoder: SmoothDecoder
    mean: Tensor
    log_sd: Tensor
    weight_scores: Tensor
    map_scores: Tensor | None
    raw: Tensor
    scan: Tensor
    observed: Tensor
    noise: Tensor
    outliers: float = 0.0
    script: Script = field(init=False)
    guides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.script = Script(self.noise)
        self.guide()  # from here on `raw` is the guide's own parameter

    @property
    def num_scans(self) -> int:
        return self.scan.shape[0]

    @property
    def classes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the labels, and how many Gaussians each has."""
        return self.class_of_label, self.components

    @property
    def scan_flat(self) -> Tensor:
        return self.scan.flatten(2)

    @property
    def observed_flat(self) -> Tensor:
        return self.observed.flatten(2).expand(self.scan_flat.shape)

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient can reach: decoder, θ, the guide's raw numbers."""
        out = {"decoder.weight": self.decoder.weight, "decoder.gain": self.decoder.gain, "raw": self.raw}
        out |= {"mean": self.mean, "log_sd": self.log_sd, "weight_scores": self.weight_scores}
        return out if self.map_scores is None else out | {"maps": self.map_scores}

    def theta(self) -> Any:
        """θ as a function of its leaves, weights normalised within each class (maps at each voxel)."""
        from ppl_seg.models.intensity import IntensityParameters

        log_weight = torch.cat([s.log_softmax(-1) for s in self.weight_scores.split(self.components, -1)], -1)
        maps, of_classes = self.map_scores, self.components
        if maps is not None:
            of_classes = of_classes if len(maps) == sum(of_classes) else of_classes[:1]
            maps = torch.cat([s.log_softmax(0) for s in maps.split(of_classes)])
        return IntensityParameters(self.mean, self.log_sd.exp(), log_weight, maps)

    def intensity(self) -> Any:
        from ppl_seg.models.intensity import IntensityModel

        return IntensityModel(*self.classes, self.scan.shape[1], outliers=self.outliers).double()

    def shape_prior(self) -> Any:
        from ppl_seg.models.shape_prior import ShapePrior

        return ShapePrior(self.location_prior, self.decoder, self.latent_dim)

    def model(self, form: str = "collapsed", beta: float = 1.0) -> Any:
        from ppl_seg.models.segmentation import SegmentationModel

        return SegmentationModel(self.shape_prior(), self.intensity(), likelihood_power=beta, form=form)

    def guide(self, family: str = "scripted") -> Any:
        """q(z) of each scan, always the same object for a family; `raw` becomes its parameter.

        scripted: mean-field with scale exp(raw[D:]) and the noise of `noise`, from the first draw on.
        """
        from ppl_seg.guides.families import build_family
        from ppl_seg.guides.per_scan import PerScanGuide

        self.script.rewind()
        if family not in self.guides:
            scripted = family == "scripted"
            chosen = ScriptedFamily(self.latent_dim, self.script) if scripted else build_family(family, self.latent_dim)
            if self.raw.shape[-1] != chosen.num_parameters:
                generator = torch.Generator().manual_seed(9)
                shape = (self.num_scans, chosen.num_parameters)
                self.raw = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.guides[family] = PerScanGuide(chosen.double(), self.raw)
        self.raw = self.guides[family].raw
        return self.guides[family]

    def loss(self, objective: Any, beta: float = 1.0, family: str = "scripted", form: str | None = None) -> Tensor:
        """The differentiable loss, from the first scripted draw on, in a parameter store of its own."""
        model = self.model(form or objective.form, beta)
        with pyro.get_param_store().scope():
            value: Tensor = objective.differentiable_loss(model, self.guide(family), *self.arguments())
        return value

    def arguments(self) -> tuple[Tensor, Tensor, Any]:
        """What model and guide are called with."""
        return self.scan, self.observed, self.theta()

    def select(self, b: int) -> Problem:
        """The problem of one of its scans; parameters are the same values, as new leaves."""
        one = slice(b, b + 1)
        per_scan = {name: getattr(self, name)[one].detach().clone().requires_grad_()
                    for name in ("mean", "log_sd", "weight_scores", "raw")}  # fmt: skip
        return Problem(
            self.grid, self.class_of_label, self.components, self.latent_dim, self.location_prior,
            decoder=self.decoder, map_scores=self.map_scores,
            scan=self.scan[one], observed=self.observed[one], noise=self.noise[:, one], outliers=self.outliers,
            **per_scan,
        )  # fmt: skip

    # The reference values at one draw of z.

    def z(self, draw: int = 0) -> Tensor:
        loc, log_scale = self.raw.split(self.latent_dim, -1)
        return loc + log_scale.exp() * self.noise[draw]

    def log_f(self, z: Tensor) -> Tensor:
        """(..., M, J)."""
        scores = self.decoder(z).flatten(-len(self.grid))
        return slow.log_label_probs(scores, self.location_prior.log().flatten(1))

    def label_ll(self) -> Tensor:
        """(B, M, J)."""
        return slow.label_log_prob(self.scan_flat, self.observed_flat, self.theta(), *self.classes, self.outliers)

    def sampled_kl(self, draw: int = 0) -> Tensor:
        """(B,): log q(z) − log p(z) at the draw."""
        loc, log_scale = self.raw.split(self.latent_dim, -1)
        z = self.z(draw)
        log_q = slow.log_normal(z, loc, log_scale.exp()).sum(-1)
        return log_q - slow.log_normal(z, torch.zeros_like(z), torch.ones_like(z)).sum(-1)

    def analytic_kl(self) -> Tensor:
        """(B,): −½ Σ_d (1 + log σ² − μ² − σ²)."""
        loc, log_scale = self.raw.split(self.latent_dim, -1)
        return -0.5 * (1 + 2 * log_scale - loc**2 - (2 * log_scale).exp()).sum(-1)

    def equations(self, beta: float = 1.0, draw: int = 0) -> dict[str, Tensor]:
        """The loss of each bound at a draw of z, summed over scans, as the equations say it."""
        log_f, ll = self.log_f(self.z(draw)), self.label_ll()
        exact, jensen = beta * slow.exact(log_f, ll).sum(), beta * slow.jensen(log_f, ll).sum()
        kl, log_ratio = self.analytic_kl().sum(), self.sampled_kl(draw).sum()
        sampled = log_ratio - exact
        return {"marginal": kl - exact, "trace": sampled, "enum": sampled, "jensen": kl - jensen}


def make_problem(
    grid: tuple[int, ...] = (3, 2),
    num_scans: int = 2,
    channels: int = 2,
    class_of_label: tuple[int, ...] = (0, 1, 1),
    components: tuple[int, ...] = (2, 2),
    latent_dim: int = 2,
    maps: bool | Literal["all"] = False,
    mask: str = "some",
    draws: int = 8,
    seed: int = 0,
    outliers: float = 0.0,
) -> Problem:
    """A random problem.

    mask: "none" (all observed), "some" (a third unobserved, in all channels alike), "channel" (per channel),
    "all" (nothing observed). maps: background weights vary over the grid, or those of all classes.
    outliers: their share.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    M, Q, J = len(class_of_label), sum(components), math.prod(grid)
    decoder = SmoothDecoder(latent_dim, M, grid, g)
    location_prior = rand(M, J).softmax(0).reshape(M, *grid)
    mean, log_sd, weights = (
        rand(num_scans, Q, channels),
        0.3 * rand(num_scans, Q, channels),
        rand(num_scans, Q),
    )
    map_scores = rand(components[0], J)
    raw = torch.cat([rand(num_scans, latent_dim), 0.3 * rand(num_scans, latent_dim) - 0.5], -1)
    scan = rand(num_scans, channels, J).reshape(num_scans, channels, *grid)
    noise = rand(draws, num_scans, latent_dim)
    if maps == "all":  # after all else, so that the rest is as without
        map_scores = rand(Q, J)
    # arange, not chance: the masks must be neither empty nor full whatever the seed
    rows = 1 if mask in ("none", "some", "all") else channels
    ticks = torch.arange(num_scans * rows * J).reshape(num_scans, rows, *grid)
    observed = {"none": ticks >= 0, "some": ticks % 3 != 1, "channel": ticks % 4 != 1, "all": ticks < 0}[mask]
    leaves = [t.requires_grad_() for t in (mean, log_sd, weights)]
    return Problem(
        grid, class_of_label, components, latent_dim, location_prior, decoder, *leaves,
        map_scores.requires_grad_() if maps else None, raw.requires_grad_(), scan, observed, noise, outliers,
    )  # fmt: skip


def grads(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, zeros where a leaf takes no part."""
    got = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), got, strict=True)
    }


def assert_same(value: Tensor, expected: Tensor, leaves: dict[str, Tensor], rtol: float = 1e-12) -> None:
    """Value and all gradients agree, relative to the largest entry of each gradient."""
    assert value.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=rtol, atol=0.0)
    actual_grads, expected_grads = grads(value.sum(), leaves), grads(expected.sum(), leaves)
    assert any(bool(g.ne(0).any()) for g in expected_grads.values()), "nothing depends on the leaves"
    for name, wanted in expected_grads.items():
        tolerance = max(rtol * float(wanted.abs().max()), 1e-15)
        torch.testing.assert_close(
            actual_grads[name], wanted, rtol=rtol, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
