"""Where results go: folders claimed before work, messages to the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ppl_seg.errors import InputError

LOGGER = logging.getLogger("ppl_seg")


def say(messages: Sequence[str]) -> None:
    """Tell the user what was assumed; the command line shows it on stderr."""
    for message in messages:
        LOGGER.info(message)


def is_finished(directory: str | Path | None, resume: bool) -> bool:
    """Whether --resume finds a finished model, with nothing left to do."""
    if directory is None or not resume:
        return False
    folder = Path(directory)
    finished = (folder / "config.json").is_file() and not (folder / "checkpoint.json").exists()
    if finished:
        say([f"{folder}: finished already; nothing to resume"])
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
    if (folder / "checkpoint.json").exists():
        raise InputError(f"{folder}: holds an interrupted training; go on with --resume, or start again with --force")
