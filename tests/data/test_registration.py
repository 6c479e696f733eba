from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ppl_seg.data.alignment import Atlas, _Pair
from ppl_seg.data.channels import CHANNEL_KINDS, align_channel, check_channel_alignment
from ppl_seg.data.fields import brain_labels, field_of_maps, field_of_scan
from ppl_seg.data.grids import Grid
from ppl_seg.data.groupwise import align_maps, code_map
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.data.registration import Volume, centroid, coarse, padded, write_transform
from ppl_seg.data.resampling import resample
from ppl_seg.errors import InputError

from .heads import BRAIN, BRIGHT, INVERTED, SPACING, head_labels, scan_of
from .test_alignment import moved


def test_a_written_transform_maps_the_same_points(tmp_path):
    world = moved(np.eye(4), (10, 20, -30), (5, -6, 7), (1.1, 0.9, 1.0))[1]
    write_transform(tmp_path / "x_xfm.tfm", world)
    transform = sitk.ReadTransform(str(tmp_path / "x_xfm.tfm"))
    for point in np.random.default_rng(0).normal(0, 50, (5, 3)):
        x, y, z = transform.TransformPoint((-point[0], -point[1], point[2]))  # LPS
        np.testing.assert_allclose((-x, -y, z), (world @ [*point, 1])[:3], atol=1e-9)


def test_coarse_and_padded_keep_places():
    data = np.zeros((20, 24, 22), np.float32)
    data[5:9, 10:16, 8:12] = 1
    affine = moved(np.diag([1.0, 2, 1, 1]), (10, 0, 30), (3, 2, 1))[0]
    volume = Volume(data, affine)
    for other in (coarse(volume, 3.0), padded(volume, 10.0, 0.0), padded(coarse(volume, 2.0), 5.0, 0.0)):
        np.testing.assert_allclose(centroid(other.data, other.affine), centroid(data, affine), atol=0.2)
    assert coarse(volume, 2.0).shape == (10, 24, 11) and padded(volume, 4.0, 0.0).shape == (28, 28, 30)


def table(names: dict[int, str]) -> LabelTable:
    return LabelTable(tuple(make_entry(value, name) for value, name in names.items()))


def test_the_field_of_label_maps():
    brains = table({2: "Left-Cerebral-White-Matter", 3: "Left-Cerebral-Cortex"})
    tissues = table({1: "CSF", 2: "GM", 3: "WM"})
    assert field_of_maps(tissues, np.array([[0, 200_000, 700_000, 600_000]]), [1.0], small=False) == "brain"
    heads = table({2: "Left-Cerebral-White-Matter", 3: "Left-Cerebral-Cortex", 502: "Skull"})
    assert field_of_maps(brains, np.array([[0, 400_000, 600_000]]), [1.0], small=False) == "brain"
    assert field_of_maps(brains, np.array([[0, 400_000, 600_000]]), [1.0], small=True) == "crop"
    assert field_of_maps(brains, np.array([[0, 4_000, 6_000]]), [1.0], small=False) == "crop"
    assert field_of_maps(heads, np.array([[0, 400_000, 600_000, 900_000]]), [1.0], small=False) == "head"
    assert field_of_maps(heads, np.array([[0, 400_000, 600_000, 9_000]]), [1.0], small=False) == "brain"
    np.testing.assert_array_equal(brain_labels(heads), [False, True, True, False])
    np.testing.assert_array_equal(brain_labels(table({1: "label-1", 2: "label-2"})), [False, True, True])


def test_the_field_of_a_scan():
    for heads, expected in ((True, "head"), (False, "brain")):
        classes, affine = head_labels(heads)
        image = scan_of(classes, affine, BRIGHT)
        assert field_of_scan(image, classes > 0) == expected
        assert field_of_scan(image, np.ones(image.shape, bool)) == "head"
    small = replace(image, data=image.data[:10, :10, :10])
    assert field_of_scan(small, np.ones(small.shape, bool)) == "crop"


def test_label_maps_are_brought_together():
    classes, affine = head_labels()
    moves = [
        ((0, 0, 0), (0, 0, 0)),
        ((12, -5, 0), (100, 20, -30)),
        ((-8, 10, 5), (0, -50, 9)),
        ((0, -6, -10), (7, 7, 7)),
    ]
    images = [scan_of(classes, moved(affine, *move)[0], BRIGHT) for move in moves]
    registered = np.isin(np.arange(8), BRAIN)
    coded = [code_map(classes, image, range(8), registered) for image in images]
    spreads = []
    for align in ("center", "affine"):
        grid, worlds = align_maps(coded, align, None, SPACING)
        assert isinstance(grid, Grid) and grid.spacing == (SPACING,) * 3
        np.testing.assert_array_equal(grid.affine[:3, :3], np.eye(3) * SPACING)
        points = np.argwhere(registered[classes]) @ affine[:3, :3].T + affine[:3, 3]
        points = np.c_[points, np.ones(len(points))]
        there = [
            points @ (np.linalg.inv(w) @ i.affine @ np.linalg.inv(affine)).T
            for w, i in zip(worlds, images, strict=True)
        ]
        spreads.append(np.linalg.norm(np.std(there, axis=0)[:, :3], axis=1).mean())
    assert spreads[1] < min(SPACING, spreads[0] / 2), spreads  # mm; turns of up to 12 degrees apart
    with pytest.raises(InputError, match="--spacing -2"):
        align_maps(coded, "center", -2.0, SPACING)


