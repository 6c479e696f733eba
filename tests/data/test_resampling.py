from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from ppl_seg.data.resampling import inside, resample, resample_labels

from .test_images import orientations, rotation


def volume(shape=(6, 7, 8), channels=2, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(channels, *shape, generator=generator, dtype=torch.float64).to(dtype)


def matrix_of(linear, offset) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, offset
    return matrix


@pytest.mark.parametrize("linear", orientations())
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_whole_voxel_moves_are_exact(linear, mode):
    source = volume()
    rng = np.random.default_rng(1)
    # the middle of the output meets the middle of the input, give or take
    offset = np.array(source.shape[1:]) // 2 - linear @ np.array([4, 4, 5]) + rng.integers(-3, 4, 3)
    matrix = matrix_of(linear, offset + 1e-6)
    got = resample(source, matrix, (9, 8, 10), mode)
    expected = torch.zeros((2, 9, 8, 10))
    for index in np.ndindex(9, 8, 10):
        place = np.round(linear @ index + offset).astype(int)
        if ((place >= 0) & (place < source.shape[1:])).all():
            expected[(slice(None), *index)] = source[(slice(None), *place)]
    assert torch.equal(got, expected)
    assert torch.equal(inside(matrix, source.shape[1:], (9, 8, 10)), expected[0] != 0)


def test_no_overlap_is_all_outside():
    assert (resample(volume(), matrix_of(np.eye(3), (100, 0, 0)), (3, 3, 3)) == 0).all()
    assert (resample(volume(), matrix_of(np.eye(3), (-100.5, 0, 0)), (3, 3, 3)) == 0).all()
    assert not inside(matrix_of(np.eye(3), (-100, 0, 0)), (6, 7, 8), (3, 3, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_affine_against_scipy(dtype):
    source = volume((12, 11, 13), 1, dtype)
    matrix = matrix_of(rotation((12, -20, 31)) @ np.diag([0.8, 0.9, 0.7]), (2.3, 5.1, 0.4))
    got = resample(source, matrix, (10, 12, 9))
    expected = ndimage.affine_transform(
        source[0].double().numpy(), matrix[:3, :3], matrix[:3, 3], (10, 12, 9), order=1, mode="nearest"
    )
    within = inside(matrix, source.shape[1:], (10, 12, 9)).numpy()
    assert 0.2 < within.mean() < 0.98
    np.testing.assert_allclose(got[0].numpy()[within], expected[within], atol=1e-5 if dtype == torch.float32 else 1e-10)
    assert (got[0].numpy()[~within] == 0).all()
    nearest = ndimage.affine_transform(
        source[0].double().numpy(), matrix[:3, :3], matrix[:3, 3], (10, 12, 9), order=0, mode="nearest"
    )
    np.testing.assert_allclose(resample(source, matrix, (10, 12, 9), "nearest")[0].numpy()[within], nearest[within])


def test_a_linear_ramp_is_kept_inside_and_edges_are_not_darkened():
    ramp = torch.arange(10.0).reshape(1, 10, 1, 1).expand(1, 10, 4, 4).contiguous() + 100
    got = resample(ramp, matrix_of(np.eye(3), (0.25, 0, 0)), (10, 4, 4))
    torch.testing.assert_close(got[0, :9, 0, 0], torch.arange(9.0) + 100.25)
    assert got[0, 9, 0, 0] == 109  # a quarter voxel beyond the last centre: its value, not mixed with outside


def test_downsampling_is_anti_aliased():
    stripes = torch.tensor([0.0, 1.0]).repeat(16).reshape(1, 32, 1, 1).expand(1, 32, 8, 8).contiguous()
    got = resample(stripes, matrix_of(np.diag([4, 1, 1.0]), (1.5, 0, 0)), (8, 8, 8))
    assert (got[0, 1:-1] - 0.5).abs().max() < 0.02
    flat = torch.full((1, 32, 8, 8), 3.0)
    torch.testing.assert_close(
        resample(flat, matrix_of(np.diag([4, 2, 2.0]), (0, 0, 0)), (8, 4, 4)), torch.full((1, 8, 4, 4), 3.0)
    )


def test_one_slice():
    source = volume((6, 7, 1))
    matrix = matrix_of(np.eye(3), (0.5, 0, 0))
    got = resample(source, matrix, (6, 7, 1))
    torch.testing.assert_close(got[:, :5], (source[:, :5] + source[:, 1:]) / 2)
    matrix[2, 3] = 0.7  # half a voxel and more beside the slice
    assert (resample(source, matrix, (6, 7, 1)) == 0).all()


def test_types():
    labels = torch.randint(0, 300, (1, 6, 7, 8), dtype=torch.int64)
    got = resample(labels, matrix_of(np.eye(3), (0.3, 0, 0)), (6, 7, 8), "nearest")
    assert got.dtype == torch.int64 and torch.equal(got, labels)
    with pytest.raises(ValueError, match="use nearest"):
        resample(labels, matrix_of(np.eye(3), (0.3, 0, 0)), (6, 7, 8))
    with pytest.raises(ValueError, match="expected linear or nearest"):
        resample(labels, np.eye(4), (6, 7, 8), "cubic")
    with pytest.raises(ValueError, match="expected a volume"):
        resample(labels[0], np.eye(4), (6, 7, 8))


def test_labels_take_the_majority():
    labels = torch.zeros(8, 8, 8, dtype=torch.int64)
    labels[2:6, 2:6, 2:6] = 3
    labels[2, 2, 2] = 0  # one voxel of eight
    small = resample_labels(labels, matrix_of(np.eye(3) * 2, (0.5, 0.5, 0.5)), (4, 4, 4))
    expected = torch.zeros(4, 4, 4, dtype=torch.int64)
    expected[1:3, 1:3, 1:3] = 3
    assert torch.equal(small, expected)
    assert torch.equal(resample_labels(labels, np.eye(4), (8, 8, 8)), labels)
    outside = resample_labels(labels, matrix_of(np.eye(3) * 2, (40, 0, 0)), (4, 4, 4))
    assert (outside == 0).all()
