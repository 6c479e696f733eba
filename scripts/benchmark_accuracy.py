"""Accuracy on real scans with manual labels: the bare commands, timed, and Dice of every way to infer.

    python scripts/benchmark_accuracy.py --data DIR --set hippocampus --out OUT

DIR/SET holds prior/*_dseg.nii.gz, dev/scans/*_T1w.nii.gz, dev/truth/*_dseg.nii.gz, labels.tsv
(index, name) and groups.tsv (index, group). With --prior-maps the label maps of another protocol teach the prior: a
folder with prior/, labels.tsv and map.tsv (from, to), which brings their values to the set's. With --mask the scans'
own brain mask is made 2 mm smaller or larger (`mask_changes`). Other tools are rows, too, where asked for (`peers`).
Each stage works in OUT/<stage>; one that is done (done.json) is not run again, unless one it builds on was. Results:
summary.md, TSV tables and figures in OUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import xarray as xr
from benchmark_report import ALIKE, BUDGETS, METHODS, NEAR, Rows, average, best_of, page, summarise
from benchmark_volumes import agreement, box_baseline, box_of, retest, volumes_page
from mask_changes import CHANGES, write_changed
from peers import MIXED, PEERS, TISSUES, segment_by_peer
from scipy import ndimage
from stages import Stages

from ppl_seg import load_model
from ppl_seg.data import tables as label_tables
from ppl_seg.data.cohort import find_label_maps, find_scans
from ppl_seg.data.images import read_label_map, read_scan, write_image
from ppl_seg.data.names import match_files, output_location, parse_name
from ppl_seg.errors import InputError
from ppl_seg.files import write_text
from ppl_seg.results import charts, metrics
from ppl_seg.results.diagnostics import Reliability, reliability
from ppl_seg.results.tables import read_table, write_table

BY_API = {"0": ("recipe", "location"), "a": ("recipe", "location-em")}
BY_API |= {"e-f": ("readout", "decoder"), "e-r": ("readout", "marginals")}
REFINED = {"b": (), "c": ("--refine", "0"), "d": ()}  # what `segment` gets beside the model
TISSUES_ALONE = {"hmrf"}
STEPS = (0, 10, 20, 40, 80)
SETS: dict[str, tuple[str, ...]] = {"hippocampus": (), "oasis": ("--spacing", "2")}  # what `prior` gets beside --labels
Segmented = dict[Path, Path]  # scan -> its label map
Groups = dict[str, tuple[int, ...]]  # structure -> label values


@dataclass(frozen=True)
class Case:
    """A scan, its manual labels, whose scan it is, and of which visit."""

    scan: Path
    truth: Path
    person: str
    session: str


@dataclass
class Benchmark:
    """What all rows share."""

    stages: Stages
    scans: Path
    cases: list[Case]
    groups: Groups
    names: dict[str, list[str]]  # structure -> names that the prior may have for its labels
    boxes: dict[str, np.ndarray]  # structure -> what the scan's box says of its volume, see `box_baseline`
    prior: Path
    fit_options: list[str]
    segment_options: list[str]

    def label_map(self, folder: Path, case: Case) -> Path:
        """Where `segment --out folder` puts it."""
        below, stem = output_location(case.scan, self.scans)
        return folder / below / f"{stem}_dseg.nii.gz"

    def fit(self, name: str, *options: str, scans: Sequence[Path] = ()) -> Path:
        words: list[str | Path] = ["fit", *(scans or [self.scans]), "--prior", self.prior, *options]
        return self.stages.command(name, [*words, *self.fit_options], ["prior"])

    def segment(self, name: str, model: Path, *options: str, scans: Sequence[Path] = ()) -> Segmented:
        words: list[str | Path] = ["segment", *(scans or [self.scans]), "--model", model, *options]
        needs = ["prior", model.parent.name]
        folder = self.stages.command(f"segment-{name}", [*words, *self.segment_options], needs)
        cases = [case for case in self.cases if not scans or case.scan in scans]
        return {case.scan: self.label_map(folder, case) for case in cases}

    def segment_by_api(self, row: str) -> Segmented:
        """Rows that no command has: without a shape prior, and with z encoded from the true label map."""
        key, value = BY_API[row]
        encoded = key == "readout"  # z from the truth, the rest as in rows c and d where they were run
        source = "fit" if encoded and "fit" in self.stages.done else "prior"

        def work(part: Path) -> None:
            model = load_model(self.stages.out / source / "result")
            for case in self.cases:
                # without a shape all draws of z say the same
                options: dict[str, Any] = {key: value} | ({"shape_from": case.truth} if encoded else {"draws": 1})
                result = model.segment(case.scan, **options)
                write_image(self.label_map(part, case), result.label_map, result.image)

        command = ["Model.segment", source, f"{key}={value}", *(["shape_from=truth"] if encoded else [])]
        folder = self.stages.run(f"segment-{row}", command, [source], work)
        return {case.scan: self.label_map(folder, case) for case in self.cases}

    def segment_by_peer(self, peer: str) -> Segmented:
        """Another tool's label maps: a stage a scan, since one takes minutes."""
        found: Segmented = {}
        for case in self.cases:

            def work(part: Path, case: Case = case) -> None:
                values = segment_by_peer(peer, load_model(self.prior), case.scan)
                write_image(self.label_map(part, case), values, read_scan(case.scan))

            below, stem = output_location(case.scan, self.scans)
            name = "-".join(["segment", peer, *below.parts, stem])
            found[case.scan] = self.label_map(self.stages.run(name, [peer, str(case.scan)], ["prior"], work), case)
        return found

    def segment_row(self, row: str, best: str) -> Segmented:
        if row in BY_API:
            return self.segment_by_api(row)
        if row in PEERS:
            return self.segment_by_peer(row)
        if row == "n":
            model = self.fit("fit-n", "--recipe", "notes")
            return self.segment("n", model, "--readout", "decoder")  # the notes' own
        if row == "f":
            return self.segment_other_half("d" if best == "b" else best)
        base, end, _ = row.partition("-jensen")
        options = ("--objective", "jensen") if end else ()
        model = self.prior if base == "b" else self.fit(f"fit{end}", *options)
        return self.segment(row, model, *REFINED[base], *options)

    def segment_other_half(self, row: str) -> Segmented:
        """Fitted to half of the persons, the other half segmented, both ways."""
        persons = sorted({case.person for case in self.cases})
        halves = [[c.scan for c in self.cases if c.person in persons[half::2]] for half in (0, 1)]
        found: Segmented = {}
        for half in (0, 1):
            model = self.fit(f"fit-f{half}", scans=halves[half])
            found |= self.segment(f"f{half}-{row}", model, *REFINED[row], scans=halves[1 - half])
        return found

    def scores(self, row: str, found: Segmented) -> Rows:
        """A row a scan and structure, with means over all and over those ALIKE, and `whole`, all of them as one.

        Where they are known, tissues as well, outside of what is truly a mixture; of a peer that finds no more, alone.
        """
        rows: Rows = []
        everything = one_of(self.groups)
        tissues, mixed = tissues_of(self.groups)
        for case in self.cases:
            truth, path = read_label_map(case.truth), found[case.scan]
            labels = np.zeros_like(truth.data)  # what a failed scan gets
            if path.is_file():
                labels = np.asarray(nib.load(path).dataobj).astype(np.int32)
            pure = np.where(np.isin(truth.data, mixed), 0, labels)
            found_tissues = metrics.evaluate_pair(pure, truth.data, truth.affine, tissues) if tissues else []
            means = [mean_row(s["structure"], [s]) for s in found_tissues]
            scores: Rows = []
            if row not in TISSUES_ALONE:
                scores = metrics.evaluate_pair(labels, truth.data, truth.affine, self.groups)
                means += [mean_row("mean", scores), mean_row("alike", [s for s in scores if s["structure"] in ALIKE])]
                scores += metrics.evaluate_pair(labels, truth.data, truth.affine, everything)
            for s in scores:
                s["box_mm3"] = float(box_of(truth) @ self.boxes[s["structure"]])
            keys = {"row": row, "scan": case.scan.name, "person": case.person, "session": case.session}
            rows += [{**keys, **s} for s in (*scores, *filter(None, means))]
        return rows

    def volume_coverage(self, found: Segmented) -> dict[str, float]:
        """Structure -> share of scans whose true volume is in the draws' 5–95 % interval (0.9 is wanted)."""
        inside: dict[str, list[bool]] = {name: [] for name in self.groups}
        for case in self.cases:
            path = found[case.scan]
            posterior = path.with_name(path.name.replace("_dseg.nii.gz", "_posterior.nc"))
            if not posterior.is_file():
                continue
            truth = read_label_map(case.truth)
            with xr.open_dataset(posterior, group="posterior", engine="h5netcdf") as data:
                known = set(data["structure"].values.tolist())
                for name, values in self.groups.items():
                    parts = [part for part in self.names[name] if part in known]
                    draws = data["volume"].sel(structure=parts).sum("structure").values
                    low, high = np.quantile(draws, [0.05, 0.95])
                    volume = np.isin(truth.data, values).sum() * truth.voxel_volume
                    inside[name].append(bool(low <= volume <= high))
        return {name: float(np.mean(hits)) for name, hits in inside.items() if hits}

    def spread(self, count: int) -> list[Case]:
        """So many cases, evenly over the set."""
        places = np.linspace(0, len(self.cases) - 1, min(count, len(self.cases)))
        return [self.cases[int(place)] for place in np.unique(places.round())]

    def dice_by_step(self, fit: str, figure: Path) -> None:
        """Mean Dice and the bound of eight scans against the number of refinement steps."""
        columns = ("scan", "step", "dice", "bound_per_voxel")

        def work(part: Path) -> None:
            model = load_model(self.stages.out / fit / "result")
            rows: Rows = []
            for case in self.spread(8):
                truth = read_label_map(case.truth)
                for steps in STEPS:
                    result = model.segment(case.scan, refine=steps)
                    scores = metrics.evaluate_pair(result.label_map, truth.data, truth.affine, self.groups)
                    values = (parse_name(case.scan).stem, steps, average([s["dice"] for s in scores]))
                    bound = f"{bound_of(result):.8g}"
                    rows.append(dict(zip(columns, (*values, bound), strict=True)))
            write_table(part / "steps.tsv", rows)

        folder = self.stages.run(f"steps-{fit}", ["Model.segment", f"refine in {STEPS}"], [fit], work)
        table = read_table(folder / "steps.tsv")
        scans = dict.fromkeys(row["scan"] for row in table)
        dice, bound = (
            {scan: (STEPS, [float(row[key]) for row in table if row["scan"] == scan]) for scan in scans}
            for key in columns[2:]
        )
        charts.dice_steps_figure(dice, bound, figure, "Refinement of q(z|x)")

    def reliability(self, fit: str) -> Reliability:
        """Label marginals of ten scans against the truth, near the structures."""

        def work(part: Path) -> None:
            model, curves = load_model(self.stages.out / fit / "result"), []
            for case in self.spread(10):
                result = model.segment(case.scan, keep_probabilities=True)
                assert result.probabilities is not None
                truth = result.table.to_positions(read_label_map(case.truth).data, case.truth)
                near = ndimage.binary_dilation((truth > 0) | (result.label_map > 0), iterations=NEAR)
                curves.append(reliability(result.probabilities, truth, near))
            np.savez(part / "curve.npz", **vars(sum(curves[1:], curves[0])))

        folder = self.stages.run(f"reliability-{fit}", ["Model.segment", f"near={NEAR}"], [fit], work)
        with np.load(folder / "curve.npz") as stored:
            return Reliability(**dict(stored))


