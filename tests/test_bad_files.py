"""Rows of the table of bad inputs where one file is wrong, through the real commands: one line, with the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.bad_files import (
    SHAPE,
    Files,
    Make,
    Run,
    check_refused,
    edited,
    forms,
    label_map,
    packed,
    prior,
    scan,
    segment,
    table,
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# What is refused: a name, what makes the command's arguments, words of the one line.
REFUSED: list[tuple[str, Make, str]] = [
    ("missing", lambda f: segment(f.root / "gone.nii.gz"), "gone.nii.gz: no such file or folder"),
    ("empty file", lambda f: segment(f.write("a.nii", b"")), "a.nii: the file is empty (0 bytes); copy it again"),
    (
        "truncated",
        lambda f: segment(f.write("a.nii", f.image().read_bytes()[:600])),
        "a.nii: truncated, voxels are missing",
    ),
    (
        "truncated gzip",
        lambda f: segment(f.write("a.nii.gz", packed(f.image(), 500))),
        "a.nii.gz: truncated or damaged gzip file",
    ),
    ("text", lambda f: segment(f.write("a.nii", "no image " * 99)), "a.nii: not a NIfTI or .mgz image"),
    ("colour", lambda f: segment(f.image("a.nii", np.zeros(SHAPE, [(c, "u1") for c in "RGB"]))), "(colour or complex)"),
    (
        "complex",
        lambda f: segment(f.image("a.nii", scan().astype(np.complex64))),
        "(colour or complex); expected one real",
    ),
    (
        "huge",
        lambda f: segment(f.patched(40, "4h", 3, 3000, 3000, 3000)),
        "its shape is 3000x3000x3000; expected at most",
    ),
    (
        "voxels in the header",
        lambda f: segment(f.patched(108, "f", 0)),
        "the header is damaged (shape 8x8x6, voxels from b",
    ),
    ("folder without scans", lambda f: segment(f.write("n/readme.txt", "").parent), "n: no scans in this folder"),
    ("glob of nothing", lambda f: segment(f.root / "*.nii"), "*.nii: no scans match"),
    ("annex link", lambda f: segment(f.link("a.nii.gz", ".git/annex/objects/a/b/K/K")), "get it with `datalad get"),
    (
        "annex pointer",
        lambda f: segment(f.write("a.nii", "/annex/objects/MD5E-s1--1.nii\n")),
        "content is not here (git-annex)",
    ),
    (
        "LFS pointer",
        lambda f: segment(f.write("a.nii", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")),
        "get it with `git lfs pull`",
    ),
    (
        "dangling link",
        lambda f: segment(f.link("a.nii", "nowhere.nii")),
        "a.nii: a link to nowhere.nii, which does not exist",
    ),
    (
        "half of a pair",
        lambda f: segment(f.write("a.hdr", f.image().read_bytes()[:348])),
        "a.hdr: a.img is not beside it",
    ),
    ("all NaN", lambda f: segment(f.image("a.nii", np.full(SHAPE, np.nan, np.float32))), "no voxel is a finite number"),
    (
        "constant",
        lambda f: segment(f.image("a.nii", np.full(SHAPE, 7, np.float32))),
        "every voxel is 7; expected a scan",
    ),
    ("scl_slope NaN", lambda f: segment(f.patched(112, "2f", np.nan, 0)), "intensities are unknown; repair the header"),
    (
        "four axes",
        lambda f: segment(f.image("a.nii", np.stack([scan()] * 3, -1))),
        "its shape is (8, 8, 6, 3), expected three axes; give one file per contrast, see --channels",
    ),
    (
        "singular",
        lambda f: segment(f.patched(254, "h24x12f", 1, *[1, 1, 0, 0] * 2, 0, 0, 1, 0)),
        "the affine is singular",
    ),
    ("not finite", lambda f: segment(f.patched(280, "4f", 1, 0, 0, np.nan)), "the affine is not finite"),
    (
        "voxels of 0 mm",
        lambda f: segment(f.patched(280, "4f", 0, 0, 0, 0)),
        "voxels of 0 x 1 x 1 mm; expected 0.05 to 20 mm",
    ),
    (
        "voxels of 0 mm, no sform",
        lambda f: segment(f.patched(80, "f", 0.0, name="a.nii") and f.unformed("a.nii")),
        "a.nii: voxels of 0x1x1 mm; expected sizes above 0",
    ),
    (
        "voxels of -1 mm, no sform",
        lambda f: segment(f.patched(84, "f", -1.0, name="a.nii") and f.unformed("a.nii")),
        "a.nii: voxels of 1x-1x1 mm; expected sizes above 0",
    ),
    ("voxels of 30 mm", lambda f: segment(f.image("a.nii", affine=np.diag([30, 1, 1, 1]))), "voxels of 30 x 1 x 1 mm"),
    (
        "voxels of 10 µm",
        lambda f: segment(f.image("a.nii", affine=np.diag([0.01, 1, 1, 1]))),
        "voxels of 0.01 x 1 x 1 mm",
    ),
    (
        "metres",
        lambda f: segment(f.image("a.nii", edit=lambda i: i.header.set_xyzt_units("meter"))),
        "voxels of 1000 x",
    ),
    ("label map as scan, by name", lambda f: segment(f.labels("a_dseg.nii")), "where a scan is expected"),
    (
        "label map as scan, by content",
        lambda f: segment(f.labels("a.nii")),
        "a label map (integers 0, 1, 2) where a scan",
    ),
    (
        "mask as scan",
        lambda f: segment(f.labels("sub-1_mask.nii")),
        "sub-1_mask.nii: a label map, mask or one of our outputs",
    ),
    (
        "scan as label map",
        lambda f: prior(*(f.image(f"s/{n}.nii", (10 * scan(n)).round()) for n in range(3))),
        "looks like a scan",
    ),
    (
        "not whole numbers",
        lambda f: prior(f.image("m/x_dseg.nii", label_map() * 0.5), *f.maps()),
        "found 0.5: a scan or prob",
    ),
    (
        "NaN in a label map",
        lambda f: prior(f.image("m/x_dseg.nii", edited(label_map(), np.nan)), *f.maps()),
        "found nan",
    ),
    ("all zero", lambda f: prior(f.labels("m/x_dseg.nii", 0 * label_map()), *f.maps()), "x_dseg.nii: all voxels are 0"),
    ("one label map", lambda f: prior(*f.maps(1)), "a prior needs at least 3 label maps, better tens; found 1"),
    (
        "a value outside the table",
        lambda f: table(f, "index\tname\n1\tA\n"),
        "values 2 are not in the label table (0, 1)",
    ),
    (
        "duplicate index",
        lambda f: table(f, "index\tname\n1\tA\n2\tB\n1\tA\n"),
        "line 4: duplicate index 1 (first on line 2)",
    ),
    (
        "two classes",
        lambda f: table(f, "index\tname\tclass\n1\tA\tx\n1\tA\ty\n"),
        "line 3: two classes (x, y) for index 1",
    ),
    ("missing column", lambda f: table(f, "index\tlabel\n1\tA\n"), "line 1: missing column name"),
    ("no table", lambda f: prior(*f.maps(), "--labels", f.root / "gone.tsv"), "gone.tsv: no such file"),
    (
        "bad map",
        lambda f: prior(*f.maps(), "--map", f.write("m.tsv", "from\tto\n1\tx\n")),
        "m.tsv, line 2: expected an integer",
    ),
    (
        "empty mask",
        lambda f: segment(f.image(), "--mask", f.labels("m.nii", 0 * label_map())),
        "m.nii: the mask is empty",
    ),
    (
        "mask of NaN",
        lambda f: segment(f.image(), "--mask", f.image("m.nii", edited(scan(), np.nan, ...))),
        "the mask is empty",
    ),
    (
        "mask of another shape",
        lambda f: segment(f.image(), "--mask", f.labels("m.nii", label_map()[:5])),
        "its grid is 5x8x6 with affine [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], that of ",
    ),
    (
        "mask of another place",
        lambda f: segment(f.image(), "--mask", f.labels("m.nii", affine=np.diag([1, 1, 1.1, 1]))),
        "give a mask on the scan's grid",
    ),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(files: Files, run: Run, make: Make, words: str) -> None:
    check_refused(files, run, make, words)


def analyze(files: Files) -> Path:
    nib.save(nib.AnalyzeImage(scan(), np.diag([-1.0, 1, 1, 1])), files.path("s/sub-1_T1w.hdr"))
    return files.root / "s" / "sub-1_T1w.hdr"


def mgz(files: Files) -> Path:
    nib.save(nib.MGHImage(scan(), np.eye(4)), files.path("bert/mri/orig.mgz"))
    return files.root / "bert"


SHEARED = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
# What is accepted: a name, what makes the scan, words of the warning ("" for none).
ACCEPTED: list[tuple[str, Callable[[Files], Path], str]] = [
    (".nii that is gzip", lambda f: f.write("b/sub-1_T1w.nii", packed(f.image())), ""),
    (".nii.gz that is not", lambda f: f.write("b/sub-1_T1w.nii.gz", f.image().read_bytes()), ""),
    ("Analyze", analyze, "an Analyze image, so left and right are unknown"),
    ("a FreeSurfer subject", mgz, ""),
    ("NaN", lambda f: f.image(data=edited(scan(), np.nan)), "1 voxels are NaN or Inf; they are taken as unobserved"),
    ("trailing axes", lambda f: f.image(data=scan()[..., None, None]), ""),
    ("sheared", lambda f: f.image(affine=SHEARED), ""),
    ("form codes 0", lambda f: f.image(edit=forms(0, 0)), "codes are both 0, so left and right are unknown"),
    ("form codes differ", lambda f: f.image(edit=forms(1, 1, 5.0)), "qform and sform differ by 5 mm at the corners"),
    (
        "micron",
        lambda f: f.image(affine=np.diag([1e3, 1e3, 1e3, 1]), edit=lambda i: i.header.set_xyzt_units("micron")),
        "",
    ),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_accepted(files: Files, run: Run, make: Callable[[Files], Path], words: str) -> None:
    out = files.root / "out"
    code, screen, err = run(*segment(make(files)), "--out", out)
    assert code == 0, err
    said = " ".join(screen.replace("│", " ").split())  # where a cell's lines end hangs on the length of paths
    assert words in said
    (found,) = out.rglob("*_dseg.nii.gz")
    assert nib.load(found).shape == SHAPE
    assert ("left and right" in said) == ("left and right" in words)


def test_label_maps_of_other_values_and_spacings_are_listed(files: Files, run: Run) -> None:
    maps = files.maps()
    odd = files.labels("m/sub-8_dseg.nii", np.minimum(label_map(), 1))
    wide = files.labels("m/sub-9_dseg.nii", affine=np.diag([1, 1, 1.5, 1]))
    labels = files.write("labels.tsv", b"\xef\xbb\xbfindex\tname\tmapping\r\n1\tA\t1\r\n2\tB\t2\r\n")
    arguments = prior(*maps, odd, wide, "--labels", labels, "--align", "center", "--out", files.root / "out")
    code, _, err = run(*arguments)
    assert code == 0, err
    assert f"{odd}: labels [2] do not occur" in err
    assert f"{wide}: voxels of 1x1x1.5 mm, 4 others have 1x1x1 mm" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_files_nobody_may_read(files: Files, run: Run) -> None:
    path = files.image()
    path.chmod(0)
    code, _, err = run(*segment(path), "--out", files.root / "out")
    assert code != 0 and "Permission denied" in err
