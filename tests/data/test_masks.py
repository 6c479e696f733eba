from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppl_seg.data.cohort import Found
from ppl_seg.data.images import Image, read_mask
from ppl_seg.data.masks import apply_mask, masks_of
from ppl_seg.errors import InputError

from .conftest import noise


def scan(data: np.ndarray) -> Image:
    return Image(data, np.eye(4), Path("a_T1w.nii.gz"), None)


def test_constant_border_region_is_unobserved_and_interior_zeros_are_not():
    data = noise((10, 10, 10))
    data[:3] = 0
    data[6, 5, 5] = 0
    expected = np.ones(data.shape, bool)
    expected[:3] = False
    np.testing.assert_array_equal(apply_mask(scan(data)).observed, expected)
    np.testing.assert_array_equal(apply_mask(scan(data)).inside, expected)
    assert apply_mask(scan(data), "none").observed.all()


def test_a_small_constant_region_is_anatomy():
    data = noise((10, 10, 10))
    data[:2] = 0  # exactly 20 %
    assert apply_mask(scan(data)).observed.all()


def test_any_constant_value_and_nan():
    data = noise((10, 10, 10))
    data[:, :4] = -5.5
    data[9, 9, 9] = np.nan
    observed = apply_mask(scan(data)).observed
    assert not observed[:, :4].any() and not observed[9, 9, 9] and observed.sum() == 599
    assert not apply_mask(scan(data), "none").observed[9, 9, 9]
    assert apply_mask(scan(data)).inside[9, 9, 9]  # a hole in the data, where anything may be


def test_voxels_without_a_value_around_a_brain_are_no_part_of_it():
    data = noise((10, 10, 10))
    data[:4] = np.nan
    data[7, 7, 7] = np.nan
    masked = apply_mask(scan(data))
    assert not masked.inside[:4].any() and masked.inside[4:].all()
    assert masked.observed.sum() == 599


def test_one_slice():
    data = noise((10, 10, 1))
    data[:4] = 0
    data[7, 5] = 0
    observed = apply_mask(scan(data)).observed
    assert not observed[:4].any() and observed[4:].all()


def test_a_mask_image(save):
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[2:5] = 1
    data = noise((10, 10, 10))
    data[3, 3, 3] = np.inf
    masked = apply_mask(scan(data), save("m_mask.nii.gz", mask))
    assert masked.observed.sum() == 299 and masked.inside.sum() == 300
    with pytest.raises(InputError, match="10x10x9 with affine .*10x10x10"):
        apply_mask(scan(data), save("n_mask.nii.gz", mask[:, :, :9]))
    data[2:5] = np.nan
    with pytest.raises(InputError, match="no observed voxel is left"):
        apply_mask(scan(data), save("m_mask.nii.gz", mask))


def masks_below(root: Path, scans: list[str], mask: Path | str) -> list[str]:
    found = masks_of([Found((root / scan,), root) for scan in scans], mask)
    return [str(path.relative_to(root)) if isinstance(path, Path) else path for path in found]


def test_masks_match_their_scans(tmp_path):
    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    masks = [f"m/sub-0{n}_ses-1_desc-brain_mask.nii.gz" for n in (1, 2)]
    touch(*masks, "m/sub-02_ses-1_T1w.nii.gz")
    scan = "sub-02_ses-1_run-1_T1w.nii.gz"
    assert masks_below(tmp_path, [scan], tmp_path / "m") == masks[1:]
    assert masks_below(tmp_path, [scan], f"{tmp_path}/m/*_desc-brain_mask.nii.gz") == masks[1:]
    assert masks_below(tmp_path, [scan], tmp_path / masks[0]) == masks[:1]  # one file is for one scan
    assert masks_below(tmp_path, ["a.nii", scan], "none") == ["none", "none"]
    with pytest.raises(InputError, match="one mask for 2 scans"):
        masks_below(tmp_path, [scan, "a.nii"], tmp_path / masks[0])
    with pytest.raises(InputError, match="sub-03_T1w.nii.gz: expected one mask .* found none"):
        masks_below(tmp_path, ["sub-03_T1w.nii.gz"], tmp_path / "m")
    touch("m/sub-01_ses-2_mask.nii.gz")
    with pytest.raises(InputError, match="found .*ses-1.*, .*ses-2"):
        masks_below(tmp_path, ["sub-01_T1w.nii.gz"], tmp_path / "m")
    with pytest.raises(InputError, match="no such file or folder"):
        masks_below(tmp_path, [scan], tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no masks"):
        masks_below(tmp_path, [scan], tmp_path / "empty")

    touch("plain/site/p1.nii.gz", "plain/site/p2.nii.gz", "fs/bert/mri/orig.mgz", "fs/bert/mri/brainmask.mgz")
    scans = [Found((tmp_path / "s" / "site" / "p2.nii.gz",), tmp_path / "s")]
    assert masks_of(scans, tmp_path / "plain") == [tmp_path / "plain/site/p2.nii.gz"]
    touch("plain/site/p2_mask.nii.gz", "plain/site/p1_mask.nii.gz")
    assert masks_of(scans, tmp_path / "plain") == [tmp_path / "plain/site/p2_mask.nii.gz"]
    scans = [Found((tmp_path / "fs/bert/mri/orig.mgz",), tmp_path / "fs")]
    assert masks_of(scans, tmp_path / "fs") == [tmp_path / "fs/bert/mri/brainmask.mgz"]


def test_masks_of_something_else_are_not_the_scans(tmp_path):
    """fMRIPrep's folder of one subject, and a lesion's mask."""
    (tmp_path / "m").mkdir()
    names = ["desc-brain", "space-MNI152NLin2009cAsym_desc-brain", "task-rest_desc-brain", "label-lesion"]
    for name in names:
        (tmp_path / f"m/sub-01_{name}_mask.nii.gz").touch()
    assert masks_below(tmp_path, ["sub-01_T1w.nii.gz"], tmp_path / "m") == ["m/sub-01_desc-brain_mask.nii.gz"]
    (tmp_path / "m/sub-01_label-brain_mask.nii.gz").touch()
    with pytest.raises(InputError, match="expected one mask .*give a folder or a quoted glob of one mask a scan"):
        masks_below(tmp_path, ["sub-01_T1w.nii.gz"], tmp_path / "m")


@pytest.mark.parametrize(
    ("kind", "warned"), [("binary", False), ("splines", False), ("probabilities", False), ("255", True), ("cut", True)]
)
def test_what_masks_come_as(save, kind, warned):
    """Inside are 5 of 10 slices, and of what was interpolated or scaled the 6th by a third."""
    values = np.zeros((10, 10, 10), np.float32)
    values[:5], values[5] = 1, 0.3
    if kind == "binary":
        values[5] = 0
    elif kind == "splines":
        values[0], values[7] = 1.29, -0.13
    elif kind == "255":
        values[5] = np.linspace(0.1, 0.4, 100).reshape(10, 10)
        values = np.round(values * 255)
    elif kind == "cut":
        values = np.where(values > 0, noise(values.shape) + 1000, 0)
    mask = read_mask(save("x_mask.nii.gz", values))
    assert mask.data.sum() == (600 if warned else 500)
    assert [("all above 0 are taken for inside" in warning) for warning in mask.warnings] == [True] * warned


def test_a_mask_without_finite_values(save):
    assert read_mask(save("x_mask.nii.gz", np.full((3, 3, 3), np.inf, np.float32))).data.all()
