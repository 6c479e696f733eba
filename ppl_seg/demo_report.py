"""What the demo shows: the table of Dice on screen, and the pictures."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ppl_seg.api import Model
from ppl_seg.demo_template import STRUCTURES
from ppl_seg.results.charts import reliability_figure
from ppl_seg.results.diagnostics import Reliability
from ppl_seg.results.figures import draws_figure
from ppl_seg.results.metrics import paired_difference_interval

HONEST = (
    "These subjects are simulated: one template, deformed at random, with invented intensities. "
    "The numbers compare ways to infer; they say nothing about real scans."
)
SHOWN_DRAWS = 6
Scores = Sequence[Mapping[str, Any]]  # rows of `evaluate`


def structure_of(name: str) -> str:
    """`Left-Cerebral-White-Matter` as `Cerebral White Matter`: without its side."""
    return name.removeprefix("Left-").removeprefix("Right-").replace("-", " ")


def dice_rows(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """A row a structure, left and right averaged, and their mean last; a column a way, means over scans.

    A structure that is absent in a scan's truth and segmentation (Dice NaN) is left out of its mean.
    """
    names = list(dict.fromkeys(structure_of(structure.name) for structure in STRUCTURES))
    rows: list[dict[str, Any]] = [{"structure": name} for name in [*names, "mean"]]
    for way, found in scores.items():
        for row in rows[:-1]:
            values = [float(r["dice"]) for r in found if structure_of(str(r["structure"])) == row["structure"]]
            row[way] = _mean(values)
        rows[-1][way] = _mean([float(row[way]) for row in rows[:-1]])
    return rows


def gain_line(way: str, scores: Scores, baseline: Scores, name: str) -> str:
    """Difference of the mean Dice to a baseline, with its 95 % interval over persons."""
    ours, theirs = _mean_by_person(scores), _mean_by_person(baseline)
    persons = sorted(ours)
    gain = paired_difference_interval([ours[p] for p in persons], [theirs[p] for p in persons], persons)
    text = f"mean Dice {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] over {len(persons)} simulated persons"
    return f"{way} against {name}: {text}"


def print_table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> None:
    """The table on stdout, best of each row in bold; split into two where the terminal is narrow.

    Args:
        rows: of `dice_rows`. titles: way -> heading, a word a line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = {way: 2 + max(map(len, title.split("\n"))) for way, title in titles.items()}
    first = 2 + max(len(str(row["structure"])) for row in rows)
    console = Console()
    room = console.width if console.is_terminal else first + sum(width.values())
    groups: list[list[str]] = [[]]
    for way in titles:
        if groups[-1] and first + sum(width[w] for w in [*groups[-1], way]) > room:
            groups.append([])
        groups[-1].append(way)
    for group in groups:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title="Dice, mean over simulated persons and both sides")
        table.add_column("structure", no_wrap=True)
        for way in group:
            table.add_column(titles[way], justify="right", no_wrap=True)
        for row in rows:
            best = max((float(row[way]) for way in titles if not math.isnan(row[way])), default=math.nan)
            cells = [_cell(float(row[way]), best) for way in group]
            table.add_row(str(row["structure"]), *cells, end_section=row is rows[-2])
        Console(width=room + 2).print(table)


def write_figures(
    out: Path, model: Model, scan: Path, segmentations: Path, curves: Mapping[str, Reliability], seed: int
) -> None:
    """figures/: qc, prior_draws, segmentation_draws, training_prior, training_fit, reliability, all PNG.

    Args:
        model: a fit, of which draws for `scan` are shown. segmentations: a folder of `segment_scans`.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(sorted(segmentations.rglob("*_qc.png"))[0], folder / "qc.png")
    shutil.copyfile(out / "prior" / "draws.png", folder / "prior_draws.png")
    for name in ("prior", "fit"):
        shutil.copyfile(out / name / "training.png", folder / f"training_{name}.png")
    result = model.segment(scan, draws=SHOWN_DRAWS, keep_draws=True, seed=seed)
    assert result.draws is not None
    maps = np.asarray(result.table.to_positions(result.draws))
    title = "One scan's segmentation, drawn from its posterior"
    draws_figure(maps, result.table, result.image.affine, folder / "segmentation_draws.png", title)
    reliability_figure(curves, folder / "reliability.png", "Label marginals inside the brain")


def read_probabilities(path: Path) -> np.ndarray:
    """Label marginals (M, X, Y, Z) of a STEM_probseg.nii.gz."""
    image = nib.load(path)  # type: ignore[attr-defined]
    return np.moveaxis(np.asarray(image.dataobj, np.float32), -1, 0)  # type: ignore[attr-defined]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _mean_by_person(scores: Scores) -> dict[str, float]:
    persons = dict.fromkeys(str(row["person"]) for row in scores)
    return {p: float(dice_rows({"way": [r for r in scores if r["person"] == p]})[-1]["way"]) for p in persons}


def _cell(value: float, best: float) -> str:
    if math.isnan(value):
        return ""
    return f"[bold]{value:.3f}[/bold]" if round(value, 3) == round(best, 3) else f"{value:.3f}"
