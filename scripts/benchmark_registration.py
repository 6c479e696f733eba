"""Does a segmentation depend on where the scan's header puts the head? Simulated heads, unmoved and moved, compared.

    python scripts/benchmark_registration.py --data DIR --out OUT

The whole-head label maps of DIR/prior teach a prior; those of DIR/dev, in turns, become scans: every intensity class
(and every label outside the brain) gets a brightness at random, then blur, a bias field and noise. Each scan is
segmented as it is and with its header turned by up to 20 degrees about each axis of its middle and shifted by up to
30 mm along each: the registration starts there, and the voxels are the same, so that label maps are compared without
resampling. A head passes where every structure of more than 1 ml changes by at most 2 % in volume and overlaps itself
by at least 0.97 (Dice). Structures outside the brain count as well.

What is compared is a segmentation as a user gets it, not the transform: --recipe as `ppl-seg segment`. By default it
is `location-em`, whose z is 0: what differs then, differs by the registration. The default recipe adds its own
inference of z, and the prior made here is trained for as few steps as --prior-steps says: registration sees the label
maps' frequencies alone. Results in OUT: structures.tsv (a row a head and structure), heads.tsv, the table on screen.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation
from simulation import simulate

from ppl_seg import learn_prior
from ppl_seg.api import Model
from ppl_seg.data.cohort import find_label_maps
from ppl_seg.data.images import read_label_map
from ppl_seg.data.registration import rigid_move
from ppl_seg.errors import InputError
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.tables import write_table

TURN, SHIFT = 20.0, 30.0  # degrees about each axis, mm along each
SMALLEST = 1000.0  # mm³
MOST_CHANGE, LEAST_DICE = 0.02, 0.97
SHARE_TO_PASS = 0.95  # of the heads


@dataclass(frozen=True)
class Options:
    """recipe, draws: of `Model.segment`."""

    recipe: str
    draws: int


def random_move(affine: np.ndarray, shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """(4, 4): the affine after a turn about the image's middle and a shift."""
    middle = (affine @ [*((np.array(shape) - 1) / 2), 1.0])[:3]
    turn = Rotation.from_euler("xyz", generator.uniform(-TURN, TURN, 3), degrees=True)
    return np.asarray(rigid_move(turn, middle, generator.uniform(-SHIFT, SHIFT, 3)) @ affine)


def compare(unmoved: Segmentation, moved: Segmentation) -> list[dict[str, Any]]:
    """A row for each structure above 1 ml in the unmoved run: volumes (mm³), change of volume, Dice."""
    rows = []
    voxel = unmoved.image.voxel_volume
    for value, name in list(zip(unmoved.table.indices.tolist(), unmoved.table.names, strict=True))[1:]:
        one, other = unmoved.label_map == value, moved.label_map == value
        before, after = one.sum() * voxel, other.sum() * voxel
        if before > SMALLEST:
            dice = 2 * (one & other).sum() * voxel / (before + after)
            volumes = {"structure": name, "volume_mm3": float(before), "moved_mm3": float(after)}
            rows.append({**volumes, "change": float(abs(after / before - 1)), "dice": float(dice)})
    return rows


def run_head(model: Model, head: int, source: Path, folder: Path, options: Options) -> list[dict[str, Any]]:
    """Simulate a head, segment it twice, and compare: a row a structure; none where a run failed, which is said."""
    generator = np.random.default_rng([head, 20])
    labels = read_label_map(source)
    scan = simulate(labels, model.table, generator)
    segmented = []
    for name, affine in (("unmoved", labels.affine), ("moved", random_move(labels.affine, labels.shape, generator))):
        path = folder / name / f"head-{head:02d}_T1w.nii.gz"  # one name, one seed
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(scan, affine), path)
        try:
            segmented.append(model.segment(path, recipe=options.recipe, draws=options.draws))
        except InputError as error:
            print(error, file=sys.stderr)
            return []
    return compare(*segmented)


def summary_row(head: int, source: Path, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What is printed of a head: its worst structures, and whether it passes."""
    found: dict[str, Any] = {"head": head, "map": source.name, "structures": len(rows), "seconds": seconds}
    if not rows:
        return {**found, "change": None, "changed": "failed", "dice": None, "differs": "", "passes": False}
    change, dice = max(rows, key=lambda row: row["change"]), min(rows, key=lambda row: row["dice"])
    found |= {"change": change["change"], "changed": change["structure"], "dice": dice["dice"]}
    passes = bool(change["change"] <= MOST_CHANGE and dice["dice"] >= LEAST_DICE)
    return {**found, "differs": dice["structure"], "passes": passes}


def run(arguments: argparse.Namespace) -> int:
    """How many heads pass."""
    sources = [found.path for found in find_label_maps([arguments.data / "dev"])]
    options = Options(arguments.recipe, arguments.draws)
    table = arguments.data / "labels.tsv"
    model = learn_prior(
        [arguments.data / "prior"],
        out=arguments.out / f"prior-{arguments.spacing:g}mm-{arguments.prior_steps}",
        labels=table if table.is_file() else None,
        spacing=arguments.spacing,
        align="affine",
        steps=arguments.prior_steps,
        resume=True,  # one that is there is used again
    )
    structures: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    print("| head | map | largest change of volume | smallest Dice | passes | seconds |\n|---|---|---|---|---|---|")
    for head in range(arguments.heads):
        source, began = sources[head % len(sources)], time.perf_counter()
        rows = run_head(model, head, source, arguments.out / "scans", options)
        structures += [{"head": head, **row} for row in rows]
        heads.append(one := summary_row(head, source, rows, time.perf_counter() - began))
        write_table(arguments.out / "structures.tsv", structures)
        write_table(arguments.out / "heads.tsv", heads)
        if rows:
            figures = f"{100 * one['change']:.2f} % {one['changed']} | {one['dice']:.3f} {one['differs']}"
        else:
            figures = "failed | failed"
        passes = "yes" if one["passes"] else "no"
        print(f"| {head} | {source.name} | {figures} | {passes} | {one['seconds']:.0f} |", flush=True)
    return sum(one["passes"] for one in heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with prior/, dev/ and, if it has one, labels.tsv"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--spacing", type=float, default=3.0, help="of the prior's grid, mm")
    parser.add_argument("--prior-steps", type=int, default=20, help="steps of `prior`")
    parser.add_argument("--recipe", default="location-em", help="of `segment`")
    parser.add_argument("--draws", type=int, default=8, help="of `segment`")
    arguments = parser.parse_args()
    try:
        passed = run(arguments)
    except InputError as error:
        sys.exit(f"benchmark_registration: {error}")
    print(f"{passed} of {arguments.heads} heads pass")
    sys.exit(passed < SHARE_TO_PASS * arguments.heads)


if __name__ == "__main__":
    main()
