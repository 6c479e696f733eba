from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppl_seg.data.images import Image
from ppl_seg.data.masks import mask_of, observed_mask
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
    np.testing.assert_array_equal(observed_mask(scan(data)), expected)
    assert observed_mask(scan(data), "none").all()


def test_a_small_constant_region_is_anatomy():
    data = noise((10, 10, 10))
    data[:2] = 0  # exactly 20 %
    assert observed_mask(scan(data)).all()


def test_any_constant_value_and_nan():
    data = noise((10, 10, 10))
    data[:, :4] = -5.5
    data[9, 9, 9] = np.nan
    observed = observed_mask(scan(data))
    assert not observed[:, :4].any() and not observed[9, 9, 9] and observed.sum() == 599
    assert not observed_mask(scan(data), "none")[9, 9, 9]


def test_one_slice():
    data = noise((10, 10, 1))
    data[:4] = 0
    data[7, 5] = 0
    observed = observed_mask(scan(data))
    assert not observed[:4].any() and observed[4:].all()


def test_a_mask_image(save):
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[2:5] = 1
    data = noise((10, 10, 10))
    data[3, 3, 3] = np.inf
    observed = observed_mask(scan(data), save("m_mask.nii.gz", mask))
    assert observed.sum() == 299
    with pytest.raises(InputError, match="10x10x9 with affine .*10x10x10"):
        observed_mask(scan(data), save("n_mask.nii.gz", mask[:, :, :9]))
    data[2:5] = np.nan
    with pytest.raises(InputError, match="no observed voxel is left"):
        observed_mask(scan(data), save("m_mask.nii.gz", mask))


def test_masks_match_by_entities():
    masks = [Path(f"m/sub-0{n}_ses-1_desc-brain_mask.nii.gz") for n in (1, 2)]
    assert mask_of(Path("s/sub-02_ses-1_run-1_T1w.nii.gz"), masks) == masks[1]
    with pytest.raises(InputError, match="found none"):
        mask_of(Path("sub-03_T1w.nii.gz"), masks)
    with pytest.raises(InputError, match="found m/.*, m/"):
        mask_of(Path("sub-01_T1w.nii.gz"), [masks[0], Path("m/sub-01_ses-2_mask.nii.gz")])
