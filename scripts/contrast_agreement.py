"""Real brains in several contrasts, of which nobody drew the anatomy: contrasts of one visit must say the same.

openms/brains/*_{T1w,T2w,FLAIR}.nii.gz, each alone and T1w with FLAIR as two channels, are segmented from the brains of
head_labels/prior; of every structure the Dice with the T1w segmentation of the same visit. A segmentation that does not
look at the scan agrees with itself, so beside it stand what the location prior in the same alignment has with the T1w
segmentation, and what a scan has whose intensities were shuffled inside the mask. Lesions (openms/lesions, any grid):
what they are taken for, and whether the entropy flags those taken for cortex or ventricle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_report import Rows, average, heading, line, unique
from contrast_runs import Options, Structures, dice_of
from nibabel.processing import resample_from_to

from ppl_seg.data.cohort import find_scans
from ppl_seg.data.images import read_scan, write_image
from ppl_seg.data.masks import apply_mask
from ppl_seg.data.names import parse_name
from ppl_seg.errors import InputError
from ppl_seg.results.tables import write_table

REFERENCE = "T1w"
RUNS: dict[str, dict[str, Any]] = {"T1w": {"suffix": "T1w"}, "T2w": {"suffix": "T2w"}, "FLAIR": {"suffix": "FLAIR"}}
RUNS |= {"T1w+FLAIR": {"channels": ("T1w", "FLAIR")}}
COMPARED = ("Cerebral-White-Matter", "Cerebral-Cortex", "Lateral-Ventricle", "Thalamus", "Caudate", "Putamen")
COMPARED += ("Brain-Stem",)
SHUFFLED = "FLAIR"
FLAGGED = 0.35  # nats from which the entropy flags a voxel: two labels at 0.88 and 0.12


def run_brains(options: Options) -> str:
    """Segment, compare; the page."""
    model, brains = options.prior("prior-brains", mapped=True), options.data / "openms" / "brains"
    found: dict[tuple[str, str, str], Path] = {}  # what it is, contrast, visit -> label map
    for recipe in ("default", "location"):
        for contrast, words in RUNS.items():
            for file, path in options.segment(model, brains, f"segment-{recipe}", recipe, **words).items():
                found[recipe, contrast, visit_of(file.path)] = path
    shuffle(brains, options.out / "shuffled")
    control = options.segment(model, options.out / "shuffled", "segment-shuffled", "default", suffix=SHUFFLED)
    found |= {("shuffled", SHUFFLED, visit_of(file.path)): path for file, path in control.items()}
    structures = {name: values for name, values in options.structures().items() if name in COMPARED}
    rows = compare(found, structures)
    write_table(options.out / "agreement.tsv", rows)
    lesions = lesion_rows(found, options.data / "openms" / "lesions", structures)
    if lesions:
        write_table(options.out / "lesions.tsv", lesions)
    return brains_page(rows, lesions)


def visit_of(path: Path) -> str:
    """Person and session of a scan."""
    entities = parse_name(path).entities
    return "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)


def shuffle(brains: Path, out: Path) -> None:
    """The brains of one contrast with the intensities inside their masks in random order."""
    for seed, file in enumerate(find_scans([brains], SHUFFLED)):
        if not (out / file.path.name).is_file():
            scan = read_scan(file.path)
            inside, data = apply_mask(scan).observed, scan.data.copy()
            data[inside] = np.random.default_rng(seed).permutation(data[inside])
            out.mkdir(parents=True, exist_ok=True)
            write_image(out / file.path.name, data, scan)


def read(path: Path) -> np.ndarray:
    """A label map or an entropy."""
    return np.asarray(nib.load(path).dataobj)


def compare(found: dict[tuple[str, str, str], Path], structures: Structures) -> Rows:
    """Dice of each structure with the T1w segmentation of the visit; 0 for a scan that failed.

    Raises:
        InputError: there is no T1w segmentation, or contrasts of a visit lie on different grids.
    """
    rows: Rows = []
    for (what, contrast, visit), path in found.items():
        base = found.get(("default", REFERENCE, visit))
        if base is None or not base.is_file():
            raise InputError(f"{visit}: its {REFERENCE} scan is missing or failed; there is nothing to compare with")
        reference = read(base)
        labels = read(path) if path.is_file() else np.zeros_like(reference)
        if labels.shape != reference.shape:
            raise InputError(f"{path}: on another grid than {base}; give contrasts of a visit on one grid")
        dice = dice_of(labels, reference, structures)
        if (what, contrast) != ("default", REFERENCE):
            keys = {"what": what, "contrast": contrast, "visit": visit}
            rows += [{**keys, "structure": name, "dice": value} for name, value in dice.items()]
    return rows


def lesion_rows(found: dict[tuple[str, str, str], Path], folder: Path, structures: Structures) -> Rows:
    """A row a visit and contrast: volume of the lesions, shares of what they are taken for, shares that are flagged."""
    rows: Rows = []
    for (what, contrast, visit), path in found.items():
        masks = sorted(folder.glob(f"{visit}_*mask.nii.gz"))
        if what != "default" or not masks or not path.is_file():
            continue
        segmented = nib.load(path)
        lesion = np.asarray(resample_from_to(nib.load(masks[0]), segmented, order=0).dataobj) > 0
        labels, entropy = read(path), read(path.with_name(path.name.replace("_dseg", "_entropy")))
        of = {name: lesion & np.isin(labels, values) for name, values in structures.items()}
        wrong = of["Cerebral-Cortex"] | of["Lateral-Ventricle"]
        row: dict[str, Any] = {"visit": visit, "contrast": contrast}
        row["lesion_ml"] = float(lesion.sum() * abs(np.linalg.det(segmented.affine[:3, :3])) / 1000)
        row |= {name: share(of[name], lesion) for name in ("Cerebral-White-Matter", "Cerebral-Cortex")}
        row["Lateral-Ventricle"] = share(of["Lateral-Ventricle"], lesion)
        row["flagged"], row["flagged_wrong"] = (share(m & (entropy > FLAGGED), m) for m in (lesion, wrong))
        row["flagged_brain"] = share((labels > 0) & (entropy > FLAGGED), labels > 0)
        rows.append(row)
    return rows


def share(part: np.ndarray, whole: np.ndarray) -> float:
    """Voxels of a part among those of the whole; NaN where that is empty."""
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")


def brains_page(rows: Rows, lesions: Rows) -> str:
    """Agreement by contrast and structure, and what lesions are taken for."""
    names = unique(rows, "structure")
    lines = heading(["Dice with the segmentation of T1w", *names, "mean"])
    for what in unique(rows, "what"):
        own = [row for row in rows if row["what"] == what]
        for contrast in unique(own, "contrast"):
            chosen = [row for row in own if row["contrast"] == contrast]
            dice = [average([row["dice"] for row in chosen if row["structure"] == name]) for name in names]
            lines.append(line([f"{contrast}, {what}", *(f"{value:.3f}" for value in (*dice, average(dice)))]))
    if lesions:
        taken = ("Cerebral-White-Matter", "Cerebral-Cortex", "Lateral-Ventricle")
        flags = (f"entropy over {FLAGGED}: lesion", "of it cortex or ventricle", "all of the brain")
        lines += ["", *heading(["lesions", "ml", *taken, *flags])]
        keys = (*taken, "flagged", "flagged_wrong", "flagged_brain")
        for row in lesions:
            shares = [f"{100 * row[key]:.0f} %" for key in keys]
            lines.append(line([f"{row['visit']}, {row['contrast']}", f"{row['lesion_ml']:.1f}", *shares]))
    return "\n".join(lines) + "\n"
