"""`prior` teaches an atlas mirror images, too, where labels come in pairs."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg import learn_prior
from ppl_seg.api.prior import LabelMaps, load_label_maps
from ppl_seg.data.cohort import find_label_maps
from ppl_seg.data.mirror import other_side
from ppl_seg.models.warped_atlas import WarpedAtlas

SHAPE, VOXEL = (24, 22, 20), 8.0
NAMES = {2: "Left-Cerebral-White-Matter", 41: "Right-Cerebral-White-Matter", 4: "Left-Lateral-Ventricle"}
NAMES |= {43: "Right-Lateral-Ventricle", 16: "Brain-Stem"}


def brain(number: int) -> np.ndarray:
    """Two halves of a ball, a ventricle in each, the left one longer, and a stem: values of NAMES."""
    x, y, z = np.indices(SHAPE) - (np.array(SHAPE) - 1).reshape(3, 1, 1, 1) / 2
    labels = np.where(x**2 + y**2 + z**2 < (8 + 0.3 * number) ** 2, np.where(x < 0, 2, 41), 0)
    hole = (np.abs(x) > 1) & (np.abs(x) < 4) & (np.abs(z) < 3)
    labels[hole & (x < 0) & (np.abs(y) < 4 + 0.5 * number)] = 4
    labels[hole & (x > 0) & (np.abs(y) < 3)] = 43
    labels[(np.abs(x) < 1) & (np.abs(y) < 2) & (z < -5) & (labels > 0)] = 16
    return labels.astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four label maps, with their table."""
    folder = tmp_path_factory.mktemp("brains")
    for number in range(4):
        image = nib.Nifti1Image(brain(number), np.diag([VOXEL, VOXEL, VOXEL, 1]))
        nib.save(image, folder / f"sub-0{number}_dseg.nii.gz")
    lines = ["index\tname", *(f"{value}\t{name}" for value, name in NAMES.items())]
    (folder / "labels.tsv").write_text("\n".join(lines) + "\n")
    return folder


def load(folder: Path, merge: bool) -> LabelMaps:
    return load_label_maps(find_label_maps([folder]), folder / "labels.tsv", None, merge, None, "none")


def test_a_mirror_image_has_the_sides_swapped(folder: Path) -> None:
    maps = load(folder, merge=False)
    assert maps.mirrored is not None
    labels, observed = maps.mirrored
    assert maps.field_of_view == "brain" and labels.dtype == maps.labels.dtype
    assert torch.equal(labels.long(), other_side(maps.table)[maps.labels.long()].flip(1))
    assert not torch.equal(labels, maps.labels)
    assert torch.equal(observed, maps.observed)


def test_labels_without_sides_have_none(folder: Path) -> None:
    assert load(folder, merge=True).mirrored is None


def test_an_atlas_keeps_both_and_has_no_side(folder: Path, tmp_path: Path) -> None:
    model = learn_prior([folder], labels=folder / "labels.tsv", align="none", steps=9, out=tmp_path / "prior")
    atlas = model.shape_prior
    assert isinstance(atlas, WarpedAtlas)
    assert len(atlas.label_maps) == 8
    template = atlas.log_location_prior.exp()
    torch.testing.assert_close(template[other_side(model.table)].flip(1), template, atol=0.02, rtol=0)
