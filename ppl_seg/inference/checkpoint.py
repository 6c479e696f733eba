"""Checkpoints of a training in progress: checkpoint.safetensors and checkpoint.json, consistent at any kill.

checkpoint.json holds the SHA-256 of the tensors it belongs to. New tensors are first complete under
checkpoint.safetensors.next, then checkpoint.json is replaced (this is the moment that counts), then the
tensors get their final name. Whenever the process dies, the tensors with checkpoint.json's hash are under one
of the two. Nested state dicts (torch optimisers and schedulers) become flat tensors and JSON; nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ppl_seg.errors import InputError
from ppl_seg.files import file_sha256, make_folder, write_bytes
from ppl_seg.inference.store import tensor_bytes

TENSORS = "checkpoint.safetensors"
NEXT = "checkpoint.safetensors.next"
STATE = "checkpoint.json"


def save_checkpoint(directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the directory's checkpoint by (`tensors`, `state`); `state` is JSON-able (NaN too)."""
    folder = Path(directory)
    make_folder(folder)
    if (folder / NEXT).exists():  # an earlier process died here: settle what it left before writing over it
        _settle(folder)
    content = tensor_bytes(tensors)
    write_bytes(folder / NEXT, content)
    head = {"sha256": hashlib.sha256(content).hexdigest(), "state": dict(state)}
    write_bytes(folder / STATE, json.dumps(head).encode())
    os.replace(folder / NEXT, folder / TENSORS)


def load_checkpoint(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors on the CPU, state) of the last complete checkpoint, None where there is none.

    Raises InputError where files were removed or altered by someone else.
    """
    folder = Path(directory)
    if not (folder / STATE).is_file():
        return None
    state = _settle(folder)
    return safetensors.torch.load_file(folder / TENSORS), state


def remove_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Remove the checkpoint if there is one; the JSON first, because tensors alone are no checkpoint."""
    for name in (STATE, NEXT, TENSORS):
        (Path(directory) / name).unlink(missing_ok=True)


def flatten(nested: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Split a nested structure into tensors by name (`prefix/key/key`) and a JSON-able rest.

    Leaves are tensors and JSON scalars; containers are dicts (keys of JSON scalars), lists and tuples.
    `unflatten` is the inverse. Raises ValueError for anything else: it would have to be pickled.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, visit(item, f"{name}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(item, f"{name}/{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"{name}: {type(value).__name__} can't go to a checkpoint")

    return tensors, visit(nested, prefix)


def unflatten(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The structure that `flatten` took apart."""
    if not isinstance(rest, dict):
        return rest
    ((kind, value),) = rest.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value}
    items = [unflatten(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)


def _settle(folder: Path) -> dict[str, Any]:
    """Bring the tensors that checkpoint.json means under their final name; its state."""
    path = folder / STATE
    if not path.is_file():  # the first checkpoint never became valid
        (folder / NEXT).unlink(missing_ok=True)
        return {}
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        expected, state = head["sha256"], head["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a checkpoint of ppl_seg; train again without --resume") from error
    for name in (TENSORS, NEXT):
        tensors = folder / name
        if tensors.is_file() and file_sha256(tensors) == expected:
            if name == NEXT:
                os.replace(tensors, folder / TENSORS)
            return dict(state)
    raise InputError(f"{folder / TENSORS}: missing or altered since {STATE} was written; train again without --resume")
