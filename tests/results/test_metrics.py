from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ppl_seg.results.metrics import (
    bootstrap_interval,
    evaluate_pair,
    paired_difference_interval,
    structures_of_table,
    summary_rows,
    surface_distances,
)
from tests.reference.surfaces import average_distance, boundary, hd95

ONE = {"a": (1,)}


def affine(*spacing: float) -> np.ndarray:
    return np.diag([*(spacing or (1.0, 1.0, 1.0)), 1.0])


def cube(start: int, shape: tuple[int, ...] = (12, 12, 12), side: int = 4) -> np.ndarray:
    mask = np.zeros(shape, int)
    mask[start : start + side, 3 : 3 + side, 3 : 3 + side] = 1
    return mask


def blob(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 1.5)
    return smooth > np.quantile(smooth, 0.7)


def test_a_cube_shifted_by_one_voxel():
    (row,) = evaluate_pair(cube(3), cube(4), affine(2.0, 1.0, 1.0), ONE)
    assert row["dice"] == pytest.approx(0.75)  # three of four layers are shared
    assert row["hd95_mm"] == pytest.approx(2.0)
    assert (row["volume_mm3"], row["truth_volume_mm3"], row["missed"]) == (128.0, 128.0, 0)


def test_two_points_are_as_far_as_they_are():
    first, second = np.zeros((8, 8, 8), int), np.zeros((8, 8, 8), int)
    first[1, 1, 1] = second[4, 1, 5] = 1
    (row,) = evaluate_pair(first, second, affine(1.0, 2.0, 1.0), ONE)
    assert (row["dice"], row["hd95_mm"], row["asd_mm"]) == (0.0, 5.0, 5.0)
    assert row["missed"] == 0


def test_equal_maps_have_no_distance():
    (row,) = evaluate_pair(cube(3), cube(3), affine(), ONE)
    assert (row["dice"], row["hd95_mm"], row["asd_mm"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_scipy(seed: int):
    spacing, shape = (0.7, 1.3, 2.1), (14, 9, 11)
    first, second = blob(seed, shape), blob(seed + 100, shape)  # they reach the border of the array
    found = surface_distances(first, second, np.diag(spacing))
    expected = hd95(first, second, spacing), average_distance(first, second, spacing)
    assert found == pytest.approx(expected, rel=1e-5)
    turn = Rotation.from_euler("xyz", (20, -30, 50), degrees=True).as_matrix()
    assert surface_distances(first, second, turn @ np.diag(spacing)) == pytest.approx(expected, rel=1e-5)


def test_a_single_slice_is_scored_in_two_dimensions():
    first, second = blob(0, (20, 16)), blob(1, (20, 16))
    found = surface_distances(first[:, None], second[:, None], np.diag([1.0, 9.0, 2.0]))
    assert found == pytest.approx((hd95(first, second, (1.0, 2.0)), average_distance(first, second, (1.0, 2.0))))


def test_sheared_axes():
    """By brute force over all pairs of boundary voxels, and a volume that is not the product of the spacings."""
    axes = np.array([[1.0, 0.4, 0.0], [0.0, 1.5, -0.3], [0.0, 0.0, 2.0]])
    first, second = blob(3, (9, 8, 7)), blob(7, (9, 8, 7))
    places = [np.argwhere(boundary(mask)) @ axes.T for mask in (first, second)]
    between = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
    there, back = between.min(1), between.min(0)
    expected = max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()
    assert surface_distances(first, second, axes) == pytest.approx(expected, rel=1e-12)

    sheared = np.eye(4)
    sheared[:3, :3] = axes
    (row,) = evaluate_pair(first.astype(int), second.astype(int), sheared, ONE)
    assert row["volume_mm3"] == pytest.approx(first.sum() * 3.0)  # the product of the column lengths is 3.17


def test_absent_structures():
    empty = np.zeros((12, 12, 12), int)
    (both,) = evaluate_pair(empty, empty, affine(), ONE)
    assert np.isnan([both["dice"], both["hd95_mm"], both["asd_mm"]]).all()
    assert (both["volume_mm3"], both["missed"]) == (0.0, 0)
    for pair in ((empty, cube(3)), (cube(3), empty)):
        (row,) = evaluate_pair(*pair, affine(), ONE)
        assert (row["dice"], row["missed"]) == (0.0, 1)
        assert np.isnan([row["hd95_mm"], row["asd_mm"]]).all()


def test_values_of_a_group_are_one_structure():
    truth = cube(3)
    parts = truth.copy()
    parts[5:][parts[5:] == 1] = 2
    (row,) = evaluate_pair(parts, np.where(truth, 2, 0), affine(), {"both": (1, 2)})
    assert row["dice"] == 1.0


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        evaluate_pair(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), affine(), ONE)


def test_structures_of_a_table(make_segmentation):
    table = make_segmentation().table
    assert structures_of_table(table) == {"Left-Hippocampus": (17,), "Right-Hippocampus": (53,)}


def test_the_bootstrap_resamples_persons():
    values = np.repeat([0.2, 0.5, 0.8], 40)
    by_scan = bootstrap_interval(values, [str(n) for n in range(120)])
    by_person = bootstrap_interval(values, ["a"] * 40 + ["b"] * 40 + ["c"] * 40)
    assert by_scan.mean == by_person.mean == pytest.approx(0.5)
    assert by_scan.high - by_scan.low < 0.15
    assert (by_person.low, by_person.high) == pytest.approx((0.2, 0.8))
    of_one = bootstrap_interval(values, ["a"] * 120)
    assert of_one.mean == pytest.approx(0.5) and np.isnan(of_one[1:]).all()


def test_the_bootstrap_of_many_persons_is_the_normal_interval():
    values = np.random.default_rng(1).normal(0.7, 0.1, 400)
    interval = bootstrap_interval(values, [str(n) for n in range(400)], num=4000)
    half = 1.96 * values.std() / 20
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)