def tissues_of(groups: Groups) -> tuple[Groups, list[int]]:
    """Tissue -> label values, where all of its structures are known, and the values of what is of several."""
    known = {tissue: names for tissue, names in TISSUES.items() if set(names) <= set(groups)}
    merged = {tissue: tuple(v for name in names for v in groups[name]) for tissue, names in known.items()}
    return merged, [value for name in MIXED for value in groups.get(name, ())]


def one_of(groups: Groups) -> Groups:
    """All structures as one."""
    return {"whole": tuple(value for values in groups.values() for value in values)}


def mean_row(name: str, scores: Rows) -> dict[str, Any]:
    """The mean of some structures' rows, or nothing of none. A mean has no volume."""
    if not scores:
        return {}
    mean = {key: average([s[key] for s in scores]) for key in ("dice", "hd95_mm", "asd_mm")}
    return {"structure": name, **mean, "missed": sum(s["missed"] for s in scores)}


def bound_of(result: Any) -> float:
    """The bound that z was inferred with, per observed voxel of the grid."""
    return float(result.bound["bound"]) / int(result.observed.any(0).sum())


def read_cases(folder: Path) -> list[Case]:
    """Scans of dev/scans with their label maps in dev/truth."""
    scans = [(found.path, found.base) for found in find_scans([folder / "dev" / "scans"])]
    truths = [(found.path, found.base) for found in find_label_maps([folder / "dev" / "truth"])]
    pairs, alone, _ = match_files(scans, truths)
    if alone:
        raise InputError(f"{alone[0]}: no label map in {folder / 'dev' / 'truth'} matches it")
    entities = [parse_name(scan).entities for scan, _ in pairs]
    return [
        Case(scan, truth, of.get("sub", scan.name), of.get("ses", ""))
        for (scan, truth), of in zip(pairs, entities, strict=True)
    ]


