"""A killed `prior` ends, resumed, with the weights of an undisturbed one; a model directory comes back as it was."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg.api import Model, learn_prior, load_model

STEPS = 60
# The real command, with a checkpoint every 7 steps in place of every minute.
OFTEN = """
import functools, sys
import ppl_seg.api.prior as prior
prior.TrainingOptions = functools.partial(prior.TrainingOptions, checkpoint_every=7)
from ppl_seg.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    random = np.random.default_rng(1)
    axes = np.stack(np.meshgrid(*map(np.arange, (12, 12, 8)), indexing="ij"), -1) - 5.0
    for n in range(5):
        inside = ((axes / random.uniform(3, 4.5, 3)) ** 2).sum(-1) < 1
        image = nib.Nifti1Image((inside * (1 + (axes[..., 0] > 0))).astype(np.uint8), np.eye(4))
        nib.save(image, folder / f"sub-{n}_dseg.nii.gz")
    return folder


def arguments(maps: Path, out: Path) -> list[str]:
    return ["prior", str(maps), "--out", str(out), "--latent-dim", "3", "--steps", str(STEPS), "--threads", "1"]


def steps_done(out: Path) -> int:
    try:
        with (out / "training.csv").open() as stream:
            return len(list(csv.DictReader(stream)))
    except OSError:
        return 0


def test_a_killed_prior_resumes_bit_for_bit(maps: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", OFTEN, *arguments(maps, killed)], env=environment)
    deadline = time.monotonic() + 60
    while steps_done(killed) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    assert (killed / "checkpoint.json").is_file() and not (killed / "config.json").exists()
    command = [sys.executable, "-m", "ppl_seg"]
    subprocess.run([*command, *arguments(maps, killed), "--resume"], env=environment, check=True)
    subprocess.run([*command, *arguments(maps, whole)], env=environment, check=True)
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert steps_done(killed) == STEPS
    assert not list(killed.glob("checkpoint*"))


@pytest.mark.parametrize("shape", ["convolutional", "warp"])
def test_a_model_is_there_when_all_its_files_are(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        learn_prior([maps], out=tmp_path, shape=shape, steps=3)
    assert {"draws.png", "training.png", "training.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_model_directory_round_trip(maps: Path, tmp_path: Path) -> None:
    model = learn_prior([maps], out=tmp_path / "model", latent_dim=3, steps=3)
    again = load_model(tmp_path / "model")
    assert isinstance(again, Model)
    assert again.hash == model.hash
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.shape_prior.log_label_probs(z), model.shape_prior.log_label_probs(z))
    assert (again.grid, again.align, again.table.names) == (model.grid, model.align, model.table.names)
