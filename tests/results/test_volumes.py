from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ppl_seg.data.alignment import Alignment
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.results.volumes import (
    border_flags,
    head_size,
    label_quality,
    mean_quality,
    volume_rows,
    wide_rows,
)

TABLE = LabelTable(tuple(make_entry(value, f"label-{value}") for value in (3, 8)))


def test_volumes_are_voxel_counts_times_the_determinant(make_segmentation):
    first, second = volume_rows(make_segmentation())
    assert first["structure"] == "Left-Hippocampus" and first["scan"] == "sub-01_T1w.nii.gz"
    assert first["volume_mm3"] == pytest.approx(24 * 3.0) and second["volume_mm3"] == pytest.approx(3.0)
    assert (first["q05"], first["q50"], first["q95"]) == pytest.approx((5.0, 50.0, 95.0))
    assert first["draws"] == 5
    assert (first["touches_border"], second["touches_border"]) == (False, True)
    assert (first["quality"], second["quality"]) == (0.8, None)


def test_a_sheared_affine_keeps_its_determinant(make_segmentation):
    seg = make_segmentation()
    affine = seg.image.affine.copy()
    affine[0, 1] = 5.0  # shear: spacing changes, volume does not
    rows = volume_rows(replace(seg, image=replace(seg.image, affine=affine)))
    assert rows[0]["volume_mm3"] == pytest.approx(72.0)


def test_no_draws_give_no_quantiles(make_segmentation):
    seg = make_segmentation(draws=0)
    assert np.isnan(volume_rows(seg)[0]["q50"])


def test_the_property_gives_the_rows(make_segmentation):
    seg = make_segmentation()
    assert seg.volumes == volume_rows(seg)


def test_wide_rows_have_the_size_of_the_head(make_segmentation):
    rows = [*volume_rows(make_segmentation(), "a"), *volume_rows(make_segmentation(), "b")]
    wide = wide_rows(rows, {"b": {"brain_volume_mm3": 9.0, "prior_scale": 1.1}})
    assert list(wide[0]) == ["scan", "brain_volume_mm3", "prior_scale", "Left-Hippocampus", "Right-Hippocampus"]
    assert wide[0]["brain_volume_mm3"] is None and (wide[1]["brain_volume_mm3"], wide[1]["prior_scale"]) == (9.0, 1.1)


@pytest.mark.parametrize(
    ("names", "field", "expected"),
    [
        (("Left-Cerebral-White-Matter", "Right-Cerebral-Cortex"), "brain", 75.0),
        (("Left-Cerebral-White-Matter", "Skull"), "head", 72.0),
        (("Left-Cerebral-White-Matter", "CSF"), "brain", 72.0),
        (("anterior", "posterior"), "brain", 75.0),
        (("Left-Hippocampus", "Right-Hippocampus"), "crop", None),
    ],
)
def test_brain_volume(make_segmentation, names, field, expected):
    seg = make_segmentation(names=names)
    sizes = head_size(replace(seg, provenance={"field": field}))
    assert sizes == {"brain_volume_mm3": expected and pytest.approx(expected), "prior_scale": None}


@pytest.mark.parametrize(("kind", "expected"), [("affine", 1.1 * 1.2 * 0.9), ("rigid", None), ("center", None)])
def test_scale_of_the_head(make_segmentation, kind, expected):
    world = np.diag([1.1, -1.2, 0.9, 1.0])
    aligned = replace(make_segmentation(), alignment=Alignment(kind, np.eye(4), world))
    assert head_size(aligned)["prior_scale"] == (expected and pytest.approx(expected))


def test_mean_quality_weighs_by_volume(make_segmentation):
    seg = make_segmentation()
    both = replace(seg, provenance={"quality": {"Left-Hippocampus": 0.9, "Right-Hippocampus": 0.4}})
    assert mean_quality(both) == pytest.approx((0.9 * 72 + 0.4 * 3) / 75)
    assert mean_quality(replace(seg, label_map=seg.label_map * 0)) is None


def test_a_structure_in_the_middle_touches_no_border():
    label_map = np.zeros((5, 5, 5), int)
    label_map[1:4, 1:4, 1:4] = 3
    assert border_flags(label_map, TABLE).tolist() == [True, False, False]
    label_map[2, 2, 4] = 8
    assert border_flags(label_map, TABLE).tolist() == [True, False, True]


def test_a_single_slice_has_no_border_across():
    label_map = np.zeros((5, 5, 1), int)
    label_map[2, 2, 0] = 3
    assert not border_flags(label_map, TABLE)[1]


def test_quality_is_the_mean_probability_of_the_given_label():
    quality = label_quality(np.array([0, 1, 1]), np.array([0.9, 0.8, 0.6]), 3)
    assert quality[:2] == pytest.approx([0.9, 0.7]) and np.isnan(quality[2])


def test_shapes_that_do_not_fit_are_refused(make_segmentation):
    with pytest.raises(ValueError, match=r"entropy: expected shape \(10, 12, 6\), found \(10, 12, 5\)"):
        make_segmentation(entropy=np.zeros((10, 12, 5), np.float32))


def test_a_structure_that_ends_where_the_prior_ends_is_flagged():
    labels = np.zeros((9, 9, 9), int)
    labels[3:5, 3:5, 3:5], labels[3:5, 3:5, 6] = 3, 8
    within = np.ones(labels.shape, bool)
    assert not border_flags(labels, TABLE, within)[1:].any()
    within[:, :, 7:] = False
    assert border_flags(labels, TABLE, within)[1:].tolist() == [False, True]
