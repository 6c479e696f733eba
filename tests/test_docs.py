"""The pages for each kind of user do what they say: their commands are run in order, on tiny brains made here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg import load_model
from ppl_seg.errors import InputError
from ppl_seg.guides.families import build_family
from tests.documents import ROOT, blocks, commands, run_command

Run = Callable[..., tuple[int, str, str]]
SHAPE, SPACING = (28, 32, 27), 5.0  # a field of view of 14 to 16 cm, 0.8 litres of brain
# FreeSurfer value -> centre and radii in units of the brain's radii
STRUCTURES = {
    3: ((-0.5, 0, 0), (0.5, 1, 1)),
    42: ((0.5, 0, 0), (0.5, 1, 1)),
    2: ((-0.4, 0, 0), (0.32, 0.7, 0.7)),
    41: ((0.4, 0, 0), (0.32, 0.7, 0.7)),
    4: ((-0.25, 0, 0.15), (0.16, 0.35, 0.25)),
    43: ((0.25, 0, 0.15), (0.16, 0.35, 0.25)),
    10: ((-0.25, -0.1, -0.2), (0.18, 0.22, 0.2)),
    49: ((0.25, -0.1, -0.2), (0.18, 0.22, 0.2)),
    16: ((0, -0.2, -0.7), (0.2, 0.25, 0.3)),
}
INTENSITY = {0: 0.0, 3: 90, 42: 90, 2: 60, 41: 60, 4: 20, 43: 20, 10: 75, 49: 75, 16: 65}


def brain(random: np.random.Generator) -> np.ndarray:
    """Label map of a person: two hemispheres and what is in them."""
    axes = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - (np.array(SHAPE) - 1) / 2
    axes = (axes - random.normal(0, 0.4, 3)) / (random.uniform(0.93, 1.07, 3) * (11, 13, 10.5))
    labels = np.zeros(SHAPE, np.uint8)
    inside = (axes**2).sum(-1) < 1
    for value, (centre, radii) in STRUCTURES.items():
        place = (((axes - centre) / np.array(radii)) ** 2).sum(-1) < 1
        if value in (3, 42):
            place = (axes[..., 0] < 0) == (value == 3)
        labels[inside & place] = value
    return labels


def contrast(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    scan = np.vectorize(INTENSITY.__getitem__)(labels) + random.normal(0, 4, SHAPE)
    return np.where(labels > 0, np.maximum(scan, 1), 0).astype(np.float32)


def save(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-SPACING, SPACING, SPACING, 1.0])
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(kind(data, affine), path)


def make_files(folder: Path) -> None:
    """subjects/ of FreeSurfer, a dataset bids/ with masks/ and manual/, and labels/, scans/, truth/ of crops."""
    random = np.random.default_rng(0)
    for person in range(1, 6):
        labels = brain(random)
        mri = folder / "subjects" / f"person{person}" / "mri"
        save(mri / "aseg.mgz", labels)
        for name in ("orig", "norm"):
            save(mri / f"{name}.mgz", contrast(labels, random))
    (folder / "bids").mkdir()
    (folder / "bids" / "dataset_description.json").write_text('{"Name": "made", "BIDSVersion": "1.9.0"}')
    for person in ("01", "02", "03"):
        labels, stem = brain(random), f"sub-{person}/anat/sub-{person}"
        for suffix in ("T1w", "FLAIR"):
            save(folder / "bids" / f"{stem}_{suffix}.nii.gz", contrast(labels, random))
        save(folder / "masks" / f"{stem}_mask.nii.gz", (labels > 0).astype(np.uint8))
        save(folder / "manual" / f"sub-{person}_dseg.nii.gz", labels)
    for person in range(1, 8):
        axes = np.stack(np.meshgrid(*map(np.arange, (14, 16, 12)), indexing="ij"), -1) - (6.5, 7.5, 5.5)
        distance = ((axes / random.uniform(0.9, 1.1, 3) / (4, 5, 3.5)) ** 2).sum(-1)
        labels = np.where(distance < 1, np.where(axes[..., 1] > 0, 2, 1), 0).astype(np.uint8)
        image = nib.Nifti1Image(labels, np.eye(4))
        kind = "labels" if person > 3 else "truth"
        (folder / kind).mkdir(exist_ok=True)
        nib.save(image, folder / kind / f"sub-{person:02}_dseg.nii.gz")
        if kind == "truth":
            (folder / "scans").mkdir(exist_ok=True)
            scan = np.array([60.0, 100, 100])[labels] + random.normal(0, 8, labels.shape)
            nib.save(
                nib.Nifti1Image(scan.astype(np.float32), np.eye(4)), folder / "scans" / f"sub-{person:02}_T1w.nii.gz"
            )


def follow(page: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Run the commands of a page in `folder`; its label table is there as labels.tsv."""
    patch.chdir(folder)
    found = blocks(ROOT / "docs" / page)
    for table in (block.text for block in found if block.language == "tsv"):
        (folder / "labels.tsv").write_text(table, encoding="utf-8")
    for line in (line for block in found if block.language == "bash" for line in commands(block)):
        run_command(line.replace("--spacing 2 ", "--spacing 6 "), patch)


