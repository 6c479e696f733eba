"""A scan's channels, mask and warnings, read together."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from ppl_seg.data.loading import load_scan

from .conftest import noise


def test_warnings_of_every_channel_and_of_the_mask_are_kept(save):
    def moved(image: nib.Nifti1Image) -> None:
        image.set_sform(np.eye(4), code=1)
        image.set_qform(np.diag([1, 1, 1, 1]) + np.eye(4, k=3) * 5, code=1)

    first, other = noise((10, 10, 10)), noise((10, 10, 10))
    other[1, 1, 1] = np.nan
    mask = save("m_mask.nii.gz", np.ones((10, 10, 10), np.uint8), edit=moved)
    own = load_scan((save("a_T1w.nii.gz", first), save("a_FLAIR.nii.gz", other)), mask)
    of_channel, of_mask = sorted(own.image.warnings)
    assert "a_FLAIR.nii.gz: 1 voxels are NaN" in of_channel and "differ by 5 mm" in of_mask


def test_what_lies_inside_is_the_mask_whatever_the_voxels_hold(save):
    """NaN outside a mask is no structure; inside it may be one, of which the other channel tells."""
    first, other = noise((10, 10, 10)), noise((10, 10, 10))
    first[0], first[5, 5, 5] = np.nan, np.nan
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[3:8] = 1
    path = save("m_mask.nii.gz", mask)
    own = load_scan((save("a_T1w.nii.gz", first), save("a_FLAIR.nii.gz", other)), path)
    np.testing.assert_array_equal(own.inside.numpy(), mask == 1)
    assert own.observed[0].sum() == mask.sum() - 1 and own.observed[1].sum() == mask.sum()
