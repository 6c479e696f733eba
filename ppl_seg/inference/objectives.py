"""The objectives: ELBO classes in Pyro's form, by name. The value of a batch is the sum of its scans'.

Beside Pyro's methods an objective says what it needs: `form`, of the program; and where it is not as usual `factor`,
the q(s|·) that θ is learned from (`posterior`, r), and `by_parts`, whether it may hear a part of the voxels at a time,
that is whether its mean over the parts is its value on all of them (True).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..guides.families import analytic_kl  # whose module registers the KL of every family
from ..models.normalisation import normalise
from .expectation import Factor


def _check_form(trace: poutine.Trace, objective: Any, shape_program: bool = False) -> None:
    """Raise a ValueError unless the program has the form the objective needs.

    With `shape_program`, the stage-1 program (sites `z`, `labels`) is accepted as well.
    """
    has_scan, has_labels = "scan" in trace.nodes, "labels" in trace.nodes
    if shape_program and has_labels and not has_scan:
        return
    if not has_scan or has_labels != (objective.form == "enumerated"):
        sites = sorted(trace.stochastic_nodes + trace.observation_nodes)
        raise ValueError(
            f"objective {type(objective).__name__} needs the {objective.form} form of the segmentation program; found "
            f"sites {sites}: set model.form = {objective.form!r}"
        )


def _check_kl(model_trace: poutine.Trace, guide_trace: poutine.Trace, objective: Any) -> None:
    """Raise a ValueError where torch knows no KL(q ‖ p): Pyro's class would sample it without a word."""
    for name in model_trace.stochastic_nodes:
        q, p = guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]
        with torch.no_grad():
            known = analytic_kl(q, p)
        if known is None:
            raise ValueError(
                f"objective {type(objective).__name__} needs KL(q ‖ p) in closed form; torch knows none of "
                f"{type(q).__name__} and {type(p).__name__} at site {name!r}: give it one with "
                "torch.distributions.register_kl, or use the objective trace"
            )


class Marginal(TraceMeanField_ELBO):
    """E_q[β log p(x|z)] − KL(q ‖ p), labels summed out exactly, KL analytic (TraceMeanField_ELBO's contract).

    On the stage-1 program: E_q log p(s|z) − KL(q ‖ p). A guide whose KL torch does not know is a ValueError.
    """

    form: ClassVar[str] = "collapsed"
    shape_program: ClassVar[bool] = True

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        _check_form(traces[0], self, self.shape_program)
        _check_kl(traces[0], traces[1], self)
        return traces


class Trace(Trace_ELBO):
    """The same bound with a sampled KL: Pyro's Trace_ELBO on the collapsed program, or on the stage-1 program."""

    form: ClassVar[str] = "collapsed"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        _check_form(traces[0], self, shape_program=True)
        return traces


class Enum(TraceEnum_ELBO):
    """Pyro's TraceEnum_ELBO, unchanged, on the enumerated program; `max_plate_nesting` is given, never guessed."""

    form: ClassVar[str] = "enumerated"

    def __init__(self, *args: Any, max_plate_nesting: float = 2, **kwargs: Any) -> None:
        super().__init__(*args, max_plate_nesting=max_plate_nesting, **kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        _check_form(traces[0], self)
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

    shape_program: ClassVar[bool] = False
    factor: ClassVar[Factor] = "prior"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        def jensen_model(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with _JensenMessenger():
                return model(*inner_args, **inner_kwargs)

        return super()._get_trace(jensen_model, guide, args, kwargs)


class _ByDifferentiation(ELBO):
    """An ELBO that is known by its `differentiable_loss` alone."""

    form: ClassVar[str] = "collapsed"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The value, with gradients left in the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


class IWAE(_ByDifferentiation):
    """Σ over scans of log-mean-exp over that scan's importance weights (Burda et al. 2016, arXiv 1509.00519).

    `num_particles` draws in one vectorised pass. The weights hold β and the mask of the program and no other scale.
    """

    by_parts: ClassVar[bool] = False  # log-mean-exp of a part is more than its share

    def __init__(self, num_particles: int = 8, **kwargs: Any) -> None:
        super().__init__(num_particles=num_particles, **kwargs)

    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x, z) − log q(z), (num_particles, B).

        Raises:
            ValueError: a site that is of all scans and not of each: they have no weights of their own.
        """
        with pyro.plate("particles", self.num_particles, dim=-1 - getattr(model, "max_plate_nesting", 1)):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        _check_form(model_trace, self)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        scans = model_trace.nodes["scan"]["log_prob"].shape[-1]
        log_weight: Any = 0.0
        for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
            for name in trace.stochastic_nodes + trace.observation_nodes:
                node = trace.nodes[name]
                if pyro.poutine.util.site_is_subsample(node):
                    continue
                if node["log_prob"].shape[-1:] != (scans,):
                    raise ValueError(
                        f"objective IWAE weighs each of {scans} scans by itself; site {name!r} has log-probabilities "
                        f"of shape {tuple(node['log_prob'].shape)}: draw it in the plate `scans`"
                    )
                log_weight = log_weight + sign * node["log_prob"]
        expanded: Tensor = log_weight.expand(self.num_particles, -1)
        return expanded

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over scans."""
        return -log_mean_exp(self.log_weights(model, guide, *args, **kwargs)).sum()


class Sleep(_ByDifferentiation):
    """−log q(z|x) on scans simulated from the program with z known (Hinton et al. 1995, wake–sleep).

    The arguments are those of the program; the scan's content is replaced by a simulated one with the same observed
    voxels and θ, through the same normalisation as real scans.
    """

    def differentiable_loss(
        self, model: Any, guide: Any, scan: Any = None, observed: Any = None, theta: Any = None
    ) -> Tensor:
        """−Σ log q(z|x)."""
        with torch.no_grad():
            simulated = poutine.trace(model).get_trace(
                None, observed, theta, **({} if scan is None or observed is not None else {"num_scans": len(scan)})
            )
            _check_form(simulated, self)
            z, drawn = simulated.nodes["z"]["value"], simulated.nodes["scan"]["value"]
            if observed is None:
                observed = torch.ones_like(drawn[:, :1], dtype=torch.bool)
            drawn = normalise(drawn, observed, getattr(model, "region", None))
        known = poutine.condition(guide, data={"z": z})
        guide_trace = poutine.trace(known).get_trace(drawn, observed, theta)
        log_prob: Tensor = guide_trace.log_prob_sum()
        return -log_prob


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