def open_benchmark(arguments: argparse.Namespace) -> Benchmark:
    """Read what is there, and learn the prior."""
    data, stages = (arguments.data / arguments.set).resolve(), Stages(arguments.out.resolve())
    cases, groups = read_cases(data), label_tables.read_groups(data / "groups.tsv")
    source = data if arguments.prior_maps is None else arguments.prior_maps.resolve()
    table = label_tables.read_table(source / "labels.tsv")
    known = dict(zip(table.indices.tolist(), table.names, strict=True))
    names = {group: [known[value] for value in values if value in known] for group, values in groups.items()}
    mapped = ["--map", source / "map.tsv"] if arguments.prior_maps is not None else []
    numbers = (("--steps", arguments.prior_steps), ("--steps", arguments.fit_steps), ("--draws", arguments.draws))
    for_prior, for_fit, for_segment = ([] if number is None else [name, str(number)] for name, number in numbers)
    if arguments.label_steps:
        for_prior += ["--label-steps", str(arguments.label_steps), "--precision", "bf16"]
    words = ["prior", source / "prior", "--labels", source / "labels.tsv", *mapped, *SETS[arguments.set], *for_prior]
    prior = stages.command("prior", words)
    boxes = box_baseline(data / "prior", groups | one_of(groups))
    scans = data / "dev" / "scans"
    if arguments.mask != "given":
        scans, cases = change_masks(stages, cases, groups, arguments.mask)
    return Benchmark(stages, scans, cases, groups, names, boxes, prior, for_fit, for_segment)


