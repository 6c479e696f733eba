"""Weighted rows are what `resample` and `enlarge` compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl_seg.data.resampling import blur_kernels, inside, resample
from ppl_seg.models.decoders import enlarge
from ppl_seg.models.interpolation import between, compact, linear_rows, ravel, unravel, weighted_rows
from ppl_seg.results.blocks import positions

MATRICES = {
    "affine": np.array([[0.45, 0.06, -0.02, 0.3], [-0.05, 0.5, 0.04, 0.1], [0.01, -0.03, 0.55, -0.2], [0, 0, 0, 1]]),
    "thick slices": np.array([[0.5, 0, 0.1, 0.2], [0, 0.5, 0.2, 0.1], [0, 0, 2.6, 0.3], [0, 0, 0, 1]]),
    "small grid voxels": np.diag([2.0, 2.0, 2.0, 1.0]),
    "flip and shift": np.array([[0, -1.0, 0, 7], [1, 0, 0, 1], [0, 0, 1, -2], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_rows_are_what_resample_computes(matrix: np.ndarray) -> None:
    grid, own = (9, 8, 7), (11, 12, 3)
    volume = torch.rand(2, *grid, dtype=torch.float64)
    voxels = torch.arange(np.prod(own))
    index, weight = linear_rows(positions(voxels, own, matrix), grid, blur_kernels(matrix))
    expected = resample(volume, matrix, own).flatten(1)
    found = weighted_rows(volume.flatten(1).unsqueeze(-1), index, weight)[..., 0]
    there = inside(matrix, grid, own).flatten()
    assert bool(there.any())
    torch.testing.assert_close(found[:, there], expected[:, there], rtol=1e-12, atol=1e-12)
    rows, within = compact(index)
    assert len(rows) <= 9 * 8 * 7 and torch.equal(rows, index.unique().long())
    again = weighted_rows(volume.flatten(1)[:, rows].unsqueeze(-1), within, weight)[..., 0]
    assert torch.equal(found, again)


@pytest.mark.parametrize("old, new", [((5, 4, 3), (9, 8, 6)), ((1, 1, 1), (4, 3, 2)), ((4, 3, 1), (8, 5, 1))], ids=str)
def test_rows_are_what_enlarge_computes(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    coarse = torch.rand(2, *old, dtype=torch.float64)
    voxels = torch.arange(np.prod(new))
    scale = np.diag([*(o / n for o, n in zip(old, new, strict=True)), 1.0])
    scale[:3, 3] = np.diag(scale)[:3] / 2 - 0.5
    index, weight = linear_rows(positions(voxels, new, scale), old)
    found = weighted_rows(coarse.flatten(1).unsqueeze(-1), index, weight)[..., 0]
    torch.testing.assert_close(found, enlarge(coarse, new).flatten(1), rtol=1e-12, atol=1e-12)


def test_ravel() -> None:
    places = torch.tensor([[0, 0, 0], [1, 2, 1], [3, 0, 1]])
    assert ravel(places, (4, 3, 2)).tolist() == [0, 11, 19]
    assert torch.equal(unravel(ravel(places, (4, 3, 2)), (4, 3, 2)), places)


@pytest.mark.parametrize("grid", [(5, 4, 3), (5, 1, 2), (6, 7)], ids=str)
def test_between_voxels_is_linear_up_to_the_edge(grid: tuple[int, ...]) -> None:
    values, offset = torch.rand(2, *grid, dtype=torch.float64), (-0.25, 0.4, 0.0)[: len(grid)]
    places = unravel(torch.arange(math.prod(grid)), grid) + torch.tensor(offset, dtype=torch.float64)
    expected = weighted_rows(values.flatten(1).unsqueeze(-1), *linear_rows(places, grid))[..., 0]
    torch.testing.assert_close(between(values, offset).flatten(1), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(between(values, (0.0,) * len(grid)), values)
    some = slice(1, None, 2)
    assert torch.equal(between(values, offset, some), between(values, offset)[..., some])
