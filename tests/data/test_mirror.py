"""Mirror images of label maps: labels by their names, the plane between the sides, reflections about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.mirror import centroids, mirror_plane, other_side, reflection

ENTRIES = [(0, "Background"), (2, "Left-Cerebral-White-Matter"), (41, "Right-Cerebral-White-Matter")]
TABLE = LabelTable(tuple(make_entry(index, name) for index, name in [*ENTRIES, (4, "Left-Lateral-Ventricle")]))


def test_sides_are_swapped_by_name() -> None:
    names = {0: "Background", 2: "Left-Cerebral-White-Matter", 16: "Brain-Stem", 41: "Right-Cerebral-White-Matter"}
    table = LabelTable(tuple(make_entry(index, name) for index, name in names.items()))
    assert other_side(table).tolist() == [0, 3, 2, 1]
    assert other_side(TABLE).tolist() == [0, 2, 1, 3]
    names = {0: "Background", 1: "ctx-lh-bankssts", 2: "ctx-rh-bankssts", 3: "Caudate_R", 4: "Caudate_L", 5: "Pole"}
    table = LabelTable(tuple(make_entry(index, name) for index, name in names.items()))
    assert other_side(table).tolist() == [0, 2, 1, 4, 3, 5]


def test_the_mirror_lies_between_the_sides() -> None:
    """Of a person who is turned and lies off the grid's middle; none where a map shows a single side."""
    shape, angle = (40, 40, 20), 0.2
    x, y, z = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    across, along = math.cos(angle), math.sin(angle)
    distance = (x - 22) * across + (y - 20) * along
    other = (-(x - 22) * along + (y - 20) * across).abs().maximum((z - 10).abs())
    one = torch.where((distance.abs() < 12) & (other < 8), 1 + (distance > 0).int(), 0)
    found = mirror_plane(one[None], torch.tensor([0, 2, 1]), 1.0)
    assert found is not None
    normal, offset = found
    sign = float(normal[0].sign())
    torch.testing.assert_close(sign * normal, torch.tensor([across, along, 0.0]), atol=0.01, rtol=0)
    assert sign * offset == pytest.approx(22 * across + 20 * along, abs=0.2)
    both = torch.stack([one, one])
    assert mirror_plane(torch.where(both == 2, 0, both), torch.tensor([0, 2, 1]), 1.0) is None
    assert mirror_plane(both, torch.tensor([0, 1, 2]), 1.0) is None  # nothing comes in pairs
    assert mirror_plane(torch.where(other > 4, both, 3), torch.tensor([0, 2, 1, 3]), 1.0) is not None
    lone = torch.where((distance > 6) & (both == 2), 3, both)  # on one side only
    assert mirror_plane(lone, torch.tensor([0, 2, 1, 3]), 1.0) is None


def test_a_centroid_is_a_mean_of_places() -> None:
    maps = torch.randint(-1, 3, (2, 5, 4, 3), generator=torch.Generator().manual_seed(0))
    counts, centres = centroids(maps, 3)
    for m in range(3):
        places = (maps == m).nonzero()[:, 1:].float()
        assert counts[m] == len(places)
        torch.testing.assert_close(centres[m], places.mean(0))


def test_a_reflection_turns_the_sides_about_its_plane() -> None:
    normal, offset = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64), 7.0
    matrix = reflection(normal, offset)
    np.testing.assert_allclose(matrix @ matrix, np.eye(4), atol=1e-6)
    on_it = np.array([5.0, 5.0, 3.0, 1.0])  # 0.6 · 5 + 0.8 · 5 = 7
    np.testing.assert_allclose(matrix @ on_it, on_it, atol=1e-6)
    np.testing.assert_allclose(matrix @ [5.6, 5.8, 3.0, 1.0], [4.4, 4.2, 3.0, 1.0], atol=1e-6)
