"""How the prior lies on a scan: outlines of the classes that it expects, over slices of the scan."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_seg.data.resampling import resample
from ppl_seg.results.figures import (
    PLANES,
    STYLE,
    best_slices,
    extent_of,
    intensity_window,
    save_figure,
    show_slice,
    slice_of,
    to_ras,
)
from ppl_seg.results.segmentation import Segmentation

COLUMNS = (-0.16, 0.0, 0.16)  # slices beside the best one, in lengths of the axis


def alignment_figure(segmentation: Segmentation, path: str | Path) -> None:
    """Three slices a plane, with the outlines of the prior's commonest classes at the mean shape.

    Raises:
        ValueError: the segmentation does not say how it was aligned.
    """
    seg, alignment = segmentation, segmentation.alignment
    if alignment is None or alignment.atlas is None:
        raise ValueError("no alignment to draw")
    scan, spacing = to_ras(np.nan_to_num(np.asarray(seg.image.data, np.float32)), seg.image.affine)
    classes = torch.from_numpy(alignment.atlas.classes.astype(np.int64))[None]
    expected = resample(classes, np.linalg.inv(alignment.matrix), seg.image.shape, "nearest")[0].numpy()
    classes_shown, _ = to_ras(expected, seg.image.affine)
    low, high = intensity_window(scan, classes_shown > 0)
    single = [axis for axis in range(3) if scan.shape[axis] == 1]
    axes_shown = single[:1] or [0, 1, 2]
    places = best_slices(classes_shown[None], int(classes_shown.max()) + 1)
    extents = [extent_of(scan.shape, spacing, axis) for axis in axes_shown]
    width = max(w for w, _ in extents)
    colors = np.vstack([[0, 0, 0], matplotlib.colormaps["tab20"](np.arange(20))[:, :3]])
    with matplotlib.rc_context(STYLE):
        heights = [2.9 * h / width for _, h in extents]
        figure = Figure(figsize=(2.9 * len(COLUMNS), sum(heights) + 0.4))
        panels = figure.subplots(len(axes_shown), len(COLUMNS), squeeze=False, gridspec_kw={"height_ratios": heights})
        for row, axis, extent in zip(panels, axes_shown, extents, strict=True):
            for ax, offset in zip(row, COLUMNS, strict=True):
                at = int(np.clip(places[axis] + offset * scan.shape[axis], 0, scan.shape[axis] - 1))
                grey = np.clip((slice_of(scan, axis, at) - low) / (high - low), 0, 1)
                picture = _outlined(grey, slice_of(classes_shown, axis, at), colors)
                show_slice(ax, picture, extent, (width, extent[1]))
            row[0].set_ylabel(PLANES[axis])
        quality = "" if alignment.overlap is None else f", overlap {alignment.overlap:.2f}"
        name = seg.provenance.get("scan") or Path(seg.image.path).name
        figure.suptitle(f"{name}: {alignment.kind}{quality}", fontsize=10)
        save_figure(figure, path)


def _outlined(grey: np.ndarray, classes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """(H, W, 3) the slice, enlarged, with a thin line in the class's colour inside each region's edge."""
    factor = int(np.clip(np.ceil(500 / max(classes.shape)), 1, 12))
    classes, grey = (np.kron(array, np.ones((factor, factor), array.dtype)) for array in (classes, grey))
    edge = np.zeros(classes.shape, bool)
    edge[1:] |= classes[1:] != classes[:-1]
    edge[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    picture = np.repeat(grey[..., None], 3, axis=-1)
    shown = np.where(classes > 0, 1 + (classes - 1) % (len(colors) - 1), 0)
    picture[edge] = np.where(shown[edge, None] > 0, colors[shown[edge]], [1.0, 1.0, 0.0])
    return picture
