"""Label maps drawn from label maps: what each step does, by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.simulated_anatomy import AnatomySimulator

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