def test_the_bootstrap_leaves_out_what_is_missing():
    interval = bootstrap_interval([np.nan, 0.5, 0.5, 0.5], ["a", "b", "c", "d"])
    assert interval == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(bootstrap_interval([np.nan], ["a"])).all()
    with pytest.raises(ValueError, match="a person for each"):
        bootstrap_interval([0.1, 0.2], ["a"])


@given(st.lists(st.floats(0, 1), min_size=5, max_size=12), st.integers(0, 3))
def test_intervals_are_reproducible_and_hold_a_mean_of_values(values: list[float], seed: int):
    persons = [str(n // 2) for n in range(len(values))]
    interval = bootstrap_interval(values, persons, seed, num=200)
    assert interval == bootstrap_interval(values, persons, seed, num=200)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_paired_differences_are_tighter_than_their_parts():
    random = np.random.default_rng(0)
    base = random.normal(0.6, 0.2, 60)
    better = base + 0.02 + random.normal(0, 0.01, 60)
    persons = [str(n // 2) for n in range(60)]
    difference = paired_difference_interval(better, base, persons)
    assert 0.01 < difference.low < difference.mean < difference.high < 0.03
    better[0] = np.nan
    assert np.isfinite(paired_difference_interval(better, base, persons)).all()


def test_summary():
    rows = []
    for scan, dice in (("sub-1_run-1", 0.5), ("sub-1_run-2", 0.7), ("sub-2", np.nan)):
        for structure, shift in (("a", 0.0), ("b", 0.1)):
            missed = int(structure == "b" and scan == "sub-2")
            cells = {
                "dice": 0.0 if missed else dice + shift,
                "hd95_mm": np.nan,
                "asd_mm": 1.0,
                "missed": missed,
            }
            rows.append({"scan": scan, "structure": structure, **cells})
    a, b, mean = summary_rows(rows, person_of=lambda scan: scan.split("_")[0])
    assert (a["structure"], a["scans"], a["dice"], a["missed"]) == ("a", 2, pytest.approx(0.6), 0)
    assert (b["scans"], b["dice"], b["missed"]) == (3, pytest.approx(1.4 / 3), 1)
    assert mean["structure"] == "mean" and mean["dice"] == pytest.approx((0.55 + 0.75 + 0.0) / 3)
    assert np.isnan(a["hd95_mm"]) and a["asd_mm"] == a["asd_mm_low"] == 1.0 and mean["missed"] == 1