def change_masks(stages: Stages, cases: list[Case], groups: Groups, change: str) -> tuple[Path, list[Case]]:
    """The scans with another mask, in a stage's folder, and the cases of these."""

    def work(part: Path) -> None:
        for case in cases:
            write_changed(case.scan, case.truth, groups, change, part)

    folder = stages.run(f"scans-{change}", ["change_mask", change], [], work)
    return folder, [replace(case, scan=folder / case.scan.name) for case in cases]


def run(arguments: argparse.Namespace) -> None:
    bench, out = open_benchmark(arguments), arguments.out
    scores: Rows = []
    coverage: dict[str, dict[str, float]] = {}
    for row in METHODS:
        base, jensen, _ = row.partition("-jensen")
        if base in arguments.rows and (arguments.jensen or not jensen):
            found = bench.segment_row(row, best_of(scores))
            scores += bench.scores(row, found)
            coverage[row] = bench.volume_coverage(found)
    summary = summarise(scores, coverage)
    write_table(out / "scores.tsv", scores)
    write_table(out / "summary.tsv", summary)
    renamed = {"measure": "structure", "mean": "dice", "low": "dice_low", "high": "dice_high"}
    bars = [{new: s[old] for new, old in renamed.items()} for s in summary]
    bars = [{**bar, "method": f"({s['row']}) {s['method']}"} for bar, s in zip(bars, summary, strict=True)]
    charts.benchmark_figure(bars, out / "benchmark.png")
    curves: dict[str, Reliability] = {}
    for fit, objective in (("fit", "marginal"), ("fit-jensen", "jensen")):
        if fit in bench.stages.done and arguments.curves:
            bench.dice_by_step(fit, out / f"steps_{objective}.png")
            curves[objective] = bench.reliability(fit)
    if curves:
        title = f"Label marginals within {NEAR} voxels of the structures"
        charts.reliability_figure(curves, out / "reliability.png", title)
    errors = {name: curve.expected_calibration_error for name, curve in curves.items()}
    seconds = {name: float(record["seconds"]) for name, record in bench.stages.done.items()}
    persons, most = [case.person for case in bench.cases], BUDGETS[arguments.set]
    retested, agreed = retest(scores), agreement(scores)
    write_table(out / "volumes.tsv", agreed)
    if retested:
        write_table(out / "retest.tsv", retested)
    text = page(scores, summary, list(bench.groups), persons, errors, seconds, most) + volumes_page(retested, agreed)
    write_text(out / "summary.md", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the set")
    parser.add_argument("--set", choices=tuple(SETS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prior-maps", type=Path, help="folder whose prior/ teaches, with labels.tsv and map.tsv")
    parser.add_argument("--mask", choices=("given", *CHANGES), default="given", help="of brain-extracted scans")
    choice = [row for row in METHODS if not row.endswith("-jensen")]
    usual = ",".join(row for row in choice if row not in PEERS)
    parser.add_argument("--rows", default=usual, help=f"default: %(default)s; other tools: {', '.join(PEERS)}")
    parser.add_argument("--jensen", action=argparse.BooleanOptionalAction, default=True, help="b, c, d; or --no-jensen")
    curves = "Dice by refinement step, and calibration: 50 segmentations; or --no-curves"
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True, help=curves)
    asleep = "steps of `prior`'s label guide, in bf16; default: none"
    parser.add_argument("--label-steps", type=int, default=0, help=asleep)
    parser.add_argument("--prior-steps", type=int, help="for a quick try: steps of `prior`")
    parser.add_argument("--fit-steps", type=int, help="for a quick try: steps of `fit`")
    parser.add_argument("--draws", type=int, help="for a quick try: draws of `segment`")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows.split(",")
    if unknown := set(arguments.rows) - set(choice):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; choose among {', '.join(choice)}")
    try:
        run(arguments)
    except InputError as error:
        sys.exit(f"benchmark_accuracy: {error}")


if __name__ == "__main__":
    main()
