"""A training that is interrupted goes on, bit for bit; with other options or another model it is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from ppl_seg.errors import InputError
from ppl_seg.inference.checkpoint import load_checkpoint
from ppl_seg.inference.trainer import Batch, TrainingOptions, fit
from ppl_seg.inference.training_log import LogWriter, TrainingLog
from tests.inference import toy
from tests.inference.toy import rows, weights


def without_seconds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


class Interrupted(Exception):
    pass


class Breaking(toy.Toy):
    def __init__(self, step: int) -> None:
        super().__init__(held_out=16)
        self.step = step

    def after_step(self, step: int, batch: Batch) -> None:
        super().after_step(step, batch)
        if step == self.step:
            raise Interrupted


@pytest.mark.parametrize("step", [2, 3, 11, 19])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    guide, log = toy.train(str(tmp_path / "whole"), resume=False)
    with pytest.raises(Interrupted):
        toy.train(str(tmp_path / "broken"), resume=False, task=Breaking(step))
    assert (load_checkpoint(tmp_path / "broken") is None) == (step < 4)
    torch.manual_seed(99)  # the caller's random state does not matter
    resumed, resumed_log = toy.train(str(tmp_path / "broken"), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(guide), weights(resumed), strict=True))
    assert without_seconds(log.rows) == without_seconds(resumed_log.rows)
    assert (log.best_step, log.best_held_out) == (resumed_log.best_step, resumed_log.best_held_out)
    found, expected = rows(tmp_path / "broken" / "training.csv"), rows(tmp_path / "whole" / "training.csv")
    assert without_seconds(found) == without_seconds(expected)
    assert os.listdir(tmp_path / "broken") == ["training.csv"]


def test_killed_and_resumed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.inference.toy", str(tmp_path / "killed"), "12"]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    with (tmp_path / "killed" / "training.csv").open("a") as stream:
        stream.write("12,-1.")  # half a line
    guide, _ = toy.train(None, resume=False)
    resumed, log = toy.train(str(tmp_path / "killed"), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(guide), weights(resumed), strict=True))
    assert [int(row["step"]) for row in rows(tmp_path / "killed" / "training.csv")] == list(range(1, log.steps + 1))


@pytest.mark.parametrize("left", ["1", "13,-1."])
def test_a_row_cut_short_at_the_checkpoint_goes(tmp_path: Path, left: str) -> None:
    log = TrainingLog()
    writer = LogWriter(log, tmp_path, 0)
    for step in (11, 12):
        writer.write({"step": step, "bound_per_voxel": -1.0, "kl": 2.0, "learning_rate": 0.1, "seconds": 1.0 * step})
    writer.close()
    with (tmp_path / "training.csv").open("a") as stream:
        stream.write(left)
    resumed = TrainingLog()
    LogWriter(resumed, tmp_path, 13).close()
    assert [row["step"] for row in resumed.rows] == [11, 12]


def test_a_term_that_comes_later_gets_a_column(tmp_path: Path) -> None:
    """As after training.csv was removed by hand: the terms come at some steps only, not at the first that follows."""
    log = TrainingLog()
    writer = LogWriter(log, tmp_path, 9)
    for step, terms in ((10, {}), (11, {"kl": 2.0}), (12, {})):
        row = {"step": step, "bound_per_voxel": -1.0, **terms, "learning_rate": 0.1, "seconds": 1.0 * step}
        writer.write(row)
    writer.close()
    found = rows(tmp_path / "training.csv")
    assert [row["step"] for row in found] == ["10", "11", "12"] and [row["kl"] for row in found] == ["", "2.0", ""]
    again = TrainingLog()
    LogWriter(again, tmp_path, 12).close()
    assert again.rows == log.rows


def test_checkpoint_kept_until_the_model_is_stored(tmp_path: Path) -> None:
    guide, log = toy.train(str(tmp_path), resume=False)
    torch.manual_seed(0)
    options = TrainingOptions(steps=20, learning_rate=0.05, eval_every=4, patience=3)
    again = toy.Guide()
    fit(
        toy.Model(),
        again,
        Trace_ELBO(),
        toy.Toy(16),
        options,
        directory=tmp_path,
        keep_checkpoint=True,
        progress=False,
    )
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == log.steps
    resumed, _ = toy.train(str(tmp_path), resume=True)
    for a, b, c in zip(weights(guide), weights(again), weights(resumed), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_resume_refuses_other_options_and_another_model(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        toy.train(str(tmp_path), resume=False, task=Breaking(10))
    with pytest.raises(InputError, match="another learning_rate, seed"):
        toy.train(str(tmp_path), resume=True, seed=3, learning_rate=0.1)
    guide = toy.Guide()
    guide.encoder = nn.Linear(2, 1)
    options = TrainingOptions(steps=20, learning_rate=0.05, eval_every=4, patience=3)
    with pytest.raises(InputError, match="guide/encoder.weight doesn't fit"):
        fit(
            toy.Model(),
            guide,
            Trace_ELBO(),
            toy.Toy(),
            options,
            directory=tmp_path,
            resume=True,
            progress=False,
        )
