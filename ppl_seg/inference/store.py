"""The model directory: config.json, weights.safetensors and what else belongs to a model.

config.json holds the format version, the caller's configuration and the SHA-256 of every other file. All
files are written under temporary names and renamed, config.json last, so that a reader never sees half a file
and a directory with a config.json is complete. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ppl_seg.errors import InputError
from ppl_seg.files import file_sha256, replacing

FORMAT_VERSION = 3
LARGEST_CONFIG = 2**24  # bytes
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
_RESERVED = {"format_version", "sha256"}
# What format 2 states and format 1 meant: images were brought together by their headers or their fields of view.
_SINCE_1 = {"field": "crop"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def save_model(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes | str] | None = None,
) -> None:
    """Write a model directory; files of the same names are replaced, others are left alone.

    `config` is JSON-able (no NaN), `tensors` go to weights.safetensors (any device and memory format; they
    come back contiguous, on the CPU), `files` are further files by plain name (training.csv, report.json,
    figures). Raises ValueError for a name with a path in it and for a config that uses the keys of the format
    itself.
    """
    if clash := _RESERVED & config.keys():
        raise ValueError(f"config keys {sorted(clash)} are the format's own")
    contents: dict[str, bytes] = {WEIGHTS: tensor_bytes(tensors)}
    for name, content in (files or {}).items():
        if not _PLAIN_NAME.fullmatch(name) or name in (CONFIG, WEIGHTS):
            raise ValueError(f"{name!r} can't be a file of a model: a plain file name expected")
        contents[name] = content.encode() if isinstance(content, str) else content
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    head = {"format_version": FORMAT_VERSION, **config, "sha256": hashes}
    contents[CONFIG] = (json.dumps(head, indent=1, allow_nan=False) + "\n").encode()

    folder = Path(directory)
    with contextlib.ExitStack() as stack:  # every file is complete before the first one gets its name; config.json last
        for name in reversed(contents):
            stack.enter_context(replacing(folder / name)).write_bytes(contents[name])


def load_model_files(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a model directory: (config as it was saved, tensors on the CPU).

    Raises InputError, naming the file, where one is missing, altered or of another format version.
    """
    folder = Path(directory)
    config = _read_config(folder)
    for name, expected in config["sha256"].items():
        if not _PLAIN_NAME.fullmatch(name):
            raise InputError(
                f"{folder / CONFIG}: {name!r} is not a plain file name; this file was not written by ppl_seg"
            )
        _verify(folder / name, expected)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS}: not a safetensors file ({error}); train the model again") from error
    return {key: value for key, value in config.items() if key not in _RESERVED}, tensors


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors form of `tensors`; copies, because shared and channels_last memory is refused there."""
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return safetensors.torch.save(own)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a model directory (made by `ppl-seg prior` or `fit`) expected")
    if not path.is_file():
        raise InputError(f"{path}: missing; {folder} is no model directory, or its training was not finished")
    if path.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"{path}: {path.stat().st_size} bytes; this file was not written by ppl_seg")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version, hashes = config["format_version"], config["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the configuration of a ppl_seg model; train the model again") from error
    if version == 1:
        config |= _SINCE_1
    # in format 3 a low-rank guide's numbers have another order, all else is as in format 2
    if version not in (1, 2, FORMAT_VERSION) or (version != FORMAT_VERSION and '"low-rank"' in json.dumps(config)):
        raise InputError(
            f"{path}: format version {version} found, {FORMAT_VERSION} expected; use the ppl_seg that "
            "made the model, or train it again"
        )
    if not isinstance(hashes, dict) or WEIGHTS not in hashes:
        raise InputError(f"{path}: no checksum of {WEIGHTS}; train the model again")
    return dict(config)


def _verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing, though {CONFIG} lists it; copy the whole model directory")
    if file_sha256(path) != expected:
        raise InputError(f"{path}: altered since the model was saved (SHA-256 differs); copy it again or train again")
