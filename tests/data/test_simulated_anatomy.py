"""Label maps drawn from label maps: what each step does, by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.simulated_anatomy import AnatomySimulator, centroids, mirror_plane, other_side

SHAPE = (32, 24, 20)
ENTRIES = [(0, "Background"), (2, "Left-Cerebral-White-Matter"), (41, "Right-Cerebral-White-Matter")]
TABLE = LabelTable(tuple(make_entry(index, name) for index, name in [*ENTRIES, (4, "Left-Lateral-Ventricle")]))
BALLS = LabelTable(tuple(make_entry(index, name) for index, name in [(0, "Background"), (1, "A"), (2, "B"), (3, "C")]))


def label_maps() -> Tensor:
    """(1, *SHAPE): two halves, and a hole on the left."""
    one = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    one[0, 4:16, 4:20, 4:16], one[0, 16:28, 4:20, 4:16] = 1, 2
    one[0, 11:15, 8:14, 6:14] = 3
    return one


def simulator(table: LabelTable) -> AnatomySimulator:
    return AnatomySimulator(label_maps().to(torch.int16), table, 1.0)


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


def test_what_no_map_shows_is_unknown() -> None:
    made = simulator(TABLE)
    made.label_maps[0, :, :, 10:] = UNKNOWN
    box = tuple(slice(0, n) for n in SHAPE)
    for seed in range(6):
        labels = made.draw(box, torch.Generator().manual_seed(seed))
        unknown = (labels == UNKNOWN).float()
        assert unknown[:, :, 18:].mean() > 0.9 and unknown[8:24, 6:18, :5].mean() < 0.2


def test_mirrored_maps_have_their_sides_swapped() -> None:
    made = simulator(TABLE)
    holes = set()
    for seed in range(12):
        box = tuple(slice(0, n) for n in SHAPE)
        labels = made.draw(box, torch.Generator().manual_seed(seed))
        left, right = ((labels == m).nonzero()[:, 0].float().mean() for m in (1, 2))
        assert left < right  # left stays left
        holes.add(bool((labels == 3).nonzero()[:, 0].float().mean() > SHAPE[0] / 2))
    assert holes == {False, True}  # what has no other side is on either


def test_fluid_spaces_grow_and_nothing_folds() -> None:
    made, volumes = simulator(TABLE), []
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in SHAPE), indexing="ij"), -1)
    for seed in range(20):
        grown = made._grown(places, label_maps()[0], torch.Generator().manual_seed(seed))
        assert grown.shape == places.shape
        steps = torch.stack([grown.diff(dim=axis)[:31, :23, :19] for axis in range(3)], -1)
        assert bool((torch.linalg.det(steps) > 0).all())
        x, y, z = grown.round().long().unbind(-1)
        inside = [i.clamp(0, n - 1) for i, n in zip((x, y, z), SHAPE, strict=True)]
        volumes.append(int((label_maps()[0][tuple(inside)] == 3).sum()) / int((label_maps()[0] == 3).sum()))
    assert max(volumes) > 1.5 and sum(volumes) / len(volumes) > 1.1
    without = simulator(BALLS)
    assert torch.equal(without._grown(places, label_maps()[0], torch.Generator()), places)
