"""The benchmark of the registration at smoke size, on heads made here: nested ellipsoids of some sizes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .data.heads import head_labels, resized

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_registration.py"
NAMES = {1: "Skin", 2: "Skull", 3: "Left-Cerebral-Cortex", 4: "Left-Cerebral-White-Matter"}
NAMES |= {5: "Left-Lateral-Ventricle", 6: "Left-Putamen", 7: "Brain-Stem"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with three label maps for a prior and one to simulate from."""
    labels, affine = head_labels()
    root = tmp_path / "data"
    for name, size in (("prior/sub-1", 1.0), ("prior/sub-2", 1.04), ("prior/sub-3", 0.96), ("dev/sub-4", 1.02)):
        path = root / f"{name}_dseg.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(resized(labels, size), affine), path)
    rows = "".join(f"{value}\t{name}\n" for value, name in NAMES.items())
    (root / "labels.tsv").write_text("index\tname\n" + rows, encoding="utf-8")
    return root


def test_a_moved_head_is_segmented_as_the_unmoved_one(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--data", data, "--out", out, "--heads", 1, "--spacing", 6, "--prior-steps", 1, "--draws", 1)
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "1 of 1 heads pass" in done.stdout, done.stderr + done.stdout
    with open(out / "structures.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["structure"] for row in rows} == set(NAMES.values())
    assert all(float(row["change"]) <= 0.02 and float(row["dice"]) >= 0.97 for row in rows)
    unmoved, moved = (nib.load(out / "scans" / name / "head-00_T1w.nii.gz") for name in ("unmoved", "moved"))
    assert np.array_equal(unmoved.dataobj, moved.dataobj)
    corner = np.linalg.norm((moved.affine - unmoved.affine)[:3, 3])
    assert corner > 5  # mm
