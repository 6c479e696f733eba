"""A mean-field family whose noise is written down beforehand, so that draws can be compared one by one."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class ScriptedNormal(dist.Normal):
    """Normal that takes its noise from a script (T, *batch_shape), in order, T draws in all."""

    def __init__(self, loc: Tensor, scale: Tensor, script: Script, validate_args: Any = None) -> None:
        self.script = script
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScriptedNormal:
        return ScriptedNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.script)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * self.script.take(shape)


class Script:
    """Noise (T, B, D) handed out from the first draw on."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.next = noise, 0

    def rewind(self) -> None:
        self.next = 0

    def take(self, shape: torch.Size) -> Tensor:
        count = shape.numel() // self.noise[0].numel()
        assert self.next + count <= len(self.noise), "the script is too short"
        out = self.noise[self.next : self.next + count].reshape(shape)
        self.next += count
        return out


class ScriptedFamily(torch.nn.Module):
    """raw (..., 2D) -> Independent normal with loc = raw[:D], scale = exp(raw[D:]) and scripted noise."""

    def __init__(self, latent_dim: int, script: Script) -> None:
        super().__init__()
        self.latent_dim, self.num_parameters, self.script = latent_dim, 2 * latent_dim, script

    def forward(self, raw: Tensor) -> dist.Independent:
        loc, log_scale = raw.split(self.latent_dim, -1)
        return ScriptedNormal(loc, log_scale.exp(), self.script).to_event(1)