def test_structures_thinner_than_a_voxel_of_the_registration_are_refused():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[18:20, 18:20, 18:20] = 1
    images = [scan_of(labels, np.eye(4), (0.0, 1.0)) for _ in range(3)]
    coded = [code_map(labels, image, range(2), np.array([False, True])) for image in images]
    with pytest.raises(InputError, match="fill no voxel of 3 mm.*use --align center"):
        align_maps(coded, "rigid", 1.0, 1.0)


def test_a_voxel_without_a_value_in_the_first_of_two_channels():
    """It is observed, by the other channel: nothing is made of the first one's NaN."""
    classes, affine = head_labels()
    image = scan_of(classes, affine, BRIGHT)
    atlas = Atlas(
        Grid(image.shape, affine), classes.astype(np.uint8), np.isin(classes, BRAIN).astype(np.float32), "head"
    )
    seen, data = np.ones(image.shape, bool), image.data.copy()
    data[30, 30, 30] = np.nan
    pair = _Pair.of(replace(image, data=data), seen, atlas, "head")
    assert np.isfinite(pair.moving.data).all()
    seen[30, 30, 30] = False
    without = _Pair.of(image, seen, atlas, "head")
    np.testing.assert_allclose(pair.moving.data, without.moving.data, atol=1e-4)
    np.testing.assert_array_equal(pair.observed.data, without.observed.data)


def test_channels_on_other_grids():
    classes, affine = head_labels()
    first = scan_of(classes, affine, BRIGHT)
    turned, world = moved(affine, (4, -3, 5), (6, 4, -5))
    other = scan_of(classes[2:], turned @ [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], INVERTED)
    seen, seen_other = np.ones(first.shape, bool), np.ones(other.shape, bool)
    wanted = np.asarray(INVERTED)[classes]
    data, there = align_channel(first, seen, other, seen_other, "rigid")
    assert data.shape == there.shape == first.shape and not there[0].any() and there.mean() > 0.7
    by_header, _ = align_channel(first, seen, other, seen_other, "none")
    error, before = (np.abs(values - wanted)[there].mean() for values in (data, by_header))
    assert error < 0.6 * before
    far = replace(other, affine=moved(other.affine, (0, 0, 0), (400, 0, 0))[0])
    with pytest.raises(InputError, match=r"it covers 0% of it; .*of one visit"):
        align_channel(first, seen, far, seen_other, "none")
    np.random.default_rng(0).shuffle(noise := other.data.ravel().copy())
    with pytest.raises(InputError, match="cannot be brought to .*of one visit"):
        align_channel(first, seen, replace(other, data=noise.reshape(other.shape)), seen_other, "rigid")
    over = replace(other, affine=moved(other.affine, (180, 0, 0), (0, 0, 0))[0])  # upside down
    with pytest.raises(InputError, match=r"fits 1\.\d\d times as well as 10 mm away.*--channel-align none"):
        align_channel(first, seen, over, seen_other, "rigid")
    with pytest.raises(InputError, match="--channel-align affine"):
        check_channel_alignment("affine")


def test_channels_on_the_first_ones_grid():
    """They keep their voxels where they lie; a head that has moved since is brought back."""
    classes, affine = head_labels()
    first, seen = scan_of(classes, affine, BRIGHT), np.ones(classes.shape, bool)
    other = scan_of(classes, affine, INVERTED)
    same, there = align_channel(first, seen, other, seen, "rigid")
    np.testing.assert_array_equal(same, other.data)
    assert there.all()
    turned, _ = moved(affine, (4, -3, 5), (6, 4, -5))
    nod = np.linalg.inv(turned) @ affine
    nodded = replace(other, data=resample(torch.from_numpy(other.data)[None], nod, classes.shape)[0].numpy())
    errors = {}
    for kind in CHANNEL_KINDS:
        data, there = align_channel(first, seen, nodded, seen, kind)
        errors[kind] = np.abs(data - other.data)[there].mean()
    assert errors["rigid"] < 0.6 * errors["none"], errors


def test_what_belongs_to_a_brain_by_its_name():
    """What FreeSurfer knows, and lesions, of a table that draws a brain as it does; all but what lies around, else."""
    few = ["CSF", "Grey matter", "cerebellum", "lesion", "Skull", "scalp fat", "Eye-left", "extra_cerebral"]
    expected = [True, True, True, True, False, False, False, False]
    assert brain_labels(table(dict(enumerate(few, 1))))[1:].tolist() == expected
    assert brain_labels(table({1: "hippocampal_head", 2: "head"}))[1:].tolist() == [True, False]
    assert brain_labels(table({1: "skull"}))[1:].tolist() == [True]
    known = ["white-matter", "cortex", "thalamus", "caudate", "putamen", "hippocampus", "amygdala", "ventral-DC"]
    many = [f"left {'cerebral-' * (n < 2)}{name}" for n, name in enumerate(known)] + ["Lesion", "502", "Skull"]
    assert brain_labels(table(dict(enumerate(many, 1))))[1:].tolist() == [True] * 9 + [False] * 2
