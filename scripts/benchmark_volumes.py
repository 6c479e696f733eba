"""What the volumes of `benchmark_accuracy.py` say: two visits of a person, and agreement with manual volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_report import Rows, average, heading, line, unique
from scipy import stats

from ppl_seg.data.cohort import find_label_maps
from ppl_seg.data.images import Image, read_label_map

MANUAL = "manual"
FEWEST_SCANS = 3  # for a correlation


def of_structures(scores: Rows) -> Rows:
    """The rows that have a volume: all but means over structures."""
    return [s for s in scores if "volume_mm3" in s]


def with_manual(scores: Rows) -> Rows:
    """The rows that have a volume, and the manual volumes as a row of their own."""
    volumes = of_structures(scores)
    first = [s for s in volumes if s["row"] == volumes[0]["row"]]
    return [{**s, "row": MANUAL, "volume_mm3": s["truth_volume_mm3"]} for s in first] + volumes


def retest(scores: Rows) -> Rows:
    """|a − b| / mean of the volumes of each pair of visits: a row a person, pair and structure; manual ones, too.

    Args:
        scores: rows with row, structure, person, session ("" where there is none), volume_mm3, truth_volume_mm3.
    """
    visits: dict[tuple[str, str, str], dict[str, float]] = {}
    for s in with_manual(scores):
        if s["session"]:
            visits.setdefault((s["row"], s["structure"], s["person"]), {})[s["session"]] = s["volume_mm3"]
    rows: Rows = []
    for (row, structure, person), volumes in visits.items():
        ordered = sorted(volumes.items())
        for n, (one, a) in enumerate(ordered):
            for other, b in ordered[n + 1 :]:
                change = abs(a - b) / ((a + b) / 2) if a + b else float("nan")
                keys = {"row": row, "person": person, "sessions": f"{one}, {other}", "structure": structure}
                rows.append({**keys, "first_mm3": a, "second_mm3": b, "change": change})
    return rows


def agreement(scores: Rows) -> Rows:
    """A row a row and structure: segmented / manual volume, and their correlations over the scans.

    `box_spearman` is that of the manual volumes with box_mm3, what the scan's box alone says of them.
    """
    table: dict[tuple[str, str], Rows] = {}
    for s in of_structures(scores):
        table.setdefault((s["row"], s["structure"]), []).append(s)
    rows: Rows = []
    for (row, structure), of_scans in table.items():
        found, manual, box = (
            np.array([s[key] for s in of_scans], np.float64) for key in ("volume_mm3", "truth_volume_mm3", "box_mm3")
        )
        cells = {"row": row, "structure": structure, "scans": len(of_scans)}
        cells["ratio"] = found.sum() / manual.sum() if manual.any() else float("nan")
        cells["pearson"] = correlation(stats.pearsonr, found, manual)
        cells["spearman"] = correlation(stats.spearmanr, found, manual)
        cells["box_spearman"] = correlation(stats.spearmanr, box, manual)
        rows.append(cells)
    return rows


def box_baseline(folder: Path, groups: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Structure -> (4,), its volume (mm³) in a folder's label maps, by least squares from `box_of` each."""
    boxes: list[np.ndarray] = []
    volumes: dict[str, list[float]] = {name: [] for name in groups}
    for found in find_label_maps([folder]):
        image = read_label_map(found.path)
        boxes.append(box_of(image))
        for name, values in groups.items():
            volumes[name].append(np.isin(image.data, values).sum() * image.voxel_volume)
    return {name: np.linalg.lstsq(np.stack(boxes), np.array(of), rcond=None)[0] for name, of in volumes.items()}


def box_of(image: Image) -> np.ndarray:
    """(4,): 1 and the logarithms of the sides of an image's field of view (mm)."""
    return np.array([1.0, *np.log(np.multiply(image.shape, image.spacing))])


def correlation(measure: Any, first: np.ndarray, second: np.ndarray) -> float:
    """SciPy's `measure` of two volumes over scans; NaN where one is constant, or of few scans."""
    if len(first) < FEWEST_SCANS or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(measure(first, second).statistic)


def volumes_page(retested: Rows, agreed: Rows) -> str:
    """Two tables to read."""
    rows = unique(agreed, "row")
    cells = {(a["row"], a["structure"]): a for a in agreed}
    header = ["structure: segmented / manual volume, Pearson, Spearman", *rows, "Spearman, by the box alone"]
    lines = ["", *heading(header)]
    for structure in unique(agreed, "structure"):
        of_rows = [cells[row, structure] for row in rows]
        texts = [f"{c['ratio']:.2f}, {c['pearson']:.2f}, {c['spearman']:.2f}" for c in of_rows]
        lines.append(line([structure, *texts, f"{of_rows[0]['box_spearman']:.2f}"]))
    structures = [r for r in retested if r["structure"] != "whole"]
    if structures:
        pairs = list(dict.fromkeys((r["person"], r["sessions"]) for r in structures))
        names = [f"{person} ({sessions})" for person, sessions in pairs]
        start = "|a − b| / mean of two visits' volumes, median over structures"
        lines += ["", *heading([start.replace("|", "\\|"), *names, "of the pairs' means"])]
        for row in unique(structures, "row"):
            own = [r for r in structures if r["row"] == row]
            each = [[r["change"] for r in own if (r["person"], r["sessions"]) == pair] for pair in pairs]
            means = [average([r["change"] for r in own if r["structure"] == s]) for s in unique(own, "structure")]
            lines.append(line([row, *(f"{100 * np.nanmedian(changes):.1f} %" for changes in (*each, means))]))
    return "\n".join(lines) + "\n"
