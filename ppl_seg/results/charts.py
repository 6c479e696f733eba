"""Plots of numbers: training curves, reliability, Dice against steps, a benchmark's bars."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ppl_seg.results.diagnostics import Reliability
from ppl_seg.results.figures import STYLE, save_figure

# Okabe and Ito's colours: told apart without red-green vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#999999")
Curve = tuple[Sequence[float], Sequence[float]]


def training_figure(table: str | Path, path: str | Path, title: str = "") -> None:
    """Curves of a training.csv: bound and held-out bound per voxel, then each named term in its own panel.

    The column `step` is the abscissa; columns without a number in any row are left out, and terms that are always 0.
    """
    columns = _read_columns(table)
    steps = columns.pop("step")
    bounds: list[str] = [name for name in ("bound_per_voxel", "held_out") if name in columns]
    unseen = (*bounds, "learning_rate", "seconds")
    terms = [[name] for name, values in columns.items() if name not in unseen and np.nan_to_num(values).any()]
    panels = [bounds, *terms] if bounds else terms
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * across + 0.4, 2.4 * down + 0.4))
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for ax, names in zip(grid, panels, strict=False):
            for color, name in zip(COLORS, names, strict=False):
                finite = np.isfinite(columns[name])
                marker = "o" if finite.sum() <= 40 else None
                values = columns[name][finite]
                ax.plot(
                    steps[finite],
                    values,
                    color=color,
                    lw=1.2,
                    marker=marker,
                    markersize=3,
                    label=_words(name),
                )
            ax.set_title(_words(names[0]) if len(names) == 1 else "bound per voxel")
            ax.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
            ax.set_xlabel("step")
            ax.grid(alpha=0.25)
            if len(names) > 1:
                ax.legend(loc="best", fontsize=8)
            _focus(ax, [columns[name] for name in names])
        for ax in grid[len(panels) :]:
            ax.set_visible(False)
        if title:
            figure.suptitle(title, fontsize=10)
        save_figure(figure, path)


def reliability_figure(curves: Mapping[str, Reliability], path: str | Path, title: str = "") -> None:
    """Observed frequency against predicted probability, and below how many predictions each bin has."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 6.0))
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
        upper.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
        for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
            label = f"{name} (ECE {curve.expected_calibration_error:.3f})"
            upper.plot(curve.predicted, curve.observed, color=color, marker="o", markersize=4, lw=1.3, label=label)
            lower.stairs(np.maximum(curve.counts, 0.5), curve.edges, color=color, lw=1.3, baseline=0.5)
        upper.set(ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
        upper.legend(loc="upper left", fontsize=8)
        upper.grid(alpha=0.25)
        lower.set(yscale="log", xlabel="predicted probability", ylabel="predictions")
        lower.set_ylim(bottom=0.5)
        if title:
            figure.suptitle(title, fontsize=10)
        save_figure(figure, path)


def dice_steps_figure(
    dice: Mapping[str, Curve], bounds: Mapping[str, Curve], path: str | Path, title: str = ""
) -> None:
    """Dice (left) beside the bound per voxel (right), both against the step; name -> (steps, values)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4))
        panels = figure.subplots(1, 2)
        names = list(dict.fromkeys([*dice, *bounds]))
        color_of = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
        for ax, curves, word in zip(panels, (dice, bounds), ("Dice", "bound per voxel"), strict=True):
            for name, (steps, values) in curves.items():
                marker = "o" if len(steps) <= 40 else None
                ax.plot(steps, values, color=color_of[name], marker=marker, markersize=3.5, lw=1.3, label=name)
            ax.set(xlabel="step", ylabel=word)
            ax.grid(alpha=0.25)
            _focus(ax, [np.asarray(values, float) for _, values in curves.values()])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        if title:
            figure.suptitle(title, fontsize=10)
        save_figure(figure, path)


def benchmark_figure(rows: Sequence[Mapping[str, Any]], path: str | Path, label: str = "Dice") -> None:
    """Horizontal bars with 95 % intervals: a panel a measure, a bar a method, the value written beside it.

    Args:
        rows: each with method, measure (structure, mean, whole), mean, low, high; NaN shows no bar.
        label: what the numbers are.
    """
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    measures = list(dict.fromkeys(str(row["measure"]) for row in rows))
    cells = {(str(row["method"]), str(row["measure"])): row for row in rows}
    across = min(4, len(measures))
    down = -(-len(measures) // across)
    names_width = 0.075 * max(len(method) for method in methods)
    top = max([float(row["high"]) for row in rows if np.isfinite(float(row["high"]))], default=1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * across + names_width + 0.3, (0.27 * len(methods) + 0.8) * down + 0.2))
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for ax, measure in zip(grid.ravel(), measures, strict=False):
            for place, method in enumerate(methods):
                cell = cells.get((method, measure), {})
                mean, low, high = (float(cell.get(key, "nan")) for key in ("mean", "low", "high"))
                if not np.isfinite(mean):
                    continue
                ax.barh(place, mean, height=0.68, color=COLORS[place % len(COLORS)], alpha=0.75)
                if np.isfinite([low, high]).all():
                    error = [[max(mean - low, 0)], [max(high - mean, 0)]]
                    ax.errorbar(mean, place, xerr=error, color="0.15", capsize=2.5, lw=1.1)
                ax.text(top * 1.04, place, f"{mean:.3f}", va="center", ha="left", fontsize=8)
            ax.set_title(measure)
            ax.set_yticks(range(len(methods)), methods)
            ax.set_xlim(0, top * 1.28)
            ax.set_xticks([tick for tick in ax.get_xticks() if tick <= top])
            ax.grid(axis="x", alpha=0.25)
            ax.set_axisbelow(True)
        for place, ax in enumerate(grid.ravel()):
            ax.set_visible(place < len(measures))
            ax.tick_params(labelbottom=place + across >= len(measures))  # the lowest of its column
        grid[0, 0].invert_yaxis()  # shared: the first method on top everywhere
        figure.supxlabel(f"{label} (mean and 95 % interval)", fontsize=9)
        save_figure(figure, path)


def _read_columns(table: str | Path) -> dict[str, np.ndarray]:
    """Numeric columns of a CSV file; empty cells are NaN."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns: dict[str, np.ndarray] = {}
    for name in rows[0] if rows else ():
        try:
            values = np.array([float(row[name] or "nan") for row in rows])
        except ValueError:
            continue  # text
        if np.isfinite(values).any():
            columns[name] = values
    if "step" not in columns:
        raise ValueError(f"{table}: expected a column step with numbers, found {', '.join(columns) or 'no rows'}")
    return columns


def _words(name: str) -> str:
    return {"held_out": "held-out", "kl": "KL"}.get(name, name.replace("_", " "))


def _focus(ax: Any, series: Sequence[np.ndarray]) -> None:
    """Limit the ordinate to what follows the first tenth: the first steps would flatten all the rest."""
    late = [values[len(values) // 10 :] for values in series]
    finite = np.concatenate([values[np.isfinite(values)] for values in late])
    if finite.size > 10:
        low, high = float(finite.min()), float(finite.max())
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)
