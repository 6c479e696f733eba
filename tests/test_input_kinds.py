"""Folders as labs have them, through the real commands: FreeSurfer's subjects, a BIDS dataset with derivatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SHAPE = (10, 12, 8)
VALUES = (2, 3, 4, 10, 11, 41, 42, 43, 49, 50)
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Run:
    """run(*arguments) gives (stdout, stderr) of a command that succeeds."""

    def call(*arguments: object) -> tuple[str, str]:
        code, out, err = run(*arguments)
        assert code == 0, out + err
        return out, err

    return call


def label_map(number: int) -> np.ndarray:
    """Ten structures of FreeSurfer in a block, one slab each."""
    labels = np.zeros(SHAPE, np.int32)
    for place, value in enumerate(VALUES):
        labels[2:8, 1 + place, 1 + number % 2 : 7] = value
    return labels


def scan_of(labels: np.ndarray, number: int) -> np.ndarray:
    return (labels % 37 * 3.0 + np.random.default_rng(number).normal(0, 2, SHAPE)).astype(np.float32)


def save(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(kind(data, np.diag([-1.0, 1, 1, 1])), path)


def outputs(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*_dseg.nii.gz"))


def test_freesurfer_subjects(run: Run, tmp_path: Path) -> None:
    subjects, model = tmp_path / "subjects", tmp_path / "model"
    for number, name in enumerate(("bert", "fred", "sub-03_ses-1", "fsaverage")):
        aseg = label_map(number)
        parcels = np.where(aseg == 3, 1001 + number, np.where(aseg == 41, 4030, aseg))
        mri = subjects / name / "mri"
        for volume, data in (("aseg", aseg), ("aparc+aseg", parcels.astype(np.int32))):
            save(mri / f"{volume}.mgz", data)
        for volume in ("orig", "norm"):
            save(mri / f"{volume}.mgz", scan_of(aseg, number))
    options = ("--out", model, "--merge-sides", "--steps", 1, "--latent-dim", 2)
    _, err = run("prior", f"{subjects}/*/mri/aparc+aseg.mgz", *options)
    assert "fsaverage/mri/aparc+aseg.mgz: FreeSurfer's template; skipped" in err
    assert "4 cortical and white matter parcels" in err and "3 label maps, 5 structures" in err
    names = [label["name"] for label in json.loads((model / "config.json").read_text())["labels"]]
    assert names[1:3] == ["Cerebral-White-Matter", "Cerebral-Cortex"]

    quick = ("--model", model, "--refine", 0, "--draws", 2)
    run("segment", subjects, *quick, "--out", tmp_path / "out")
    assert outputs(tmp_path / "out") == [
        "bert/mri/orig_dseg.nii.gz",
        "fred/mri/orig_dseg.nii.gz",
        "sub-03/ses-1/anat/sub-03_ses-1_seg-ppl_desc-orig_dseg.nii.gz",
    ]
    run("segment", subjects, *quick, "--suffix", "norm", "--participant-label", "fred", "--out", tmp_path / "norm")
    assert outputs(tmp_path / "norm") == ["fred/mri/norm_dseg.nii.gz"]
    out, _ = run("evaluate", tmp_path / "out", subjects)
    assert "Cerebral-Cortex" in out


def test_a_bids_dataset(run: Run, tmp_path: Path) -> None:
    dataset, manual, out = tmp_path / "ds", tmp_path / "ds/derivatives/manual", tmp_path / "ds/derivatives/ppl"
    for number in range(4):
        anat = f"sub-0{number}/ses-1/anat/sub-0{number}_ses-1"
        labels = label_map(number)
        save(manual / f"{anat}_dseg.nii.gz", labels)
        save(manual / f"{anat}_desc-brain_mask.nii.gz", (labels > 0).astype(np.uint8))
        for contrast in ("T1w", "FLAIR"):
            save(dataset / f"{anat}_{contrast}.nii.gz", scan_of(labels, number))
        save(dataset / f"sub-0{number}/ses-1/func/sub-0{number}_ses-1_bold.nii.gz", scan_of(labels, number))
    (dataset / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    (manual / "dataset_description.json").write_text('{"Name": "y", "DatasetType": "derivative"}')
    run("prior", manual, "--out", tmp_path / "model", "--steps", 1, "--latent-dim", 2, "--align", "center")
    quick = ("--model", tmp_path / "model", "--refine", 0, "--draws", 2, "--mask", manual)
    run("segment", dataset, *quick, "--suffix", "T1w", "--participant-label", "sub-01,02", "--out", out)
    assert outputs(out) == [
        f"sub-0{n}/ses-1/anat/sub-0{n}_ses-1_seg-ppl_desc-T1w_dseg.nii.gz" for n in (1, 2)
    ]  # fmt: skip
    run("segment", dataset, *quick, "--suffix", "T1w", "--participant-label", "02", "--out", out)  # not our own outputs
    first = next(out.rglob("*sub-01*_dseg.nii.gz"))
    found = np.asarray(nib.load(first).dataobj)
    assert not found[label_map(1) == 0].any()  # outside the mask it is background
    screen, _ = run("evaluate", f"{out}/sub-01/**/*_dseg.nii.gz", f"{manual}/sub-01/**/*_dseg.nii.gz")
    assert "Left-Cerebral-Cortex" in screen or "mean" in screen
