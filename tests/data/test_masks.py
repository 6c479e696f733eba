from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppl_seg.data.cohort import Found
from ppl_seg.data.images import Image
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
