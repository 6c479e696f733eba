from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.results.charts import benchmark_figure, dice_steps_figure, reliability_figure, training_figure
from ppl_seg.results.diagnostics import reliability
from ppl_seg.results.figures import _legend_entries, best_slices, draws_figure, qc_figure


def assert_picture(path: Path) -> np.ndarray:
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.02  # something is drawn
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".png"] == [path.name]
    return pixels


@pytest.fixture(autouse=True)
def no_traces():
    """No figure changes the settings, and none warns (a layout that does not fit warns)."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("shape", [(10, 12, 6), (10, 12, 1), (1, 12, 10)])
def test_qc(make_segmentation, tmp_path, shape):
    label_map = np.zeros(shape, int)
    label_map[:5, 3:8] = 17
    seg = make_segmentation(shape, label_map=label_map)
    qc_figure(seg, tmp_path / "a_qc.png")
    pixels = assert_picture(tmp_path / "a_qc.png")
    color = np.array(seg.table.colors[1]) / 255  # the outline has the table's colour
    assert (np.abs(pixels[..., :3] - color).max(-1) < 0.02).any()


def test_qc_of_an_empty_label_map_and_missing_voxels(make_segmentation, tmp_path):
    seg = make_segmentation(label_map=np.zeros((10, 12, 6), int))
    seg.image.data[0] = np.nan
    qc_figure(seg, tmp_path / "a_qc.png")
    assert_picture(tmp_path / "a_qc.png")


def test_qc_puts_left_on_the_left(make_segmentation, tmp_path, monkeypatch):
    import ppl_seg.results.figures as figures

    shown = []
    original = figures.show_slice
    monkeypatch.setattr(
        figures, "show_slice", lambda ax, picture, *a, **k: shown.append(picture) or original(ax, picture, *a, **k)
    )
    seg = make_segmentation()
    seg.image.data[:] = 0
    seg.image.data[-1] = 100.0  # the affine's first axis runs to the left, so the last voxel is leftmost
    qc_figure(seg, tmp_path / "a_qc.png")
    axial_scan = shown[6]
    assert axial_scan.shape == (12, 10)  # rows are y
    assert axial_scan[:, 0].min() > axial_scan[:, 1:].max()


@pytest.mark.parametrize("shape", [(9, 4, 5, 6), (3, 8, 9)])
def test_draws(make_segmentation, tmp_path, shape):
    maps = np.random.default_rng(0).integers(0, 3, shape)
    draws_figure(maps, make_segmentation().table, np.diag([2.0, 2.0, 2.0, 1.0]), tmp_path / "draws.png", "Draws")
    assert_picture(tmp_path / "draws.png")


def test_columns_of_draws_by_name(make_segmentation, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda self, title: titles.append(title))
    maps = np.random.default_rng(0).integers(0, 3, (3, 4, 5, 6))
    table = make_segmentation().table
    draws_figure(maps, table, np.eye(4), tmp_path / "draws.png", columns=2, names=["truth", "draw", "unseen"])
    assert titles == ["truth", "draw"]


def test_legend_joins_sides_of_one_colour():
    red, blue = (200, 0, 0), (0, 0, 200)
    table = LabelTable(
        (
            *(make_entry(1, "Left-Caudate", color=red), make_entry(2, "Right-Caudate", color=red)),
            *(make_entry(3, "Left-Arm", color=red), make_entry(4, "Right-Arm", color=blue)),
            make_entry(5, "Brain-Stem", color=blue),
        )
    )
    assert [name for name, _ in _legend_entries(table, [1, 2, 3, 4, 5])] == [
        *("Caudate", "Left-Arm", "Right-Arm", "Brain-Stem")
    ]
    assert [name for name, _ in _legend_entries(table, [2])] == ["Caudate"]  # the other side is in the table


def test_slices_show_the_structures_at_their_largest():
    positions = np.zeros((1, 8, 8, 8), int)
    positions[0, 1:4, 1:4, 6] = 1
    positions[0, 5, 5, 6] = 2
    assert best_slices(positions, 3) == [5, 5, 6]
    assert best_slices(np.zeros((1, 4, 6, 8), int), 3) == [2, 3, 4]


def test_training_curves(tmp_path):
    lines = ["step,bound_per_voxel,kl,held_out,learning_rate,seconds"]
    lines += [f"{n},{-1 - 1 / n},{'' if n % 10 else 0.1},{'' if n % 20 else -1.1},0.001,{n}" for n in range(1, 101)]
    (tmp_path / "training.csv").write_text("\n".join(lines) + "\n")
    training_figure(tmp_path / "training.csv", tmp_path / "training.png", "fit")
    assert_picture(tmp_path / "training.png")


def test_training_curves_of_a_single_step(tmp_path):
    (tmp_path / "training.csv").write_text("step,bound_per_voxel,held_out\n1,-1.5,\n")
    training_figure(tmp_path / "training.csv", tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    (tmp_path / "training.csv").write_text("loss\n1\n")
    with pytest.raises(ValueError, match="a column step"):
        training_figure(tmp_path / "training.csv", tmp_path / "training.png")


def test_reliability(tmp_path):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([1.0, 1.0], 500).T
    curve = reliability(probabilities, random.integers(0, 2, 500))
    reliability_figure({"a": curve, "b": curve}, tmp_path / "reliability.png")
    assert_picture(tmp_path / "reliability.png")


def test_dice_against_steps(tmp_path):
    steps = np.arange(30)
    curves = {"marginal": (steps, 1 - 1 / (steps + 1.5)), "jensen": (steps[:1], np.array([0.3]))}
    dice_steps_figure(curves, {"marginal": (steps, -1 / (steps + 1.0))}, tmp_path / "dice.png", "x")
    assert_picture(tmp_path / "dice.png")


@pytest.mark.parametrize("measures", [["mean"], [f"structure {n}" for n in range(6)]])
def test_benchmark_bars(tmp_path, measures):
    rows = [
        {"method": method, "measure": measure, "mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        for method, mean in (("location prior", 0.6), ("EM", 0.7), ("absent", float("nan")))
        for measure in measures
    ]
    benchmark_figure(rows, tmp_path / "bars.png")
    assert_picture(tmp_path / "bars.png")
