"""The parameters of a model and a guide: which ones train, their snapshots, and Pyro's traps around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_seg.errors import InputError


class Parameters:
    """Model and guide seen as one set of parameters; a parameter that is in both counts once."""

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        """Raises ValueError where nothing trains, or Pyro would confuse two parameters."""
        self.parts = {"model": model, "guide": guide}
        if isinstance(model, PyroModule) and isinstance(guide, PyroModule):
            of_model = _by_store_name(model)
            for name, parameter in _by_store_name(guide).items():
                if of_model.get(name, parameter) is not parameter:
                    raise ValueError(
                        f"model and guide both have a parameter {name!r}, which is one in Pyro's store; "
                        "name the submodules differently"
                    )
        self.trainable: dict[str, nn.Parameter] = {}
        self._frozen: list[nn.Parameter] = []
        seen: set[int] = set()
        for part, module in self.parts.items():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    self._frozen.append(parameter)
                elif id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.trainable[f"{part}.{name}"] = parameter
        if not self.trainable:
            raise ValueError("model and guide have no parameter that requires a gradient")

    def check_store(self) -> None:
        """After the first call of model and guide: ValueError if its store changed what trains."""
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ValueError(
                "Pyro's parameter store unfroze a frozen parameter: keep frozen networks in plain "
                "nn.Modules (not PyroModules) with requires_grad False"
            )
        known = {name for module in self.parts.values() for name in _by_store_name(module)}
        for name in pyro.get_param_store():
            if name.replace("$$$", ".") not in known:
                raise ValueError(f"{name} was made by pyro.param: make it an attribute of a PyroModule to train it")

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything that a training changes, the tensors themselves: trainable parameters and buffers."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for part, module in self.parts.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
                if isinstance(tensor, Tensor) and not frozen and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}/{part}/{name}"] = tensor
        return found

    def load(self, saved: Mapping[str, Tensor], prefix: str) -> None:
        """Copy a snapshot back in place: memory formats and identities stay; InputError if it doesn't fit."""
        with torch.no_grad():
            for name, tensor in self.tensors(prefix).items():
                if name not in saved or saved[name].shape != tensor.shape:
                    raise InputError(f"the checkpoint's {name} doesn't fit this model; train again without --resume")
                tensor.copy_(saved[name])

    def first_not_finite(self) -> str | None:
        """The first parameter with a value, or else a gradient, that is not finite."""
        for name, parameter in self.trainable.items():
            if not torch.isfinite(parameter.detach()).all():
                return f"value of {name}"
        for name, parameter in self.trainable.items():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"gradient of {name}"
        return None

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """All modules in eval mode, and each back in its own mode afterwards."""
        modes = [(module, module.training) for part in self.parts.values() for module in part.modules()]
        for part in self.parts.values():
            part.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _by_store_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their name in Pyro's store (which writes $$$ for a dot at a plain nn.Module)."""
    prefix = f"{name}." if (name := getattr(module, "_pyro_name", "")) else ""
    return {prefix + name.removesuffix("_unconstrained"): p for name, p in module.named_parameters()}
