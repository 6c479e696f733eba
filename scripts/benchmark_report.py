"""The page and the table of `benchmark_accuracy.py`: means, intervals over persons, seconds of each stage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from peers import PEERS, TISSUES

from ppl_seg.results import metrics

METHODS = {
    "0": "location prior",
    "a": "location prior + EM",
    "n": "the notes' recipe",
    "b": "per-scan inference",
    "b-jensen": "per-scan inference, jensen",
    "c": "amortised",
    "c-jensen": "amortised, jensen",
    "d": "amortised + refined",
    "d-jensen": "amortised + refined, jensen",
    "f": "fitted to other persons",
    "e-f": "z of the truth, decoder",
    "e-r": "z of the truth, marginals",
    **PEERS,
}
OURS = ("b", "c", "d")
ALIKE = ("Cerebral-White-Matter", "Cerebellum-White-Matter", "Cerebellum-Cortex", "Caudate", "Putamen", "Hippocampus")
ALIKE += ("Accumbens", "4th-Ventricle")  # structures that Neuromorphometrics' protocol and FreeSurfer draw alike
NEAR = 3  # voxels around the structures that count for the reliability: easy background dilutes errors
BUDGET = ("prior", "fit", "segment-d")  # stages that count
BUDGETS = {"hippocampus": 60 * 60, "oasis": 60 * 60}  # seconds
Rows = list[dict[str, Any]]


def average(values: Sequence[float]) -> float:
    """Mean of what is there; NaN where nothing is."""
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")


def summarise(scores: Rows, coverage: dict[str, dict[str, float]]) -> Rows:
    """Means with 95 % bootstrap intervals over persons; `gain` is the paired difference of Dice to row a."""
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for s in scores:
        table.setdefault((s["row"], s["structure"]), {})[s["scan"]] = s
    summary = []
    for (row, structure), of_scan in table.items():
        persons, base = [s["person"] for s in of_scan.values()], table.get(("a", structure), {})
        dice = [s["dice"] for s in of_scan.values()]
        before = [base[scan]["dice"] if scan in base else float("nan") for scan in of_scan]
        cells: dict[str, Any] = {"row": row, "method": METHODS[row], "structure": structure}
        intervals = {
            "dice": metrics.bootstrap_interval(dice, persons),
            "gain": metrics.paired_difference_interval(dice, before, persons),
            "hd95_mm": metrics.bootstrap_interval([s["hd95_mm"] for s in of_scan.values()], persons),
        }
        for key, (mean, low, high) in intervals.items():
            cells |= {key: mean, f"{key}_low": low, f"{key}_high": high}
        cells |= {"worst_dice": float(np.nanmin(dice)), "missed": sum(s["missed"] for s in of_scan.values())}
        cells |= {"volume_coverage": coverage[row].get(structure, float("nan")), "scans": len(of_scan)}
        summary.append(cells)
    return summary


def best_of(scores: Rows) -> str:
    """The row of b, c, d with the highest mean Dice; b where none was run."""
    chosen = [s for s in scores if s["structure"] == "mean"]
    dice = {row: average([s["dice"] for s in chosen if s["row"] == row]) for row in OURS}
    return max(dice, key=lambda row: float(np.nan_to_num(dice[row], nan=-1.0)))


def budget(seconds: dict[str, float], most: int) -> str:
    """Prior + fit + segment (row d) against `most` seconds."""
    if missing := [stage for stage in BUDGET if stage not in seconds]:
        return f"Budget: not measured (no {', '.join(missing)})."
    total, parts = sum(seconds[s] for s in BUDGET), " + ".join(f"{seconds[s]:.0f}" for s in BUDGET)
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    verdict = "kept" if total <= most else "EXCEEDED"
    return f"Budget: prior + fit + segment = {parts} = {total:.0f} s of {most} s, {verdict} ({machine})."


def interval(cells: dict[str, Any], key: str, sign: str = "") -> str:
    """`0.781 [0.770, 0.792]`, or a dash."""
    mean, low, high = (cells[name] for name in (key, f"{key}_low", f"{key}_high"))
    return "–" if np.isnan(mean) else f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def dice_and_coverage(cells: dict[str, Any]) -> str:
    """`0.781 (69 %)`."""
    covered = cells["volume_coverage"]
    return f"{cells['dice']:.3f}" + ("" if np.isnan(covered) else f" ({covered:.0%})")


def difference(scores: Rows, row: str, other: str) -> str:
    """The paired difference of two rows' mean Dice, `+0.012 [+0.008, +0.018]`."""
    dice = {(s["row"], s["scan"]): (s["dice"], s["person"]) for s in scores if s["structure"] == "mean"}
    pairs = [(value, dice[other, scan][0], person) for (of, scan), (value, person) in dice.items() if of == row]
    own, others, persons = zip(*pairs, strict=True)
    mean, low, high = metrics.paired_difference_interval(own, others, persons)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def page(
    scores: Rows,
    summary: Rows,
    groups: Sequence[str],
    persons: Sequence[str],
    errors: dict[str, float],
    seconds: dict[str, float],
    most: int,
) -> str:
    """The page to read: a line a row, the comparisons that matter, a line a structure, seconds of each stage."""
    cells = {(s["row"], s["structure"]): s for s in summary}
    rows, best = list(dict.fromkeys(s["row"] for s in summary if s["structure"] == "mean")), best_of(summary)
    head = ["row", "Dice of", "mean [95 %]", "whole", "HD95 mm", "mean − (a) [95 %]", "worst scan"]
    alike = (rows[0], "alike") in cells
    head += ["mean of those drawn alike [95 %]"] if alike else []
    lines = [f"{len(persons)} scans of {len(set(persons))} persons; intervals by bootstrap over persons."]
    lines += ["", *heading(head)]
    for row in rows:
        mean, whole = cells[row, "mean"], cells[row, "whole"]
        texts = [row, METHODS[row], interval(mean, "dice"), f"{whole['dice']:.3f}", f"{mean['hd95_mm']:.2f}"]
        texts += [interval(mean, "gain", "+"), f"{mean['worst_dice']:.3f}"]
        lines.append(line([*texts, *([interval(cells[row, "alike"], "dice")] if alike else [])]))
    lines += ["", *heading(["structure: Dice (true volume in 5–95 %)", *rows])]
    lines += [line([name, *(dice_and_coverage(cells[row, name]) for row in rows)]) for name in groups]
    lines.append("")
    if best in rows:
        mean = cells[best, "mean"]
        lines.append(f"- Best of b–d: {best}, {mean['dice']:.3f}; minus (a): {interval(mean, 'gain', '+')}.")
        lines += [f"- {best} minus {row}: {difference(scores, best, row)}." for row in rows if row in PEERS]
        if "f" in rows:
            lines.append(f"- (f) minus {best}: {cells['f', 'mean']['dice'] - mean['dice']:+.3f}.")
    tissues = [tissue for tissue in TISSUES if any(s["structure"] == tissue for s in summary)]
    if tissues:
        both = unique(summary, "row")
        lines += ["", *heading(["Dice of tissues, outside of thalamus, pallidum, ventral DC and brain-stem", *both])]
        lines += [*(line([name, *(interval(cells[row, name], "dice") for row in both)]) for name in tissues), ""]
    for name, error in errors.items():
        lines.append(f"- Calibration error within {NEAR} voxels of the structures, {name}: {error:.3f}.")
    lines += [f"- {budget(seconds, most)}", "", "| stage | seconds |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:.1f} |" for name, value in seconds.items())]) + "\n"


def unique(rows: Rows, key: str) -> list[str]:
    """The values of a column, in order."""
    return list(dict.fromkeys(str(row[key]) for row in rows))


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def heading(cells: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(cells), "|---" * len(cells) + "|"]
