"""Scans drawn from label maps: what each step does, by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.simulated_scans import (
    BETWEEN,
    ScanSimulator,
    Simulation,
    blur,
    cut_off,
    in_slices,
    smooth_field,
)

NAMES = {
    0: "Background", 2: "Left-Cerebral-White-Matter", 3: "Left-Cerebral-Cortex", 4: "Left-Lateral-Ventricle",
    41: "Right-Cerebral-White-Matter", 42: "Right-Cerebral-Cortex", 43: "Right-Lateral-Ventricle", 16: "Brain-Stem",
    510: "Skull",
}  # fmt: skip
TABLE = LabelTable(tuple(make_entry(index, name) for index, name in NAMES.items()))
PLAIN = Simulation(
    ordered=1.0, spread=0.0, label_sd=0.0, most_variation=0.0, most_grain=0.0, most_blur=0.0, sliced=0.0, most_bias=0.0,
    most_noise=0.0, masked=0.0, cleared=0.0, cut=0.0, contrast=0.0, brightness=0.0, gamma=0.0,
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes() -> Tensor:
    """(24, 20, 16): boxes of every label in background, their sides even."""
    labels = torch.zeros(24, 20, 16, dtype=torch.long)
    labels[2:22, 2:18, 2:14] = 1
    labels[4:12, 4:16, 4:12], labels[12:20, 4:16, 4:12] = 2, 5
    labels[8:12, 8:12, 6:10], labels[12:16, 8:12, 6:10] = 3, 6
    labels[4:20, 2:4, 4:12] = 7
    labels[2:22, 16:18, 2:14] = 8
    return labels


def test_a_scan_without_accidents_shows_the_classes() -> None:
    simulator = ScanSimulator(TABLE, "head", replace(PLAIN, most_blur=0.3))
    labels = boxes()
    scan, observed, shown = simulator.draw(labels, seeded())
    assert scan.shape == observed.shape == (1, 1, 12, 10, 8) and observed.all() and torch.equal(shown, labels)
    halves, own = labels[::2, ::2, ::2], scan[0, 0]
    means = {m: float(own[ndimage.binary_erosion(halves == m) if m == 1 else halves == m].mean()) for m in range(9)}
    assert means[2] == pytest.approx(means[5], abs=0.02) and means[3] == pytest.approx(means[6], abs=0.02)
    classes, values = simulator.brightness(seeded(3))
    kinds = dict(zip(TABLE.class_names, classes.tolist(), strict=True))
    grey, white = kinds["grey-matter"], kinds["white-matter"]
    assert kinds["brain-stem"] == pytest.approx(grey + (white - grey) * BETWEEN["brain-stem"])
    assert torch.equal(values, classes[torch.tensor(TABLE.class_of_label)])


def test_both_sides_are_alike_and_contrasts_differ() -> None:
    simulator = ScanSimulator(TABLE, "head")
    drawn = torch.stack([simulator.brightness(seeded(seed))[1] for seed in range(200)])
    torch.testing.assert_close(drawn[:, 1:4], drawn[:, 4:7])
    brighter = (drawn[:, 1] > drawn[:, 2]).float().mean()
    assert 0.3 < brighter < 0.7  # 200 fair coins leave this less often than once in 10^7


def test_a_brain_alone_has_no_skull_and_a_mask() -> None:
    scan, observed, shown = ScanSimulator(TABLE, "brain").draw(boxes(), seeded(1))
    assert 8 not in shown and 1 in shown
    brain = shown[::2, ::2, ::2] > 0
    assert observed[0, 0][ndimage.binary_erosion(brain.numpy())].all() and not observed[0, 0, 0].any()
    assert not scan[~observed].any() and scan.abs().max() <= 1.5


def test_the_same_seed_draws_the_same_scan() -> None:
    simulator = ScanSimulator(TABLE, "head")
    for seed in range(6):
        one, again = (simulator.draw(boxes(), seeded(seed))[0] for _ in range(2))
        assert torch.equal(one, again) and torch.isfinite(one).all()


@pytest.mark.parametrize(("sd", "radius"), [(0.9, 2), (1.4, 3), (2.0, 4)])
def test_blur_is_scipys(sd: float, radius: int) -> None:
    volume = torch.rand(9, 8, 7, generator=seeded(), dtype=torch.float64)
    expected = ndimage.gaussian_filter(volume.numpy(), sd, mode="nearest", radius=radius)
    np.testing.assert_allclose(blur(volume, sd).numpy(), expected, rtol=1e-12)


def test_slices_keep_the_mean_and_what_is_constant() -> None:
    volume = torch.rand(12, 12, 12, generator=seeded(), dtype=torch.float64)
    for seed in range(8):
        assert in_slices(torch.ones(12, 11, 10), seeded(seed), 5).sub(1).abs().max() < 1e-6
        assert in_slices(torch.ones(12, 11, 4), seeded(seed), 5).shape == (12, 11, 4)
        thick = in_slices(volume, seeded(seed), 4)
        assert thick.shape == volume.shape and thick.std() < volume.std()
        assert thick.mean() == pytest.approx(float(volume.mean()), abs=0.02)


def test_a_smooth_field_is_smooth_and_standardised() -> None:
    field = smooth_field((30, 20, 10), 10, seeded())
    assert field.mean().abs() < 1e-5 and field.std() == pytest.approx(1, abs=1e-4)
    assert field.diff(dim=0).abs().max() < 1


def test_a_scan_ends_where_nothing_is_known() -> None:
    labels = boxes()
    labels[:, :, 8:] = UNKNOWN
    for field in ("brain", "head", "crop"):
        scan, observed, _ = ScanSimulator(TABLE, field).draw(labels, seeded(3))
        assert not observed[..., 4:].any() and observed[..., :4].any() and not scan[~observed].any()


def test_a_crop_is_normalised_by_all_that_it_shows() -> None:
    table = LabelTable(tuple(make_entry(index, name) for index, name in [(0, "Background"), (1, "A"), (2, "B")]))
    labels = torch.zeros(32, 32, 32, dtype=torch.long)
    labels[8:16, 8:24, 8:24], labels[16:24, 8:24, 8:24] = 1, 2
    for seed in range(8):
        scan, observed, _ = ScanSimulator(table, "crop", replace(PLAIN, most_blur=0.3)).draw(labels, seeded(seed))
        assert observed.all()
        assert scan.min() > -0.1 and scan.max() < 1.1 and scan.max() - scan.min() > 0.9


def test_heads_come_whole_without_their_air_or_as_brains() -> None:
    simulator = ScanSimulator(TABLE, "head", replace(PLAIN, masked=0.4, cleared=0.5))
    shares = [float(simulator.draw(boxes(), seeded(seed))[1].float().mean()) for seed in range(30)]
    assert len({round(share, 1) for share in shares}) > 2 and max(shares) == 1.0


def test_what_is_cut_off_lies_beyond_a_plane() -> None:
    for seed in range(12):
        kept = cut_off((8, 7, 6), seeded(seed)).float()
        assert kept.mean() >= 0.5 and sum(bool((kept.diff(dim=axis) != 0).any()) for axis in range(3)) <= 1
