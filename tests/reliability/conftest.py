"""A tiny study: ellipsoids, a small model that the repository keeps, and a driver that runs commands and kills them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

SHAPE = (8, 8, 6)
MODEL = Path(__file__).parents[1] / "inference" / "format-1"
Ask = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    code: int
    stderr: str
    operations: int
    seconds: float


@pytest.fixture(scope="session")
def ask(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """ask(*arguments, kill_at=..., ...) runs a command in a child of the driver: an Answer, two with `together`."""
    driver = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("driver.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )
    stdin, stdout = driver.stdin, driver.stdout
    assert stdin is not None and stdout is not None

    def call(*arguments: object, together: tuple[object, ...] = (), **how: Any) -> Any:
        request = {"arguments": [str(argument) for argument in arguments], **how}
        if together:
            request["together"] = {"arguments": [str(argument) for argument in together]}
        print(json.dumps(request), file=stdin, flush=True)
        answers = [Answer(**one) for one in json.loads(stdout.readline())]
        return answers if together else (*answers, None)[0]

    warm = tmp_path_factory.mktemp("warm")
    call(*segment(scans, warm / "segment"), here=True)
    call(*fit(scans, warm / "fit"), here=True)
    yield call
    driver.communicate(timeout=30)


def write_scans(folder: Path, number: int, first: int = 0) -> Path:
    random = np.random.default_rng(first)
    axes = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - (np.array(SHAPE) - 1) / 2
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(first, first + number):
        inside = ((axes / random.uniform(2.2, 3, 3)) ** 2).sum(-1) < 1
        scan = np.array([60.0, 100.0, 110.0])[np.where(inside, np.where(axes[..., 1] > 0, 2, 1), 0)]
        data = (scan + random.normal(0, 5, SHAPE)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"sub-{n:03}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("study") / "scans", 2)


def segment(scans: Path, out: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a quick `segment`."""
    return ("segment", scans, "--model", MODEL, "--out", out, "--draws", 3, "--refine", 1, "--threads", 1, *more)


def fit(scans: Path, out: Path, *more: object) -> tuple[object, ...]:
    """Arguments of a quick `fit`."""
    return ("fit", scans, "--prior", MODEL, "--out", out, "--steps", 6, "--threads", 1, *more)


def content(folder: Path) -> dict[str, Any]:
    """All files below `folder`, without what differs between two runs of one command: times, and their checksums."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.name == "training.csv":
            with path.open() as stream:
                found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]
        elif path.suffix == ".json":
            timed = {"Seconds", "Command", "seconds", "stages", "command", "sha256"}
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in timed}
    return found


def is_temporary(name: str) -> bool:
    return any(part.startswith(".tmp-") for part in Path(name).parts)
