"""A conjugate model with a known posterior, and a task that trains on it. Run as a program, it kills itself.

z ~ N(0, 1), x_i | z ~ N(z, 1), i = 1..n: the posterior is N(Σx / (n + 1), 1 / (n + 1)); log p(x) is known.
"""

from __future__ import annotations

import csv
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_seg.inference.trainer import Batch, Task, TrainingLog, TrainingOptions, fit

SCANS, VOXELS = 4, 5


class Model(PyroModule):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("scans", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, x.shape[1]), 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    """q(z|x) = N(a·mean(x) + b, exp(c)²); exact for a = n/(n+1), b = 0, exp(c)² = 1/(n+1)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1)
        self.register_parameter("log_scale", nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        loc = self.encoder(x.mean(1, keepdim=True)).squeeze(1)
        with pyro.plate("scans", x.shape[0]):
            z: Tensor = pyro.sample("z", dist.Normal(loc, self.log_scale.exp()))
        return z


class Toy(Task):
    """Random batches of fixed data; `offset` stands for what a task learns beside the gradient (θ)."""

    def __init__(self, held_out: int = 0) -> None:
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(64, 1, generator=generator)
        self.data = z + torch.randn(64, VOXELS, generator=generator)
        self.num_held_out = held_out
        self.offset = torch.zeros(())

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(self.data), (SCANS,), generator=generator)
        noise = 1e-3 * torch.randn(())  # from the global generator
        return Batch((self.data[chosen] + noise + self.offset,), SCANS, VOXELS)

    def after_step(self, step: int, batch: Batch) -> None:
        self.offset = 0.5 * self.offset + 1e-3 * batch.args[0].mean()

    def held_out(self) -> Iterable[Batch]:
        return [Batch((part,), len(part), VOXELS) for part in self.data[: self.num_held_out].split(8)]

    def terms(self, model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, float]:
        trace = pyro.poutine.trace(guide).get_trace(*args)
        trace.compute_log_prob()
        return {"log_q": float(trace.log_prob_sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.offset = state["offset"]


def log_evidence(x: Tensor) -> float:
    """log p(x) (sum over scans), in closed form."""
    covariance = torch.eye(x.shape[1]) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(x.shape[1]), covariance).log_prob(x).sum())


def train(directory: str | None, resume: bool, task: Toy | None = None, **options: Any) -> tuple[Guide, TrainingLog]:
    """A training with evaluations, an early stop in reach, and a checkpoint every third step."""
    torch.manual_seed(0)
    guide, task = Guide(), task or Toy(held_out=16)
    settings = {
        "steps": 20,
        "learning_rate": 0.05,
        "eval_every": 4,
        "patience": 3,
        "checkpoint_every": 3,
    } | options
    log = fit(
        Model(),
        guide,
        Trace_ELBO(),
        task,
        TrainingOptions(**settings),
        directory=directory,
        resume=resume,
        progress=False,
    )
    return guide, log


class Deadly(Toy):
    """A task that dies by SIGKILL in the batch of one step."""

    def __init__(self, step: int) -> None:
        super().__init__(held_out=16)
        self.step = step

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, generator)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    train(sys.argv[1], resume=False, task=Deadly(int(sys.argv[2])))
