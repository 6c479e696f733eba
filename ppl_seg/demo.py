"""The demo: a simulated population, and on it all that the commands do, every way to segment scored against the truth.

Needs no data of the user: the persons are made from the one template that the nilearn package carries.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ppl_seg.api import Model, evaluate, fit_scans, learn_prior, segment_scans
from ppl_seg.data.images import read_label_map, read_scan, write_image
from ppl_seg.data.names import output_location
from ppl_seg.demo_population import PopulationFiles, write_population
from ppl_seg.demo_report import (
    HONEST,
    Scores,
    dice_rows,
    gain_line,
    print_table,
    read_probabilities,
    write_figures,
    write_score_figures,
)
from ppl_seg.errors import InputError
from ppl_seg.files import write_text
from ppl_seg.results.diagnostics import Reliability, reliability
from ppl_seg.results.tables import write_table

MARKER = "README.txt"  # of a folder that a demo made and may empty
FOLDERS = ("population", "prior", "fit", "fit-jensen", "notes", "segmentations", "figures")


@dataclass(frozen=True)
class Size:
    """How large the demo is: smaller than the commands' defaults, to end within minutes on two cores.

    persons, scans: label maps for the prior; scans, of other persons. spacing: mm. latent_dim: D.
    prior_steps, fit_steps: of training. refine: gradient steps per scan, None for the recipe's.
    draws: of z behind the label marginals; all_draws: of the way that is written in full.
    """

    persons: int = 24
    scans: int = 8
    spacing: float = 4.0
    latent_dim: int = 16
    prior_steps: int = 300
    fit_steps: int = 50
    refine: int | None = None
    draws: int = 20
    all_draws: int = 200


FULL = Size()
SMOKE = Size(4, 2, 8.0, latent_dim=4, prior_steps=4, fit_steps=3, refine=2, draws=3, all_draws=6)


@dataclass(frozen=True)
class Way:
    """One way to segment, a column of the table. model: whose. options: of `Model.segment`."""

    name: str
    title: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("location", "location\nprior", "prior", {"recipe": "location", "draws": 1}),
    Way("location-em", "location\n+ EM", "prior", {"recipe": "location-em", "draws": 1}),
    Way("notes", "recipe\nnotes", "notes"),
    Way("per-scan", "per-scan\nmarginal", "prior"),
    Way("per-scan-jensen", "per-scan\njensen", "prior", {"objective": "jensen"}),
    Way("amortised", "amortised\nmarginal", "fit", {"refine": 0}),
    Way("amortised-jensen", "amortised\njensen", "fit-jensen", {"refine": 0}),
    Way("refined", "refined\nmarginal", "fit"),
    Way("refined-jensen", "refined\njensen", "fit-jensen"),
)
BASELINE, BEST = "location-em", "refined"
CALIBRATION = ("location-em", "per-scan", "refined", "refined-jensen")  # curves of the reliability diagram


def run(out: str | Path, *, seed: int = 0, smoke: bool = False) -> list[dict[str, Any]]:
    """Simulate a population below `out`, learn a prior, fit, segment, evaluate; print one table of Dice.

    Writes population/, prior/, fit/, fit-jensen/, notes/ (models), segmentations/ (a folder a way), figures/ and
    table.tsv.

    Args:
        seed: of the population and of everything after it. smoke: all of it tiny, to see that it runs.

    Returns:
        The rows of table.tsv: a structure each and their mean, a column a way.

    Raises:
        InputError: `out` holds something else than an earlier demo.
    """
    out, size, began = Path(out), SMOKE if smoke else FULL, time.monotonic()
    claim(out)
    print(HONEST, flush=True)
    with stage(f"population: {size.persons} label maps, {size.scans} scans of other persons"):
        population = write_population(out / "population", size.persons, size.scans, size.spacing, seed)
    models = learn(population, out, size, seed)
    scores: dict[str, Scores] = {}
    curves: dict[str, Reliability] = {}
    for way in WAYS:
        with stage(f"segment, evaluate: {way.title.replace(chr(10), ' ')}"):
            folder = out / "segmentations" / way.name
            curves[way.name] = segment(way, models[way.model], population, folder, size, seed)
            truth = out / "population" / "truth"
            scores[way.name] = evaluate(folder, truth, labels=population.table, out=folder / "scores.tsv").rows
    rows = dice_rows(scores)
    write_table(out / "table.tsv", rows)
    titles = {way.name: way.title for way in WAYS}
    with stage("figures"):
        write_figures(out, models, population, out / "segmentations" / BEST, seed)
        write_score_figures(out, scores, {name: curves[name] for name in CALIBRATION}, titles)
    print_table(rows, titles)
    for name in ("per-scan", BEST):
        print(gain_line(name, scores[name], scores[BASELINE], "location + EM"))
    print(f"{HONEST}\n{time.monotonic() - began:.0f} s in all. Results: {out}, pictures: {out / 'figures'}", flush=True)
    return rows


def claim(out: Path) -> None:
    """Make the folder; empty it where an earlier demo made it.

    Raises:
        InputError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file where the demo's folder is expected; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise InputError(f"{out}: holds files that are no demo's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARKER, f"Made by ppl-seg demo, which empties this folder when it is run again.\n{HONEST}\n")
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say on stderr how long the work took."""
    began = time.monotonic()
    yield
    line = f"{time.monotonic() - began:6.1f} s  {name}"
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def learn(population: PopulationFiles, out: Path, size: Size, seed: int) -> dict[str, Model]:
    """The prior, and on it the default fit, the same with Jensen's bound, and the notes' own model."""
    with stage(f"prior: {size.prior_steps} steps"):
        prior = learn_prior(
            population.label_maps,
            out=out / "prior",
            labels=population.table,
            align="none",
            latent_dim=size.latent_dim,
            steps=size.prior_steps,
            seed=seed,
        )
    models = {"prior": prior}
    fits: dict[str, dict[str, Any]] = {"fit": {}, "fit-jensen": {"objective": "jensen"}, "notes": {"recipe": "notes"}}
    for name, options in fits.items():
        with stage(f"{name}: {size.fit_steps} steps"):
            models[name] = fit_scans(
                population.scans,
                prior=prior,
                out=out / name,
                steps=size.fit_steps,
                label_rounds=0,  # some minutes more
                seed=seed,
                **options,
            )
    return models


def segment(way: Way, model: Model, population: PopulationFiles, folder: Path, size: Size, seed: int) -> Reliability:
    """Write the label maps of all scans, for the best way all files of the command; how reliable the marginals are."""
    draws = size.all_draws if way.name == BEST else size.draws
    options = {"draws": draws, "refine": size.refine, "seed": seed, **way.options}
    base = population.scans[0].parent
    if way.name == BEST:
        report = segment_scans([base], model=model, out=folder, probabilities=True, **options)
        if report.exit_code:
            raise RuntimeError(f"segmentation failed: {report.rows}")
    curves = []
    for scan, true in zip(population.scans, population.truth, strict=True):
        below, stem = output_location(scan, base)
        if way.name == BEST:
            probabilities = read_probabilities(folder / below / f"{stem}_probseg.nii.gz")
        else:
            result = model.segment(scan, keep_probabilities=True, **options)
            write_image(folder / below / f"{stem}_dseg.nii.gz", result.label_map, result.image)
            assert result.probabilities is not None
            probabilities = result.probabilities
        truth = model.table.to_positions(read_label_map(true).data)
        # of easy background only what a brain extraction leaves
        curves.append(reliability(probabilities, truth, read_scan(scan).data > 0))
    return sum(curves[1:], curves[0])
