"""Options of a training, the device they mean, and the seeds that follow from them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppl_seg.errors import InputError

LARGE_GRID = 250_000  # voxels; above, trainings do with fewer steps and smaller batches


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `fit`.

    Adam with `learning_rate`, linear warm-up over `warmup_steps`, then half a cosine down to 0 over `steps`;
    gradients of the bound per voxel are clipped at norm `clip_norm`. Every `eval_every` steps (0: never) the
    held-out bound is computed; after `patience` evaluations in a row (0: never) without a better one the
    training stops, and with patience the best weights are kept. The named terms are computed every
    `terms_every` steps. A checkpoint is written every `checkpoint_every` steps (0: by time alone) and every
    `checkpoint_seconds`.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: str = "32"
    eval_every: int = 0
    patience: int = 0
    terms_every: int = 10
    checkpoint_every: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.precision not in ("32", "bf16"):
            raise InputError(f"precision {self.precision!r}: choose 32 or bf16")
        if self.steps < 0 or self.learning_rate <= 0:
            found = f"{self.steps} and {self.learning_rate}"
            raise InputError(f"steps and learning rate: {found} found, at least 0 and above 0 expected")

    def rate(self, step: int) -> float:
        """The learning rate of `step` (from 1): a function of the step alone, nothing to be stored."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))

    def identity(self) -> dict[str, Any]:
        """The options that a resumed training must share with the interrupted one."""
        free = {"device", "terms_every", "checkpoint_every", "checkpoint_seconds"}
        return {name: value for name, value in asdict(self).items() if name not in free}


def resolve_device(name: str) -> torch.device:
    """The device of `auto` (CUDA where there is one, else CPU), `cpu` or `cuda`; InputError where absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name!r}: choose auto, cpu or cuda")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise InputError("device cuda: torch finds no CUDA GPU on this machine; use --device cpu or auto")
    return torch.device("cuda" if present and name != "cpu" else "cpu")


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A seed for one purpose at one step: what is drawn there depends on nothing that was drawn before."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