def volumes(out: Path) -> list[dict[str, str]]:
    with open(out / "volumes.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def share_right(results: Path, truth: Path) -> float:
    """Of the brain's voxels those that have their own label, over the persons."""
    shares = []
    for path in sorted(truth.glob("*_dseg.nii.gz")):
        (found,) = results.rglob(f"{path.name.split('_')[0]}_*_dseg.nii.gz")
        labels, wanted = (np.asarray(nib.load(one).dataobj) for one in (found, path))
        shares.append((labels == wanted)[wanted > 0].mean())
    return float(np.mean(shares))


def test_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path)
    follow("crops.md", tmp_path, monkeypatch)
    assert {row["structure"] for row in volumes(tmp_path / "results")} == {
        "anterior-hippocampus",
        "posterior-hippocampus",
    }
    assert (tmp_path / "scores.tsv").read_text(encoding="utf-8").count("\n") == 1 + 3 * 2


def test_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: Callable[[], None]) -> None:
    make_files(tmp_path)
    (code,) = (block.text for block in blocks(ROOT / "docs" / "own_parts.md") if block.language == "python")
    (tmp_path / "my_parts.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    follow("own_parts.md", tmp_path, monkeypatch)
    assert len(volumes(tmp_path / "results")) == 3 * 2
    registries()
    with pytest.raises(InputError, match="--trust my_parts:Blobs"):
        load_model(tmp_path / "prior")
    model = load_model(tmp_path / "prior", trusted=["my_parts:Blobs", "my_parts:Full"])
    assert (type(model.label_guide.family).__name__, model.shape_prior.latent_dim) == ("Full", 8)
    family, loc = build_family("my_parts:Full", 8), torch.arange(8.0)
    posterior = family(family.raw_at(loc, 0.5))
    torch.testing.assert_close((posterior.mean, posterior.stddev), (loc, torch.full((8,), 0.5)))


def test_freesurfer_then_bids(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path)
    follow("freesurfer.md", tmp_path, monkeypatch)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["shape_prior"]["decoder"], config["align"], config["field"]) == ("warp", "affine", "brain")
    assert config["recipe"]["mask_background"] < 1  # and the mask is an observation
    for results in ("results", "results_fitted"):
        assert share_right(tmp_path / results, tmp_path / "manual") > 0.7
    assert {row["structure"] for row in volumes(tmp_path / "results")} >= {"Left-Thalamus", "Brain-Stem"}
    assert len(list((tmp_path / "results").rglob("*_align.png"))) == 3
    assert len({row["scan"] for row in volumes(tmp_path / "results_norm")}) == 5
    follow("bids.md", tmp_path, monkeypatch)
    assert len(list((tmp_path / "derivatives").rglob("*_desc-T1w_dseg.nii.gz"))) == 3
    assert len(list((tmp_path / "results_two").rglob("*_desc-T1wFLAIR_dseg.nii.gz"))) == 1

    noise = np.where(brain(np.random.default_rng(1)) > 0, np.random.default_rng(2).normal(50, 9, SHAPE), 0)
    save(tmp_path / "noise" / "sub-09_T1w.nii.gz", noise.astype(np.float32))
    code, screen, err = run("segment", "noise", "--model", "prior", "--out", "results_noise")
    assert code == 1 and "failed" in screen and "wrong anatomy or no overlap with the prior" in err
    assert not list((tmp_path / "results_noise").rglob("*.nii.gz"))
