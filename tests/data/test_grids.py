from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from ppl_seg.data.grids import (
    Grid,
    alignment_matrix,
    center_matrix,
    common_grid,
    default_align,
    none_matrix,
)
from ppl_seg.errors import InputError

from .test_images import OBLIQUE, orientations


@dataclass(frozen=True)
class Box:
    shape: tuple[int, int, int]
    affine: np.ndarray


def box(shape, linear=None, offset=(0, 0, 0)) -> Box:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3) if linear is None else linear
    affine[:3, 3] = offset
    return Box(shape, affine)


def test_grid_round_trip():
    grid = Grid((3, 4, 5), np.diag([2, 2, 2, 1.0]))
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    assert grid.spacing == (2, 2, 2) and grid != Grid((3, 4, 6), grid.affine)


def test_default_alignment():
    assert default_align([box((35, 50, 36))]) == "center"
    assert default_align([box((150, 180, 70)), box((150, 180, 90)), box((150, 180, 90))]) == "affine"
    with pytest.raises(ValueError, match="affine"):
        alignment_matrix("affine", box((5, 5, 5)), box((5, 5, 5)))


def test_center_grid_holds_the_longest_axes():
    grid = common_grid([box((10, 20, 8)), box((12, 6, 9), offset=(500, 0, 0))], align="center")
    assert grid.shape == (12, 20, 9) and grid.spacing == (1, 1, 1)
    np.testing.assert_allclose(grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3], 0)


def test_center_grid_of_other_orientations():
    for linear in orientations():
        image = box((10, 20, 8), linear * [1, 2, 1])
        extent = np.abs(image.affine[:3, :3]) @ image.shape
        assert common_grid([image], spacing=1.0).shape == tuple(extent.astype(int))


def test_none_grid_is_the_union():
    a, b = box((10, 10, 10), offset=(5, 0, 0)), box((4, 4, 4), offset=(-3, 2, 20))
    grid = common_grid([a, b], align="none")
    assert grid.shape == (18, 10, 24)
    np.testing.assert_allclose(grid.affine[:3, 3], [-3, 0, 0])
    np.testing.assert_allclose(none_matrix(a.affine, grid)[:3, 3], [-8, 0, 0])


def test_spacing():
    images = [box((10, 10, 10)), box((10, 10, 10), np.eye(3) * 2), box((10, 10, 10), np.eye(3) * 2)]
    assert common_grid(images).spacing == (2, 2, 2)
    assert common_grid(images, spacing=1.5).spacing == (1.5, 1.5, 1.5)
    grid = common_grid([box((160, 190, 150))])
    assert np.prod(grid.shape) <= 1_000_000 and 1.6 <= grid.spacing[0] <= 1.8
    with pytest.raises(InputError, match="--spacing -1"):
        common_grid(images, spacing=-1)


def test_one_slice():
    images = [box((40, 30, 1), np.diag([1, 1, 5.0])), box((36, 36, 1), np.diag([1, 1, 5.0]))]
    grid = common_grid(images)
    assert grid.shape == (40, 36, 1) and grid.spacing == (1, 1, 5)


@pytest.mark.parametrize("linear", orientations())
def test_center_is_whole_voxels_where_it_can_be(linear):
    image = box((9, 12, 7), linear, (31.3, -8, 2))
    grid = common_grid([image, box((15, 14, 16))])
    matrix = center_matrix(image.shape, image.affine, grid)
    np.testing.assert_array_equal(matrix, np.round(matrix))
    centre = matrix @ [*((np.array(grid.shape) - 1) / 2), 1]
    assert np.abs(centre[:3] - (np.array(image.shape) - 1) / 2).max() <= 0.5
    # one anatomy in another voxel order lands on the same grid voxels
    plain = box(tuple(int(n) for n in np.abs(linear) @ image.shape))
    to_plain = center_matrix(plain.shape, plain.affine, grid)
    point = np.array([4, 5, 6, 1.0])
    voxel = (matrix @ point)[:3] - (np.array(image.shape) - 1) / 2
    np.testing.assert_allclose(linear @ voxel, (to_plain @ point)[:3] - (np.array(plain.shape) - 1) / 2)


@pytest.mark.parametrize("linear", OBLIQUE)
def test_center_of_oblique_images_puts_centre_on_centre(linear):
    image = box((9, 12, 7), linear, (31.3, -8, 2))
    grid = common_grid([image])
    centre = alignment_matrix("center", image, grid) @ [*((np.array(grid.shape) - 1) / 2), 1]
    np.testing.assert_allclose(centre[:3], (np.array(image.shape) - 1) / 2)
    world = image.affine @ alignment_matrix("none", image, grid)
    np.testing.assert_allclose(world, grid.affine, atol=1e-12)
