"""Accuracy in contrasts that nothing was taught: simulated whole heads, and real brains whose contrasts must agree.

    python scripts/benchmark_contrasts.py --data DIR --set heads --out OUT
    python scripts/benchmark_contrasts.py --data DIR --set brains --out OUT

DIR holds head_labels (prior/*_dseg.nii.gz, dev/*_dseg.nii.gz, labels.tsv, map.tsv: from, to), oasis/groups.tsv (index,
group: the structures, in map.tsv's values) and, for brains, openms (see `contrast_agreement`).

heads: the label maps of head_labels/prior teach a prior of whole heads; those of head_labels/dev become scans
(`simulation`): T1-, T2- and FLAIR-like ones and some of random brightness, in voxels of the map; the named ones also
in slices of three. Each is segmented by the bare command, or the recipes of --recipes, and scored in its own voxels
against the map it was made from; in thick slices, the commonest label of three voxels. All scans are named T1w, which
nothing looks at. What is done is not done again. Results: dice.tsv, summary.md, scans, label maps and pictures in OUT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from benchmark_report import Rows, average, heading, line, unique
from contrast_agreement import run_brains
from contrast_runs import Options, dice_of
from simulation import (
    CONTRASTS,
    acquire,
    named_brightness,
    random_brightness,
    thick_affine,
    thick_labels,
    thick_slices,
)

from ppl_seg.data.cohort import find_label_maps
from ppl_seg.data.images import Image, read_label_map, write_image
from ppl_seg.data.names import parse_name
from ppl_seg.data.tables import read_table
from ppl_seg.errors import InputError
from ppl_seg.files import write_text
from ppl_seg.inference.recipes import RECIPES
from ppl_seg.results.tables import write_table

THICK = "thick"
CHOICE = ("t1", "t2", "flair", "random1", "random2", "t2thick", "flairthick", "t1thick")
BASE = "t1"  # what the others are compared with


def simulate_head(labels: Image, contrast: str, seed: int, options: Options) -> tuple[Image, Image]:
    """A scan of a head's label map in one of CHOICE, and the label map in the scan's voxels."""
    table = read_table(options.maps / "labels.tsv")
    generator = np.random.default_rng([seed, CHOICE.index(contrast)])
    named = CONTRASTS.get(contrast.removesuffix(THICK))
    brightness = random_brightness(table, generator) if named is None else named_brightness(table, named, generator)
    values, truth, affine = brightness[table.to_positions(labels.data, labels.path)], labels.data, labels.affine
    if contrast.endswith(THICK):
        axis = int(np.argmax(np.abs(affine[2, :3])))  # head to foot
        values, truth, affine = thick_slices(values, axis), thick_labels(truth, axis), thick_affine(affine, axis)
    header = nib.Nifti1Image(truth, affine).header  # says where the voxels lie
    found = Image(truth, affine, labels.path, header)
    return Image(acquire(values, found.spacing, generator), affine, labels.path, header), found


def simulate_all(options: Options) -> None:
    """OUT/scans and OUT/truth, where they are not there yet."""
    for seed, source in enumerate(find_label_maps([options.maps / "dev"])):
        person = parse_name(source.path).entities.get("sub", parse_name(source.path).stem)
        labels = read_label_map(source.path)
        for contrast in options.contrasts:
            stem = f"sub-{person}_acq-{contrast}"
            scan, truth = (options.out / f"scans/{stem}_T1w.nii.gz", options.out / f"truth/{stem}_dseg.nii.gz")
            if not (scan.is_file() and truth.is_file()):
                for path, image in zip((scan, truth), simulate_head(labels, contrast, seed, options), strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_image(path, image.data, image)


def score_heads(options: Options, recipe: str) -> Rows:
    """Dice of each scan and structure under a recipe; 0 where it failed."""
    model, structures = options.prior("prior-heads", mapped=False), options.structures()
    rows: Rows = []
    for scan, path in options.segment(model, options.out / "scans", f"segment-{recipe}", recipe).items():
        entities = parse_name(scan.path).entities
        truth = read_label_map(options.out / "truth" / f"sub-{entities['sub']}_acq-{entities['acq']}_dseg.nii.gz").data
        labels = np.asarray(nib.load(path).dataobj) if path.is_file() else np.zeros_like(truth)
        keys = {"recipe": recipe, "subject": entities["sub"], "contrast": entities["acq"]}
        dice = dice_of(labels, truth, structures)
        rows += [{**keys, "structure": name, "dice": value} for name, value in dice.items()]
    return rows


def heads_page(rows: Rows) -> str:
    """Mean Dice by subject and contrast, its difference to BASE, and Dice by structure and contrast."""
    contrasts = [name for name in CHOICE if name in unique(rows, "contrast")]
    lines: list[str] = []
    for recipe in unique(rows, "recipe"):
        own = [row for row in rows if row["recipe"] == recipe]
        subjects, names = unique(own, "subject"), unique(own, "structure")
        dice = {(row["subject"], row["contrast"], row["structure"]): row["dice"] for row in own}
        mean = {(s, c): average([dice[s, c, name] for name in names]) for s in subjects for c in contrasts}
        lines += [f"## {recipe}", "", *heading([f"mean Dice of {len(names)} structures", *contrasts])]
        lines += [line([f"sub-{s}", *(f"{mean[s, c]:.3f}" for c in contrasts)]) for s in subjects]
        lines.append(line(["mean", *(f"{average([mean[s, c] for s in subjects]):.3f}" for c in contrasts)]))
        if BASE in contrasts:
            less = [average([mean[s, c] - mean[s, BASE] for s in subjects]) for c in contrasts]
            lines.append(line([f"minus {BASE}", *(f"{value:+.3f}" for value in less)]))
        lines += ["", *heading(["structure, mean of the subjects", *contrasts])]
        for name in names:
            lines.append(line([name, *(f"{average([dice[s, c, name] for s in subjects]):.3f}" for c in contrasts)]))
        lines.append("")
    return "\n".join(lines)


def run_heads(options: Options) -> str:
    """Simulate, segment, score; the page."""
    simulate_all(options)
    rows: Rows = []
    for recipe in options.recipes:
        rows += score_heads(options, recipe)
    write_table(options.out / "dice.tsv", rows)
    return heads_page(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", choices=("heads", "brains"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contrasts", default=",".join(CHOICE), help="of the simulated heads; default: %(default)s")
    parser.add_argument("--recipes", default="location-em,default", help="for heads; default: %(default)s")
    parser.add_argument("--draws", type=int, default=200, help="of `segment`")
    parser.add_argument("--spacing", type=float, default=2.0, help="of the prior's grid, mm")
    parser.add_argument("--prior-steps", type=int, help="for a quick try: steps of `prior`")
    asleep = "of `prior`: the label guide is learned asleep, in bf16; 0: there is none (default)"
    parser.add_argument("--label-steps", type=int, default=0, help=asleep)
    arguments = parser.parse_args()
    contrasts, recipes = tuple(arguments.contrasts.split(",")), tuple(arguments.recipes.split(","))
    for chosen, known in ((contrasts, CHOICE), (recipes, tuple(RECIPES))):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; choose among {', '.join(known)}")
    data, out = arguments.data.resolve(), arguments.out.resolve()
    options = Options(
        data,
        out,
        arguments.draws,
        recipes,
        contrasts,
        arguments.spacing,
        arguments.prior_steps,
        arguments.label_steps,
    )
    try:
        page = run_heads(options) if arguments.set == "heads" else run_brains(options)
    except InputError as error:
        sys.exit(f"benchmark_contrasts: {error}")
    write_text(out / "summary.md", page)
    print(page)


if __name__ == "__main__":
    main()
