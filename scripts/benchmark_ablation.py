"""What each part of the default recipe is worth: per-scan inference with one of them changed at a time.

    python scripts/benchmark_ablation.py --data DIR --set oasis --out OUT

The data are those of `benchmark_accuracy.py`, whose prior in OUT/prior is used where it is there. Results: ablation.md
and ablation.tsv in OUT, differences to the whole recipe paired over persons.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmark_accuracy import SETS, Benchmark, open_benchmark
from benchmark_report import Rows, heading, interval, line

from ppl_seg import load_model
from ppl_seg.api.model import Model
from ppl_seg.data.images import write_image
from ppl_seg.errors import InputError
from ppl_seg.files import write_text
from ppl_seg.inference.recipes import Recipe, build_recipe
from ppl_seg.models.intensity import PseudoCounts
from ppl_seg.results import metrics
from ppl_seg.results.tables import write_table

Change = Callable[[Recipe], Recipe]
WHOLE = "the whole recipe"
CHANGES: dict[str, Change] = {
    WHOLE: lambda recipe: recipe,
    "no shape: the location prior": lambda recipe: replace(recipe, shape="location", maps=None, per_scan_steps=0),
    "one strength of deformation": lambda recipe: replace(recipe, strengths=(1.0,)),
    "no prior of the Gaussians' width": lambda recipe: replace(recipe, pseudo=PseudoCounts()),
    "one Gaussian a class": lambda recipe: replace(recipe, components=1, fluid_components=1),
    "the mask is no observation": lambda recipe: replace(recipe, mask_background=1.0, mask_fluid=1.0),
    "all of p(x|s) is read out, κ = 1": lambda recipe: replace(recipe, readout_power=1.0),
    "voxels are independent, β = 1": lambda recipe: replace(recipe, likelihood_power=1.0),
    "constant background weights": lambda recipe: replace(recipe, maps=None),
    "weights are the same everywhere": lambda recipe: replace(recipe, local_blur=0.0),
    "fluid shares no voxels": lambda recipe: replace(recipe, partial_volume=False),
    "no outliers": lambda recipe: replace(recipe, outliers=0.0),
    "everyone's template": lambda recipe: replace(recipe, fusion_power=0.0),
}


@dataclass
class Changed(Model):
    """A model whose recipe is changed after it was adapted to the field of view."""

    change: Change = field(default=CHANGES[WHOLE])

    def adapted_recipe(self, recipe: Recipe) -> Recipe:
        return self.change(super().adapted_recipe(recipe))


def score(bench: Benchmark, name: str, change: Change, draws: int) -> Rows:
    """Mean Dice of each scan, segmented from the prior with the changed recipe."""

    def work(part: Path) -> None:
        model = Changed(**vars(load_model(bench.prior)), change=change)
        for case in bench.cases:
            result = model.segment(case.scan, draws=draws)
            write_image(bench.label_map(part, case), result.label_map, result.image)

    stage = f"ablation-{list(CHANGES).index(name)}"
    folder = bench.stages.run(stage, ["Model.segment", name, f"draws={draws}"], ["prior"], work)
    found = {case.scan: bench.label_map(folder, case) for case in bench.cases}
    means = [row for row in bench.scores("b", found) if row["structure"] == "mean"]
    return [{**row, "change": name} for row in means]


def compare(rows: Rows) -> Rows:
    """Of each change the mean, the paired difference to the whole recipe, and the worst scan; 95 % over persons."""
    table: Rows = []
    whole = [row["dice"] for row in rows if row["change"] == WHOLE]
    for name in dict.fromkeys(row["change"] for row in rows):
        own = [row for row in rows if row["change"] == name]
        dice, persons = [row["dice"] for row in own], [row["person"] for row in own]
        cells: dict[str, Any] = {"change": name, "scans": len(own), "worst_dice": min(dice)}
        for key, (mean, low, high) in (
            ("dice", metrics.bootstrap_interval(dice, persons)),
            ("difference", metrics.paired_difference_interval(dice, whole, persons)),
        ):
            cells |= {key: mean, f"{key}_low": low, f"{key}_high": high}
        table.append(cells)
    return table


def page(table: Rows) -> str:
    """The table to read."""
    lines = heading(["change", "mean Dice [95 %]", "difference [95 %]", "worst scan"])
    for cells in table:
        difference = "" if cells["change"] == WHOLE else interval(cells, "difference", "+")
        lines.append(line([cells["change"], interval(cells, "dice"), difference, f"{cells['worst_dice']:.3f}"]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the set")
    parser.add_argument("--set", choices=tuple(SETS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--prior-steps", type=int, help="for a quick try: steps of `prior`")
    arguments = parser.parse_args()
    vars(arguments).update(prior_maps=None, mask="given", fit_steps=None, label_steps=0)
    try:
        bench = open_benchmark(arguments)
        usual = load_model(bench.prior).adapted_recipe(build_recipe("default"))
        apart = {name: change for name, change in CHANGES.items() if name == WHOLE or change(usual) != usual}
        rows = [row for name, change in apart.items() for row in score(bench, name, change, arguments.draws)]
    except InputError as error:
        sys.exit(f"benchmark_ablation: {error}")
    table = compare(rows)
    write_table(arguments.out / "ablation.tsv", table)
    write_text(arguments.out / "ablation.md", page(table))
    print(page(table))


if __name__ == "__main__":
    main()
