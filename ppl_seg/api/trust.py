"""Code of others: it is imported when the caller names it, never because a file does."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ppl_seg.errors import InputError
from ppl_seg.guides.families import FAMILIES, Family
from ppl_seg.inference.objectives import OBJECTIVES
from ppl_seg.models.decoders import DECODERS


def trust(*names: str | None) -> None:
    """Import what has the form `package.module:Name`, so that it is found by that name; other names are left alone.

    A subclass of `guides.families.Family` is a guide, a class with `differentiable_loss` and `form` an objective,
    another `nn.Module` a decoder.

    Raises:
        InputError: it can't be imported, or is nothing that a model is made of.
    """
    for name in names:
        if name is None or ":" not in name:
            continue
        module, _, attribute = name.partition(":")
        try:
            part: Any = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the module is somebody else's: it may raise anything
            raise InputError(f"{name}: cannot be imported ({type(error).__name__}: {error})") from error
        if isinstance(part, type) and issubclass(part, Family):
            FAMILIES[name] = part
        elif hasattr(part, "differentiable_loss") and hasattr(part, "form"):
            OBJECTIVES[name] = part
        elif isinstance(part, type) and issubclass(part, nn.Module):
            DECODERS[name] = part
        else:
            raise InputError(f"{name}: neither a guide's family, an objective nor a decoder; see docs/own_parts.md")


def refuse_foreign(names: dict[str, str], source: object) -> None:
    """Refuse import paths, read from the file `source` (what they are for → name), that nobody named to `trust`.

    Raises:
        InputError: with the way to trust them.
    """
    known = {*FAMILIES, *OBJECTIVES, *DECODERS}
    for what, name in names.items():
        if ":" in str(name) and name not in known:
            raise InputError(
                f"{source}: its {what} is {name}, code that is not ppl_seg's; if you trust it, give --trust {name}"
            )
