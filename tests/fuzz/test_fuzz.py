"""Thousands of damaged files, read by a process of their own: no hang, no strange error, no great memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.models import damaged_model
from tests.fuzz.worker import read_model

ROOT = Path(__file__).parents[2]
MOST_MEMORY = 2 * 10**9  # bytes of the whole process


def read_damaged(what: str, first: int, last: int, folder: Path) -> dict[str, int]:
    """Counts of what became of the cases `first` to `last` - 1, and the process's peak memory."""
    arguments = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.worker", what, str(first), str(last), str(folder)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr == ""
    counts: dict[str, int] = json.loads(done.stdout)
    assert counts["refused"] + counts["read"] == last - first
    assert counts["peak"] < MOST_MEMORY
    return counts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the small model `model`: a fit, which has all parts."""
    shutil.copytree(ROOT / "tests" / "inference" / "format-1", tmp_path / "model")
    return tmp_path


def test_some_damaged_images(tmp_path: Path) -> None:
    counts = read_damaged("images", 0, 200, tmp_path)
    assert counts["read"] > 20 and counts["refused"] > 20


def test_some_damaged_models(model: Path) -> None:
    outcomes = [read_model(damaged_model(model, number)) for number in range(60)]
    assert outcomes.count("refused") > 30


@pytest.mark.slow
def test_many_damaged_images(tmp_path: Path) -> None:
    counts = read_damaged("images", 200, 12_000, tmp_path)
    assert counts["read"] > 1000 and counts["refused"] > 1000


@pytest.mark.slow
def test_many_damaged_models(model: Path) -> None:
    counts = read_damaged("models", 60, 2_000, model)
    assert counts["read"] > 50 and counts["refused"] > 1000
