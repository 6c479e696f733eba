from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg.api import prior, resources, run
from ppl_seg.api.load import load_model
from ppl_seg.api.model import Model
from ppl_seg.api.resources import (
    available_memory,
    fit_memory,
    is_out_of_memory,
    learning_memory,
    memory_errors,
    segment_memory,
)
from ppl_seg.api.run import segment_scans
from ppl_seg.errors import InputError
from ppl_seg.inference.recipes import build_recipe

FORMAT_1 = Path(__file__).parents[1] / "inference" / "format-1"


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    data = np.random.default_rng(0).normal(100, 10, (8, 8, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_more_of_anything_takes_more_memory() -> None:
    model = load_model(FORMAT_1)

    def needed(voxels: int = 10**7, channels: int = 1, draws: int = 200, share: float = 1.0, **kept: bool) -> float:
        options = {"probabilities": False, "save_draws": False, **kept}
        return segment_memory(model, voxels, channels, draws, share=share, **options)

    usual = needed()
    assert usual > 0.5e9 and needed(share=1 / 16) < usual
    for more in ({"voxels": 10**8}, {"channels": 2}, {"probabilities": True}, {"save_draws": True}):
        assert needed(**more) > usual  # type: ignore[arg-type]
    recipe = build_recipe("default")
    assert learning_memory("convolutional", 9, (64, 64, 64)) > learning_memory("warp", 9, (64, 64, 64))
    assert learning_memory("warp", 9, (64, 64, 64)) > learning_memory("warp", 3, (64, 64, 64))
    assert fit_memory(model, recipe, 100, 2) > fit_memory(model, recipe, 100, 1) > fit_memory(model, recipe, 10, 1)


def test_free_memory_is_known_here() -> None:
    free = available_memory(torch.device("cpu"))
    assert free > 0 and (free == math.inf or free < 1e15)


def test_limits_of_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\ninactive_file 400\n")
    assert resources._left_in(tmp_path) == 1400
    (tmp_path / "memory.max").write_text("max\n")
    assert resources._left_in(tmp_path) == math.inf


def test_what_does_not_fit_is_refused_before_work(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available_memory", lambda _: 1e8)
    with pytest.raises(InputError, match=r"scan.nii.gz: about 0\.\d GB of memory are needed, 0\.1 GB are free; free"):
        segment_scans([scan], model=FORMAT_1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_needed_is_said(scan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ppl_seg"):
        segment_scans([scan], model=FORMAT_1, out=tmp_path / "out", draws=2, refine=0)
    assert "GB of memory needed" in caplog.text


def out_of_memory() -> RuntimeError:
    """As torch's CPU allocator says it."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("so much memory is nowhere")


ERRORS = [MemoryError, out_of_memory, lambda: torch.OutOfMemoryError("CUDA out of memory"), lambda: numpy_error()]


def numpy_error() -> MemoryError:
    try:
        np.empty(2**60, np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError("so much memory is nowhere")


@pytest.mark.parametrize("make", ERRORS)
def test_smaller_pieces_after_out_of_memory(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    assert is_out_of_memory(make()) and not is_out_of_memory(RuntimeError("shapes do not match"))
    shares: list[float] = []
    segment = Model.segment

    def tight(self: Model, *arguments: Any, share: float, **options: Any) -> Any:
        shares.append(share)
        if share > 1 / 16:
            raise make()
        return segment(self, *arguments, share=share, **options)

    monkeypatch.setattr(Model, "segment", tight)
    report = segment_scans([scan], model=FORMAT_1, out=tmp_path / "out", draws=2, refine=0)
    assert report.rows[0]["status"] == "ok" and shares == [1.0, 1 / 4, 1 / 16]


def test_an_error_says_what_is_needed(scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeless(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Model, "segment", hopeless)
    report = segment_scans([scan], model=FORMAT_1, out=tmp_path / "out", draws=2, refine=0)
    assert report.exit_code == 1 and "out of memory; about 0." in report.rows[0]["message"]
    with pytest.raises(InputError, match="fit: out of memory; about 2.5 GB are needed; use less"):
        with memory_errors("fit", 2.5e9, "use less"):
            hopeless()
    with pytest.raises(RuntimeError, match="shapes"):
        with memory_errors("fit", 2.5e9, "use less"):
            raise RuntimeError("shapes")


def test_label_maps_that_do_not_fit_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        nib.save(nib.Nifti1Image(np.ones((8, 8, 6), np.int16), np.eye(4)), tmp_path / f"sub-{number}_dseg.nii.gz")
    monkeypatch.setattr(prior, "available_memory", lambda device: 0.5e9)
    with pytest.raises(InputError, match=r"prior: about 0.6 GB of memory are needed, 0.5 GB are free"):
        prior.learn_prior([tmp_path], out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_grid_too_fine_to_learn_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label maps may be small where `--spacing` makes the grid large."""
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[4:12, 4:12, 4:12] = 1
    for number in range(3):
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"sub-{number}_dseg.nii.gz")
    monkeypatch.setattr(prior, "available_memory", lambda _: 0.62e9)
    with pytest.raises(InputError, match=r"prior: about 0\.\d GB of memory .*or a coarser --spacing"):
        prior.learn_prior(tmp_path, spacing=0.25, steps=1)
