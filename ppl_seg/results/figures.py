"""Pictures of volumes: a segmentation beside its scan, label maps drawn from a prior.

Matplotlib's object interface only (no pyplot, no global state); PNG files appear whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from ppl_seg.data.geometry import UNKNOWN_SIDES
from ppl_seg.files import replacing

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable
    from ppl_seg.results.segmentation import Segmentation

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
PLANES = ("sagittal", "coronal", "axial")  # of a volume in RAS order: the axis that is held fixed
ENTROPY_MAX = float(np.log(3.0))  # three labels, evenly: one scale for all scans
TINT = 0.45  # of a label's colour inside its outline
LEGEND_ENTRIES = 40
_SIDE = re.compile(r"^(left|right)[-_ ]", re.IGNORECASE)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def qc_figure(segmentation: Segmentation, path: str | Path) -> None:
    """Scan, segmentation and entropy side by side, a row a plane (one row where the scan is a single slice).

    Left of the picture is left of the person (marked where the file says which side is which). Slices show
    the structures at their largest.
    """
    seg = segmentation
    scan, spacing = to_ras(np.nan_to_num(np.asarray(seg.image.data, np.float32)), seg.image.affine)
    positions, _ = to_ras(np.asarray(seg.table.to_positions(seg.label_map)), seg.image.affine)
    entropy, _ = to_ras(seg.entropy, seg.image.affine)
    window = intensity_window(scan, positions > 0)
    single = [axis for axis in range(3) if scan.shape[axis] == 1]
    axes_shown = single[:1] or [0, 1, 2]
    slices = best_slices(positions[None], len(seg.table))
    extents = [extent_of(scan.shape, spacing, axis) for axis in axes_shown]
    width, shown = max(w for w, _ in extents), set()
    with matplotlib.rc_context(STYLE):
        column = 2.9
        heights = [column * h / width for _, h in extents]
        figure = Figure(figsize=(3 * column + 1.35, sum(heights) + 1.15))
        grid = figure.subplots(len(axes_shown), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
        for row, axis in zip(grid, axes_shown, strict=True):
            at = slices[axis]
            grey = np.clip((slice_of(scan, axis, at) - window[0]) / (window[1] - window[0]), 0, 1)
            labels = slice_of(positions, axis, at)
            shown |= set(np.unique(labels).tolist())
            pictures = (grey, _overlay(grey, labels, seg.table), slice_of(entropy, axis, at))
            for ax, picture, name in zip(row, pictures, ("Scan", "Segmentation", "Entropy"), strict=True):
                extent = extent_of(scan.shape, spacing, axis)
                options = {"cmap": "magma", "vmax": ENTROPY_MAX} if name == "Entropy" else {"cmap": "gray", "vmax": 1}
                drawn = show_slice(ax, picture, extent, (width, extent[1]), vmin=0, **options)
                if axis == axes_shown[0]:
                    ax.set_title(name)
            row[0].set_ylabel(PLANES[axis])
            if axis != 0 and not any(UNKNOWN_SIDES in warning for warning in seg.image.warnings):
                for x, side, place in ((0.03, "L", "left"), (0.97, "R", "right")):
                    row[0].text(x, 0.96, side, color="w", ha=place, va="top", transform=row[0].transAxes)
        bar = figure.colorbar(drawn, ax=list(grid[:, 2]), extend="max", shrink=0.8, aspect=30)
        bar.set_label("entropy (nats)")
        figure.suptitle(str(seg.provenance.get("scan") or Path(seg.image.path).name), fontsize=10)
        _legend(figure, seg.table, sorted(shown - {0}))
        save_figure(figure, path)


def draws_figure(
    label_maps: np.ndarray,
    table: LabelTable,
    affine: np.ndarray,
    path: str | Path,
    title: str = "",
    columns: int = 8,
    names: Sequence[str] = (),
) -> None:
    """Label maps side by side: a column a map, a row a plane, the same slices in all.

    Args:
        label_maps: (S, *grid) positions of the table, two or three axes; the first `columns` are shown.
        affine: (4, 4) of the grid.
        names: headings of the columns; by default draw 1, draw 2, ...
    """
    maps = np.asarray(label_maps)[:columns]
    if maps.ndim == 3:
        maps = maps[..., None]
    turned = [to_ras(volume, affine) for volume in maps]
    volumes, spacing = np.stack([volume for volume, _ in turned]), turned[0][1]
    single = [axis for axis in range(3) if volumes.shape[axis + 1] == 1]
    axes_shown = single[:1] or [0, 1, 2]
    slices = best_slices(volumes, len(table))
    extents = [extent_of(volumes.shape[1:], spacing, axis) for axis in axes_shown]
    width = max(w for w, _ in extents)
    colors = _colors(table)
    with matplotlib.rc_context(STYLE):
        column = 1.4
        heights = [column * h / width for _, h in extents]
        figure = Figure(figsize=(max(column * len(volumes) + 0.6, 4.0), sum(heights) + 1.0))
        grid = figure.subplots(len(axes_shown), len(volumes), squeeze=False, gridspec_kw={"height_ratios": heights})
        shown = set()
        for row, axis, extent in zip(grid, axes_shown, extents, strict=True):
            for number, (ax, volume) in enumerate(zip(row, volumes, strict=True)):
                labels = slice_of(volume, axis, slices[axis])
                shown |= set(np.unique(labels).tolist())
                show_slice(ax, colors[labels], extent, (width, extent[1]))
                if axis == axes_shown[0]:
                    ax.set_title(names[number] if names else f"draw {number + 1}")
            row[0].set_ylabel(PLANES[axis])
        if title:
            figure.suptitle(title, fontsize=10)
        _legend(figure, table, sorted(shown - {0}))
        save_figure(figure, path)


def best_slices(positions: np.ndarray, num_labels: int) -> list[int]:
    """For each axis the slice where the structures' shares of their own volume sum highest.

    Every structure counts alike, so small ones are seen; the middle slice where there is only background.

    Args:
        positions: (S, X, Y, Z) label maps as positions.
    """
    foreground = np.argwhere(positions > 0)
    labels = positions[tuple(foreground.T)]
    if not len(labels):
        return [length // 2 for length in positions.shape[1:]]
    totals = np.bincount(labels, minlength=num_labels)
    weights = 1.0 / totals[labels]
    return [int(np.argmax(np.bincount(foreground[:, axis], weights=weights))) for axis in (1, 2, 3)]


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The volume turned to the closest right-anterior-superior order of axes, and its spacing."""
    affine = np.asarray(affine, np.float64)
    order = nib.orientations.io_orientation(affine)
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    spacing = np.empty(3)
    spacing[order[:, 0].astype(int)] = sizes
    return nib.orientations.apply_orientation(np.asarray(volume), order), spacing


