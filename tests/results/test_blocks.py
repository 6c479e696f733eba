"""Blocks cover an array once, as even as they get."""

from __future__ import annotations

import numpy as np
import pytest

from ppl_seg.results.blocks import BLOCK, blocks


@pytest.mark.parametrize("shape", [(40, 33, 27), (300, 70, 1), (3, 2, 2), (1, 1, 20000)], ids=str)
def test_blocks_cover_an_array_once(shape: tuple[int, ...]) -> None:
    covered = np.zeros(shape, int)
    for box in blocks(shape, (1.0, 1.0, 3.0)):
        assert 0 < covered[box].size <= BLOCK
        covered[box] += 1
    assert (covered == 1).all()


def test_blocks_are_cubes_in_the_world() -> None:
    first = next(blocks((256, 256, 256), (1.0, 1.0, 4.0)))
    lengths = [side.stop * step for side, step in zip(first, (1.0, 1.0, 4.0), strict=True)]
    assert max(lengths) <= 2 * min(lengths)
