from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ppl_seg.api.output import (
    ASLEEP,
    BEGUN,
    LABELS,
    begin_training,
    claim_model_directory,
    finish_training,
    is_finished,
    say_device,
)
from ppl_seg.errors import InputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_training_is_resumed_with_what_it_began(tmp_path: Path) -> None:
    folder, identity = tmp_path / "model", {"scans": ["a"], "recipe": {"steps": 5, "maps": None}, "mask": Path("m")}
    begin_training(folder, identity, resume=False)
    begin_training(folder, identity, resume=True)
    with pytest.raises(InputError, match="had another scans; give the same inputs and options, or start .* --force"):
        begin_training(folder, {**identity, "scans": ["a", "b"]}, resume=True)
    (folder / BEGUN).write_text("{")
    with pytest.raises(InputError, match="begun.json: cannot be read"):
        begin_training(folder, identity, resume=True)


def test_a_model_that_is_replaced_goes_when_the_training_begins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("the user's")
    (tmp_path / ".tmp-1234-weights.safetensors").write_text("half")
    (tmp_path / "checkpoint.json").write_text("{}")  # of the training that --force gives up
    for name in (ASLEEP, LABELS):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="--force"):
        claim_model_directory(tmp_path, force=False, resume=False)
    claim_model_directory(tmp_path, force=True, resume=False)
    assert (tmp_path / "config.json").exists()  # bad input may still end it
    begin_training(tmp_path, {}, resume=False)
    assert names(tmp_path) == {BEGUN, "notes.txt"}


def test_files_of_something_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("the user's")
    with pytest.raises(InputError, match=r"report\.json of something else.*--out, or --force"):
        claim_model_directory(tmp_path, force=False, resume=False)
    claim_model_directory(tmp_path, force=True, resume=False)
    begin_training(tmp_path, {}, resume=False)
    claim_model_directory(tmp_path, force=False, resume=False)  # of a training without a checkpoint


@pytest.mark.parametrize("name, device, said", [("auto", "cpu", 1), ("cpu", "cpu", 0), ("auto", "cuda", 0)])
def test_that_no_gpu_was_found_is_said(name: str, device: str, said: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ppl_seg"):
        say_device(name, torch.device(device))
    assert caplog.text.count("no CUDA GPU found") == said


def test_a_finished_model_is_tidied_up(tmp_path: Path) -> None:
    """Killed between the end of the training and the removal of its files."""
    assert not is_finished(tmp_path, resume=True)
    for name in ("config.json", "checkpoint.json", "checkpoint.safetensors", BEGUN, ".tmp-1-training.csv"):
        (tmp_path / name).write_text(json.dumps({}))
    (tmp_path / ASLEEP).mkdir()
    assert not is_finished(tmp_path, resume=True)
    (tmp_path / "checkpoint.json").unlink()
    assert not is_finished(tmp_path, resume=False) and is_finished(tmp_path, resume=True)
    assert names(tmp_path) == {"config.json"}
    finish_training(tmp_path)
    assert names(tmp_path) == {"config.json"}