def slice_of(volume: np.ndarray, axis: int, at: int) -> np.ndarray:
    """Slice with the vertical axis first, as pictures have it."""
    return np.take(volume, at, axis=axis).T


def extent_of(shape: Sequence[int], spacing: np.ndarray, axis: int) -> tuple[float, float]:
    """Width and height of a slice in mm."""
    across, up = (other for other in range(3) if other != axis)
    return float(shape[across] * spacing[across]), float(shape[up] * spacing[up])


def intensity_window(scan: np.ndarray, structures: np.ndarray) -> tuple[float, float]:
    """The intensities shown as black and white: those of the box around the structures (bool, like the scan), if any.

    In CT the air around a head is far below all else.
    """
    if structures.any():
        scan = scan[ndimage.find_objects(structures.astype(np.uint8))[0]]
    values = scan[scan != 0]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [0.5, 99.5])
    low = min(float(low), 0.0) if scan.min() >= 0 else float(low)
    return (low, float(high)) if high > low else (low, low + 1.0)


def _colors(table: LabelTable) -> np.ndarray:
    """(M, 3) colours of the table, background black."""
    colors = np.asarray(table.colors, np.float64) / 255
    colors[0] = 0.0
    return colors


def _overlay(grey: np.ndarray, labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """(H, W, 3) scan with the labels as a tint and an outline, enlarged so that outlines are thin."""
    factor = int(np.clip(np.ceil(400 / max(labels.shape)), 1, 12))
    labels, grey = (np.kron(array, np.ones((factor, factor), array.dtype)) for array in (labels, grey))
    colors = _colors(table)[labels]
    inside = labels > 0
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= differs
        edge[tuple(after)] |= differs
    strength = np.where(edge & inside, 1.0, np.where(inside, TINT, 0.0))[..., None]
    return (1 - strength) * grey[..., None] + strength * colors


def show_slice(
    ax: Any, picture: np.ndarray, size: tuple[float, float], room: tuple[float, float], **options: Any
) -> Any:
    """Picture of `size` mm in the middle of a black panel of `room` mm, so that all panels have one scale."""
    drawn = ax.imshow(picture, origin="lower", extent=(0, size[0], 0, size[1]), interpolation="nearest", **options)
    ax.set_facecolor("black")
    ax.set_xlim((size[0] - room[0]) / 2, (size[0] + room[0]) / 2)
    ax.set_ylim((size[1] - room[1]) / 2, (size[1] + room[1]) / 2)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return drawn


def _legend(figure: Figure, table: LabelTable, positions: Sequence[int]) -> None:
    if not positions:
        return
    entries = _legend_entries(table, positions)
    patches = [Patch(facecolor=color, edgecolor="0.6", lw=0.5, label=name) for name, color in entries[:LEGEND_ENTRIES]]
    if len(patches) < len(entries):
        patches.append(Patch(color="none", label=f"and {len(entries) - len(patches)} more"))
    longest = max(len(str(patch.get_label())) for patch in patches)
    columns = max(1, int(figure.get_size_inches()[0] / (0.45 + 0.07 * longest)))
    rows = -(-len(patches) // columns)
    columns = -(-len(patches) // rows)
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
    )


def _legend_entries(table: LabelTable, positions: Sequence[int]) -> list[tuple[str, tuple[float, ...]]]:
    """Names and colours; where left and right have one colour they are one entry, without the side."""
    keys = [(_SIDE.sub("", str(name)), tuple(color)) for name, color in zip(table.names, _colors(table), strict=True)]
    entries = [keys[m] if keys.count(keys[m]) > 1 else (str(table.names[m]), keys[m][1]) for m in positions]
    return list(dict.fromkeys(entries))
