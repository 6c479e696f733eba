"""The benchmark of contrasts at smoke size, on heads and brains made here: nested ellipsoids of some sizes."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.images import read_label_map, read_scan, write_image

from .data.heads import BRAIN, BRIGHT, INVERTED, head_labels, resized

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_contrasts.py"
NAMES = {1: "Skin", 2: "Skull", 3: "Left-Cerebral-Cortex", 4: "Left-Cerebral-White-Matter"}
NAMES |= {5: "Left-Lateral-Ventricle", 6: "Left-Putamen", 7: "Brain-Stem"}
VALUES = {"Cerebral-Cortex": 3, "Cerebral-White-Matter": 4, "Lateral-Ventricle": 5, "Putamen": 6, "Brain-Stem": 16}


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """head_labels with three label maps for a prior and one to simulate from, oasis' groups, a brain in openms."""
    root = tmp_path_factory.mktemp("data")
    labels, affine = head_labels()
    labels = np.pad(labels, ((0, 0), (0, 0), (0, 5)))  # slices of three are 17
    for name, size in (("prior/sub-1", 1.0), ("prior/sub-2", 1.04), ("prior/sub-3", 0.96), ("dev/sub-4", 1.02)):
        save(resized(labels, size), affine, root / "head_labels" / f"{name}_dseg.nii.gz")
    rows = "".join(f"{value}\t{name}\n" for value, name in {**NAMES, 16: "Brain-Stem"}.items() if value != 7)
    (root / "head_labels" / "labels.tsv").write_text("index\tname\n" + rows + "7\tstem\n")
    (root / "head_labels" / "map.tsv").write_text("from\tto\n1\t0\n2\t0\n7\t16\n")
    (root / "oasis").mkdir()
    groups = "".join(f"{value}\t{name}\n" for name, value in VALUES.items())
    (root / "oasis" / "groups.tsv").write_text("index\tgroup\n" + groups)
    brain, generator = np.where(np.isin(labels, BRAIN), labels, 0), np.random.default_rng(0)
    for suffix, contrast in (("T1w", BRIGHT), ("T2w", INVERTED), ("FLAIR", INVERTED[::-1])):
        scan = np.array(contrast)[brain] + generator.normal(0, 2, brain.shape)
        scan = np.where(brain > 0, scan, 0).astype(np.float32)
        save(scan, affine, root / "openms" / "brains" / f"sub-9_{suffix}.nii.gz")
    lesion = (brain == 4) & (np.indices(brain.shape)[0] < 12)
    save(lesion.astype(np.uint8), affine, root / "openms" / "lesions" / "sub-9_label-lesion_mask.nii.gz")
    return root


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("benchmark_contrasts")


def run(data: Path, out: Path, *words: str) -> str:
    options = ("--spacing", "4", "--prior-steps", "1", "--draws", "2", *words)
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr + done.stdout
    return (out / "summary.md").read_text(encoding="utf-8")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_simulated_scans_look_like_their_contrast(data: Path, scripts: ModuleType, tmp_path: Path) -> None:
    """Brightness by the class, both sides alike; slices of three have the labels that most of their voxels have."""
    labels = read_label_map(data / "head_labels" / "dev" / "sub-4_dseg.nii.gz")
    options = SimpleNamespace(maps=data / "head_labels")
    for contrast, order in (("t1", (4, 3, 5)), ("t2", (5, 3, 4)), ("flair", (3, 4, 5))):
        scan, truth = scripts.simulate_head(labels, contrast, 0, options)
        assert np.array_equal(truth.data, labels.data) and scan.data.dtype == np.float32
        means = [np.median(scan.data[labels.data == value]) for value in order]
        assert means == sorted(means, reverse=True), contrast
        assert np.median(scan.data[labels.data == 0]) < 150
    again = scripts.simulate_head(labels, "flair", 0, options)[0]
    assert np.array_equal(again.data, scan.data)
    other = scripts.simulate_head(labels, "flair", 1, options)[0]
    assert not np.array_equal(other.data, scan.data)

    scan, truth = scripts.simulate_head(labels, "flairthick", 0, options)
    assert scan.shape == truth.shape == (44, 52, 17) and np.allclose(scan.spacing, (4, 4, 12))
    assert np.allclose(scan.affine @ [3, 4, 5, 1], labels.affine @ [3, 4, 16, 1])  # the middle one of 15, 16, 17
    write_image(tmp_path / "scan.nii.gz", scan.data, scan)
    assert np.allclose(read_scan(tmp_path / "scan.nii.gz").affine, scan.affine)  # the file says where the slices lie
    first, middle, last = (labels.data[..., start:51:3] for start in range(3))
    assert np.array_equal(truth.data[first == last], first[first == last])
    assert np.array_equal(truth.data[first != last], middle[first != last])


