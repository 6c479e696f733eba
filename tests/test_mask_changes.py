"""Scans with a mask that is smaller or larger than the given one."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ppl_seg.data.images import Image, read_scan

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from mask_changes import WIDTH, change_mask, write_changed  # noqa: E402

GROUPS = {"Lateral-Ventricle": (4, 43), "Cerebral-Cortex": (3,)}
SPACING = (1.0, 1.5, 2.0)


@pytest.fixture
def brain(tmp_path: Path) -> tuple[Image, np.ndarray]:
    """A ball of cortex (100 ± 5) around one of fluid (20 ± 2); its label map."""
    place = (np.indices((40, 30, 24)) - np.array([20, 15, 12])[:, None, None, None]) * np.reshape(SPACING, (3, 1, 1, 1))
    radius = np.sqrt((place**2).sum(0))
    truth = np.where(radius < 6, 43, np.where(radius < 14, 3, 0))
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(truth.shape)
    scan = np.where(truth == 3, 100 + 5 * noise, np.where(truth == 43, 20 + 2 * noise, 0)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.diag([*SPACING, 1.0])), tmp_path / "sub-1_T1w.nii.gz")
    return read_scan(tmp_path / "sub-1_T1w.nii.gz"), truth


def test_a_smaller_mask_leaves_what_is_deep_enough(brain: tuple[Image, np.ndarray]) -> None:
    scan, truth = brain
    changed = change_mask(scan, truth, GROUPS, "eroded")
    outside = np.argwhere(truth == 0) * SPACING
    for voxel in np.argwhere(truth > 0)[::37]:
        nearest = np.sqrt(((outside - voxel * SPACING) ** 2).sum(1).min())
        assert changed[tuple(voxel)] == (scan.data[tuple(voxel)] if nearest > WIDTH else 0)
    assert not changed[truth == 0].any()


def test_a_larger_mask_adds_a_shell_of_fluid_and_dura(brain: tuple[Image, np.ndarray]) -> None:
    scan, truth = brain
    changed = change_mask(scan, truth, GROUPS, "dilated")
    assert np.array_equal(changed[truth > 0], scan.data[truth > 0])
    far = ndimage.distance_transform_edt(truth == 0, sampling=SPACING)
    shell = (far > 0) & (far <= WIDTH)
    assert (changed[shell] > 0).all() and not changed[far > WIDTH].any()
    dura = changed[shell] > 60
    assert 0.1 < dura.mean() < 0.9
    # 5 standard errors of some hundred voxels
    assert changed[shell][dura].mean() == pytest.approx(100, abs=2) and changed[shell][~dura].mean() == pytest.approx(
        20, abs=1
    )
    assert np.array_equal(changed, change_mask(scan, truth, GROUPS, "dilated"))  # by the file's name


def test_files_keep_their_name_and_place(brain: tuple[Image, np.ndarray], tmp_path: Path) -> None:
    scan, truth = brain
    nib.save(nib.Nifti1Image(truth.astype(np.uint8), scan.affine), tmp_path / "sub-1_dseg.nii.gz")
    (tmp_path / "new").mkdir()
    write_changed(scan.path, tmp_path / "sub-1_dseg.nii.gz", GROUPS, "eroded", tmp_path / "new")
    written = nib.load(tmp_path / "new" / scan.path.name)
    assert np.array_equal(written.affine, scan.affine)
    assert np.array_equal(np.asarray(written.dataobj), change_mask(scan, truth, GROUPS, "eroded"))
