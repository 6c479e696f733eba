"""What the demo shows: the table of Dice on screen, and the pictures."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ppl_seg.api import Model
from ppl_seg.data.images import read_label_map
from ppl_seg.demo_population import PopulationFiles
from ppl_seg.demo_template import STRUCTURES
from ppl_seg.results.charts import benchmark_figure, reliability_figure
from ppl_seg.results.diagnostics import Reliability
from ppl_seg.results.figures import draws_figure
from ppl_seg.results.metrics import bootstrap_interval, paired_difference_interval

HONEST = (
    "These subjects are simulated: one template, deformed at random, with invented intensities. "
    "The numbers compare ways to infer; they say nothing about real scans."
)
SHOWN_SHAPES, SHOWN_DRAWS = 8, 5  # columns of the figures of draws
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

    width = {way: 3 + max(map(len, title.split("\n"))) for way, title in titles.items()}
    first = 4 + max(len(str(row["structure"])) for row in rows)
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
        Console(width=max(room, first)).print(table)


def write_figures(
    out: Path, models: Mapping[str, Model], population: PopulationFiles, segmentations: Path, seed: int
) -> None:
    """figures/: qc, prior_draws, segmentation_draws, training_prior, training_fit.

    Args:
        models: prior and fit. population: draws are of its first scan. segmentations: a folder of `segment_scans`.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(sorted(segmentations.rglob("*_qc.png"))[0], folder / "qc.png")
    for name in ("prior", "fit"):
        shutil.copyfile(out / name / "training.png", folder / f"training_{name}.png")
    prior = models["prior"]
    with torch.no_grad():
        z = torch.randn(SHOWN_SHAPES, prior.shape_prior.latent_dim, generator=torch.Generator().manual_seed(seed))
        likeliest = prior.shape_prior.label_logits(z).argmax(1).numpy()
    title = "Shapes drawn from the prior: the likeliest label given z"
    draws_figure(likeliest, prior.table, prior.grid.affine, folder / "prior_draws.png", title)
    result = models["fit"].segment(population.scans[0], draws=SHOWN_DRAWS, keep_draws=True, seed=seed)
    assert result.draws is not None
    maps = np.stack([read_label_map(population.truth[0]).data, result.label_map, *result.draws])
    names = ["truth", "segmentation", *(f"draw {number + 1}" for number in range(SHOWN_DRAWS))]
    draws_figure(
        np.asarray(result.table.to_positions(maps)),
        result.table,
        result.image.affine,
        folder / "segmentation_draws.png",
        "One simulated person: whole segmentations drawn from the posterior",
        names=names,
    )


def write_score_figures(
    out: Path, scores: Mapping[str, Scores], curves: Mapping[str, Reliability], titles: Mapping[str, str]
) -> None:
    """figures/: dice, reliability. curves: of the ways to be shown."""
    plain = {way: title.replace("\n", " ") for way, title in titles.items()}
    bars = []
    for way, found in scores.items():
        persons = list(dict.fromkeys(str(row["person"]) for row in found))
        by_person = [dice_rows({way: [row for row in found if row["person"] == person]}) for person in persons]
        for rows in zip(*by_person, strict=True):
            interval = bootstrap_interval([float(row[way]) for row in rows], persons)
            bars.append({"method": plain[way], "measure": str(rows[0]["structure"]), **interval._asdict()})
    bars.sort(key=lambda bar: bar["measure"] != "mean")
    benchmark_figure(bars, out / "figures" / "dice.png", "Dice, simulated persons")
    named = {plain[way]: curve for way, curve in curves.items()}
    reliability_figure(named, out / "figures" / "reliability.png", "Label marginals in simulated brains")


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
