"""A scan's channels, mask and warnings, read together."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch

from ppl_seg.data.loading import load_scan, nearest_voxels

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


def test_the_eight_voxels_in_each_of_a_grid_of_twice_their_size():
    """None twice and nothing mixed; a place beyond the scan is not observed."""
    scan = torch.rand(2, 8, 6, 4)
    observed = torch.rand(2, 8, 6, 4) > 0.3
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = 0.5  # a voxel of the grid lies between two
    parts, seen, offsets = nearest_voxels(scan, observed, matrix, (4, 3, 2))
    assert parts.shape == seen.shape == (8, 2, 4, 3, 2)
    for part, there, offset in zip(parts, seen, offsets, strict=True):
        x, y, z = (int(o > 0) for o in offset)
        expected = observed[:, x::2, y::2, z::2]
        assert torch.equal(there, expected)
        assert torch.equal(part, torch.where(expected, scan[:, x::2, y::2, z::2], 0.0))
    matrix[0, 3] = -1.5
    _, beyond, _ = nearest_voxels(scan, torch.ones_like(observed), matrix, (4, 3, 2))
    assert not bool(beyond[:, :, 0].any()) and bool(beyond[:, :, 1:].all())
