"""Rows of the table of bad inputs where files, options or outputs do not go together, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bad_files import (
    Files,
    Make,
    Run,
    check_refused,
    fit,
    prior,
    segment,
    visits,
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# What is refused: a name, what makes the command's arguments, words of the one line.
REFUSED: list[tuple[str, Make, str]] = [
    ("no mask of a scan", lambda f: segment(f.image(), "--mask", f.labels("k/sub-2_mask.nii").parent), "found none"),
    (
        "two masks of a scan",
        lambda f: segment(f.image(), "--mask", [f.labels(f"k/sub-1_run-{n}_mask.nii") for n in (1, 2)][0].parent),
        "sub-1_run-1_mask.nii, ",
    ),
    ("no mask folder", lambda f: segment(f.image(), "--mask", f.root / "gone"), "gone: no such file or folder"),
    (
        "several contrasts",
        lambda f: segment(visits(f, "sub-1_T1w", "sub-1_FLAIR")),
        "FLAIR (1), T1w (1); choose one with --suffix",
    ),
    (
        "no such contrast",
        lambda f: segment(visits(f, "sub-1_T1w"), "--suffix", "FLAIR"),
        "no scan ends in _FLAIR; there are: T1w",
    ),
    (
        "a channel is missing",
        lambda f: segment(visits(f, "sub-1_T1w", "sub-1_FLAIR", "sub-2_T1w"), "--channels", "T1w,FLAIR"),
        "sub-2: expected one FLAIR scan, found none",
    ),
    (
        "a channel twice",
        lambda f: segment(visits(f, "sub-1_T1w", "sub-1_run-2_T1w", "sub-1_FLAIR"), "--channels", "T1w,FLAIR"),
        "expected one T1w scan, found ",
    ),
    (
        "not the model's channels",
        lambda f: segment(visits(f, "sub-1_T1w", "sub-1_FLAIR"), "--channels", "T1w,FLAIR"),
        "the model was fitted to scans of 1 channels; found 2; see --channels",
    ),
    ("no such participant", lambda f: segment(visits(f, "sub-1_T1w"), "--participant-label", "9"), "there are: 1"),
    ("a fit of one scan", lambda f: fit(f.image()), "segment --model with the prior's folder"),
    (
        "the same file twice",
        lambda f: segment(f.image(), f.root / "s" / "sub-1_T1w.nii"),
        "given twice; name each file once",
    ),
    (
        "the same file through a link",
        lambda f: segment(f.image(), f.link("s/sub-2_T1w.nii", "sub-1_T1w.nii")),
        "given twice (",
    ),
    (
        "colliding outputs",
        lambda f: segment(f.image("a/sub-1_T1w.nii"), f.image("b/sub-1_T1w.nii")),
        "both would be written to sub-1/anat/sub-1_seg-ppl_desc-T1w",
    ),
    (
        "output folder of inputs",
        lambda f: [*segment(f.image()), "--out", f.root / "s"],
        "the output folder is a folder of inputs",
    ),
    (
        "output folder that was given",
        lambda f: [*segment(f.image("d/deep/sub-1_T1w.nii").parents[1]), "--out", f.root / "d"],
        "the output folder is a folder of inputs",
    ),
    (
        "a prior into its inputs",
        lambda f: [*prior(*f.maps()), "--out", f.root / "m"],
        "the output folder is a folder of inputs",
    ),
    (
        "a fit into its inputs",
        lambda f: [*fit(visits(f, "sub-1_T1w", "sub-2_T1w")), "--out", f.root / "v"],
        "the output folder is a folder of inputs",
    ),
    (
        "a fit onto its prior",
        lambda f: [*fit(visits(f, "sub-1_T1w")), "--prior", f.model(), "--out", f.model()],
        "the output folder is an input, too",
    ),
    (
        "results into the model",
        lambda f: [*segment(f.image()), "--model", f.model(), "--out", f.model()],
        "the output folder is an input, too",
    ),
    (
        "endless spacing",
        lambda f: [*prior(*f.maps()), "--spacing", "inf"],
        "--spacing inf: expected millimetres above 0",
    ),
    (
        "a fit of one good scan",
        lambda f: fit(visits(f, "sub-1_T1w"), f.write("s/sub-2_T1w.nii", "no image")),
        "not a NIfTI or .mgz image (starts with b'no image'); expected .nii, .nii.gz, .mgz; 1 of 2 scans are left",
    ),
    (
        "a label guide that nothing hears",
        lambda f: [*fit(visits(f, "sub-1_T1w")), "--recipe", "notes", "--label-rounds", "1"],
        "--label-rounds 1: --recipe notes hears no label guide; leave --label-rounds out, or choose --recipe default",
    ),
    (
        "evaluate onto an input",
        lambda f: [
            "evaluate",
            f.labels("a/x_dseg.nii"),
            f.labels("b/x_dseg.nii"),
            "--force",
            "--out",
            f.root / "b/x_dseg.nii",
        ],
        "x_dseg.nii: is an input; give another file",
    ),
    (
        "evaluate: other grids",
        lambda f: [
            "evaluate",
            f.labels("a/sub-1_dseg.nii", affine=np.diag([2, 1, 1, 1])),
            f.labels("b/sub-1_dseg.nii"),
        ],
        "evaluate in the scan's own voxels, or resample one of them",
    ),
    (
        "evaluate: nothing matches",
        lambda f: ["evaluate", f.labels("a/sub-1_dseg.nii"), f.labels("b/sub-2_dseg.nii")],
        "no segmentation matches a true label map",
    ),
    (
        "evaluate: bad groups",
        lambda f: [
            "evaluate",
            f.labels("a/x_dseg.nii"),
            f.labels("b/x_dseg.nii"),
            "--groups",
            f.write("g.tsv", "index\tgroup\n1\tA\n1\tB\n"),
        ],
        "g.tsv, line 3: index 1 is in A and in B",
    ),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(files: Files, run: Run, make: Make, words: str) -> None:
    check_refused(files, run, make, words)


def test_one_bad_scan_does_not_stop_the_others(files: Files, run: Run) -> None:
    scans = visits(files, "sub-1_T1w", "sub-2_T1w", "sub-3_T1w")
    files.write("v/sub-2_T1w.nii", "no image")
    code, screen, err = run(*segment(scans), "--out", files.root / "out")
    assert code == 1 and screen.count("│ ok") == 2 and screen.count("│ failed") == 1
    assert err.count("sub-2_T1w.nii: not a NIfTI or .mgz image") == 1


def test_one_bad_scan_does_not_stop_a_fit(files: Files, run: Run) -> None:
    scans = visits(files, "sub-1_T1w", "sub-2_T1w", "sub-3_T1w")
    bad = files.write("v/sub-2_T1w.nii", "no image")
    options = ("--out", files.root / "out", "--label-rounds", 0)
    code, _, err = run(*fit(scans), *options)
    assert code == 1 and err.count(f"{bad}: not a NIfTI or .mgz image") == 1 and "left out" in err
    assert "2 scans on the prior's grid" in err
    assert json.loads((files.root / "out" / "config.json").read_text())["training"]["fit"]["left_out"] == 1
