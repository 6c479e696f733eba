"""Where results go: model folders claimed before work, begun, finished; messages to the user."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppl_seg.errors import InputError
from ppl_seg.files import remove, remove_temporaries, write_text
from ppl_seg.inference.checkpoint import remove_checkpoint

LOGGER = logging.getLogger("ppl_seg")
ASLEEP = "asleep"  # folder of the checkpoint of a fit's first training
LABELS = "labels"  # and of its last, with a folder for each round
BEGUN = "begun.json"  # what the training in progress is of
# names that a model's files and folders have
OURS = ("config.json", "weights.safetensors", "training.csv", "report.json", ASLEEP, LABELS)


def say(messages: Sequence[str]) -> None:
    """Tell the user what was assumed; the command line shows it on stderr."""
    for message in messages:
        LOGGER.info(message)


def say_device(asked: str, device: torch.device) -> None:
    """Where `auto` found no GPU, say so; at the end, so that of a failure only the failure is said."""
    if asked == "auto" and device.type == "cpu":
        say(["no CUDA GPU found: the CPU computed"])


def is_finished(directory: str | Path | None, resume: bool) -> bool:
    """Whether --resume finds a finished model, with nothing left to do but to tidy up."""
    if directory is None or not resume:
        return False
    folder = Path(directory)
    finished = (folder / "config.json").is_file() and not (folder / "checkpoint.json").exists()
    if finished:
        finish_training(folder)
        say([f"{folder}: finished already, of whatever inputs; nothing to resume"])
    return finished


def claim_model_directory(directory: str | Path, force: bool, resume: bool) -> None:
    """Refuse a folder that holds a model already, before any work.

    Raises:
        InputError: the folder is in use and neither force nor resume allows it.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file where the model's folder is expected; choose another --out")
    if not folder.is_dir() or force or resume:
        return
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: holds a model already; give another --out, or --force to replace it")
    begun = (folder / BEGUN).exists()
    if (folder / "checkpoint.json").exists() or (begun and any((folder / name).exists() for name in (ASLEEP, LABELS))):
        raise InputError(f"{folder}: holds an interrupted training; go on with --resume, or start again with --force")
    if not begun and (foreign := [name for name in OURS if (folder / name).exists()]):
        raise InputError(
            f"{folder}: holds {', '.join(foreign)} of something else, which a model's would replace; give another "
            "--out, or --force to replace it"
        )


def begin_training(directory: str | Path, identity: Mapping[str, Any], resume: bool) -> None:
    """The training begins: a model that is to be replaced goes, and what this training is of is written down.

    Args:
        identity: inputs and options that a resumed training must share with the interrupted one.

    Raises:
        InputError: the interrupted training was of something else, or the folder cannot be written.
    """
    folder, mine = Path(directory), json.loads(json.dumps(identity, default=str))
    remove_temporaries(folder)
    if not resume:
        remove(folder / "config.json")  # with --force; else nothing is there
        _remove_checkpoints(folder)  # a later --resume must not take them for this training's
    elif (folder / BEGUN).is_file():
        try:
            theirs = dict(json.loads((folder / BEGUN).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{folder / BEGUN}: cannot be read; train again with --force") from error
        if changed := [name for name in mine if mine[name] != theirs.get(name)]:
            raise InputError(
                f"{folder}: the interrupted training had another {', '.join(changed)}; give the same inputs and "
                "options, or start again with --force"
            )
    write_text(folder / BEGUN, json.dumps(mine) + "\n")


def finish_training(directory: str | Path) -> None:
    """The model and its figures are written: remove what served the training."""
    folder = Path(directory)
    _remove_checkpoints(folder)  # from here on it is finished
    remove(folder / BEGUN)
    remove_temporaries(folder)


def _remove_checkpoints(folder: Path) -> None:
    remove_checkpoint(folder)
    for name in (ASLEEP, LABELS):
        shutil.rmtree(folder / name, ignore_errors=True)