def test_page_of_simulated_heads(scripts: ModuleType) -> None:
    dice = {"1": {"t1": 0.8, "t2": 0.7}, "2": {"t1": 0.6, "t2": 0.9}}
    rows = [
        {"recipe": "default", "subject": subject, "contrast": contrast, "structure": name, "dice": value + more}
        for subject, of in dice.items()
        for contrast, value in of.items()
        for name, more in (("Putamen", 0.05), ("Caudate", -0.05), ("Vermis", np.nan))
    ]
    page = scripts.heads_page(rows)
    assert "| sub-2 | 0.600 | 0.900 |" in page and "| mean | 0.700 | 0.800 |" in page
    assert "| minus t1 | +0.000 | +0.100 |" in page and "| Putamen | 0.750 | 0.850 |" in page


@pytest.mark.slow
def test_simulated_heads_are_scored_in_their_own_voxels(data: Path, tmp_path: Path) -> None:
    words = ("--set", "heads", "--contrasts", "t1,flairthick", "--recipes", "location-em", "--label-steps", "1")
    page = run(data, tmp_path, *words)
    rows = rows_of(tmp_path / "dice.tsv")
    assert {(row["contrast"], row["subject"]) for row in rows} == {("t1", "4"), ("flairthick", "4")}
    assert {row["structure"] for row in rows} == set(VALUES) and len(rows) == 10
    assert "| minus t1 | +0.000 |" in page and "## location-em" in page
    scan = tmp_path / "scans" / "sub-4_acq-flairthick_T1w.nii.gz"
    before = scan.stat().st_mtime_ns
    assert run(data, tmp_path, *words) == page and scan.stat().st_mtime_ns == before


@pytest.mark.slow
def test_contrasts_of_a_visit_are_compared(data: Path, tmp_path: Path) -> None:
    page = run(data, tmp_path, "--set", "brains")
    rows = rows_of(tmp_path / "agreement.tsv")
    assert {(row["contrast"], row["what"]) for row in rows} == {
        *(("T2w", "default"), ("FLAIR", "default"), ("T1w+FLAIR", "default"), ("FLAIR", "shuffled")),
        *((name, "location") for name in ("T1w", "T2w", "FLAIR", "T1w+FLAIR")),
    }
    mean = {
        what: np.mean([float(row["dice"]) for row in rows if row["what"] == what and row["contrast"] == "FLAIR"])
        for what in ("default", "shuffled")
    }
    assert mean["default"] > 0.8 and mean["default"] > mean["shuffled"]
    assert "| T1w+FLAIR, default |" in page
    lesions = rows_of(tmp_path / "lesions.tsv")
    assert [row["contrast"] for row in lesions] == ["T1w", "T2w", "FLAIR", "T1w+FLAIR"]
    assert all(float(row["Cerebral-White-Matter"]) > 0.5 for row in lesions)
    shuffled, scan = (
        nib.load(folder / "sub-9_FLAIR.nii.gz").get_fdata()
        for folder in (tmp_path / "shuffled", data / "openms" / "brains")
    )
    assert np.array_equal(np.sort(shuffled, None), np.sort(scan, None)) and (shuffled != scan).mean() > 0.1
