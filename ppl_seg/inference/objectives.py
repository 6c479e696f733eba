"""The objectives: ELBO classes in Pyro's form, by name. The value of a batch is the sum of its scans'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..models.normalisation import normalise

# Registers the analytic KL of every family; without it TraceMeanField_ELBO samples the KL without a word.
from ..guides import families as _families  # noqa: F401


def _require(trace: poutine.Trace, present: str, absent: str | None, objective: str, form: str) -> None:
    if present not in trace.nodes or (absent is not None and absent in trace.nodes):
        sites = [name for name in trace.stochastic_nodes + trace.observation_nodes]
        raise ValueError(
            f"objective {objective} needs the {form} form of the program; found sites {sites}: set model.form = {form!r}"
        )


class Marginal(TraceMeanField_ELBO):
    """E_q[β log p(x|z)] − KL(q ‖ p), labels summed out exactly, KL analytic (TraceMeanField_ELBO's contract)."""

    form: ClassVar[str] = "collapsed"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        if "scan" in traces[0].nodes:
            _require(traces[0], "scan", "labels", type(self).__name__, self.form)
        return traces


class Trace(Trace_ELBO):
    """The same bound with a sampled KL: Pyro's Trace_ELBO on the collapsed program."""

    form: ClassVar[str] = "collapsed"


class Enum(TraceEnum_ELBO):
    """Pyro's TraceEnum_ELBO, unchanged, on the enumerated program; `max_plate_nesting` is given, never guessed."""

    form: ClassVar[str] = "enumerated"

    def __init__(self, *args: Any, max_plate_nesting: float = 2, **kwargs: Any) -> None:
        super().__init__(*args, max_plate_nesting=max_plate_nesting, **kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        _require(traces[0], "labels", None, type(self).__name__, self.form)
        return traces


class _ExpectedLogProb:
    """Stands where the scan's distribution stood, with Jensen's bound for a log_prob."""

    def __init__(self, fn: Any) -> None:
        self._fn = fn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fn, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)

    def log_prob(self, value: Tensor) -> Tensor:
        expected: Tensor = self._fn.expected_log_prob(value)
        return expected


class _JensenMessenger(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "scan":
            if not hasattr(msg["fn"], "expected_log_prob"):
                raise ValueError(
                    "objective Jensen needs a `scan` site whose distribution has expected_log_prob; "
                    f"found {type(msg['fn']).__name__}: use the collapsed form of the program"
                )
            msg["fn"] = _ExpectedLogProb(msg["fn"])


class Jensen(Marginal):
    """E_q[β Σ_j o_j Σ_m f_jm log p(x_j|m)] − KL(q ‖ p): the journal-club notes' Appendix B, KL analytic."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        def jensen_model(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with _JensenMessenger():
                return model(*inner_args, **inner_kwargs)

        return super()._get_trace(jensen_model, guide, args, kwargs)


class IWAE(ELBO):
    """Σ over scans of log-mean-exp over that scan's importance weights (Burda et al. 2016, arXiv 1509.00519).

    `num_particles` draws, `block` of them at a time in one vectorised pass. The weights hold β and the mask of the
    program and no other scale.
    """

    form: ClassVar[str] = "collapsed"

    def __init__(self, num_particles: int = 8, block: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_particles=num_particles, **kwargs)
        self.block = block or num_particles

    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, z) − log q(z), (num_particles, B)."""
        blocks = []
        for start in range(0, self.num_particles, self.block):
            size = min(self.block, self.num_particles - start)
            with pyro.plate("particles", size, dim=-2):
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            _require(model_trace, "scan", "labels", "IWAE", self.form)
            model_trace.compute_log_prob()
            guide_trace.compute_log_prob()
            log_weight: Any = 0.0
            for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
                for name in trace.stochastic_nodes + trace.observation_nodes:
                    node = trace.nodes[name]
                    if not pyro.poutine.util.site_is_subsample(node):
                        log_weight = log_weight + sign * node["log_prob"]
            blocks.append(log_weight.expand(size, -1))
        return torch.cat(blocks)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over scans."""
        return -log_mean_exp(self.log_weights(model, guide, *args, **kwargs)).sum()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value, with gradients left in the parameters."""
        return _loss_and_grads(self, model, guide, args, kwargs)


class Sleep(ELBO):
    """−log q(z|x) on scans simulated from the program with z known (Hinton et al. 1995, wake–sleep).

    The arguments are those of the program; the scan's content is replaced by a simulated one with the same observed
    voxels and θ, through the same normalisation as real scans.
    """

    form: ClassVar[str] = "collapsed"

    def differentiable_loss(self, model: Any, guide: Any, scan: Any = None, observed: Any = None, theta: Any = None) -> Tensor:
        """−Σ log q(z|x)."""
        with torch.no_grad():
            simulated = poutine.trace(model).get_trace(None, observed, theta, **({} if scan is None else {"num_scans": len(scan)}))
            _require(simulated, "scan", "labels", "Sleep", self.form)
            z, drawn = simulated.nodes["z"]["value"], simulated.nodes["scan"]["value"]
            if observed is None:
                observed = torch.ones_like(drawn[:, :1], dtype=torch.bool)
            drawn = normalise(drawn, observed)
        known = poutine.condition(guide, data={"z": z})
        guide_trace = poutine.trace(known).get_trace(drawn, observed, theta)
        log_prob: Tensor = guide_trace.log_prob_sum()
        return -log_prob

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value, with gradients left in the parameters."""
        return _loss_and_grads(self, model, guide, args, kwargs)


def _loss_and_grads(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> float:
    loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach())


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log-mean-exp over the first axis."""
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


OBJECTIVES: dict[str, Callable[..., ELBO]] = {
    "marginal": Marginal,
    "trace": Trace,
    "enum": Enum,
    "jensen": Jensen,
    "iwae": IWAE,
    "sleep": Sleep,
}


def build_objective(name: str, **options: Any) -> Any:
    """An objective by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {sorted(OBJECTIVES)}")
    return OBJECTIVES[name](**options)
