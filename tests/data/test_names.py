from __future__ import annotations

from pathlib import Path

import pytest

from ppl_seg.data.names import (
    is_scan_name,
    last_word,
    match_files,
    output_location,
    parse_name,
)
from ppl_seg.errors import InputError


def test_parsing():
    name = parse_name("x/sub-01_ses-1_acq-mprage_T1w.nii.gz")
    assert name.entities == {"sub": "01", "ses": "1", "acq": "mprage"}
    assert (name.suffix, name.extension, name.stem) == ("T1w", ".nii.gz", "sub-01_ses-1_acq-mprage_T1w")
    for plain in ("brain.nii.gz", "subject_1_T1w.nii", "ses-1_T1w.nii", "sub-01_x_T1w.nii"):
        assert parse_name(plain).suffix is None and parse_name(plain).entities == {}
    assert last_word("my_scan_FLAIR.mgz") == "FLAIR"


@pytest.mark.parametrize(
    ("name", "folder", "stem"),
    [
        ("sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/anat", "sub-01_ses-1_seg-ppl_desc-T1w"),
        ("sub-01_T1w.nii", "sub-01/anat", "sub-01_seg-ppl_desc-T1w"),
        ("sub-01_desc-brain_T1w.nii.gz", "sub-01/anat", "sub-01_seg-ppl_desc-brainT1w"),
        (
            "sub-01_run-2_space-T1w_res-2_desc-x_FLAIR.nii.gz",
            "sub-01/anat",
            "sub-01_run-2_space-T1w_seg-ppl_res-2_desc-xFLAIR",
        ),
    ],
)
def test_outputs_of_bids_names(name, folder, stem):
    assert output_location(Path("/data/any") / name, "/data") == (Path(folder), stem)
    assert output_location(name) == (Path(folder), stem)


def test_outputs_of_channels_and_of_other_names():
    assert output_location("sub-1_T1w.nii.gz", contrasts=["T1w", "FLAIR"])[1] == "sub-1_seg-ppl_desc-T1wFLAIR"
    assert output_location("/data/a/b/brain.x.nii.gz", "/data") == (Path("a/b"), "brain.x")
    assert output_location("/data/a/brain.mgz") == (Path(), "brain")


def test_scan_names():
    assert is_scan_name("sub-01_T1w.nii.gz") and is_scan_name("brain.nii.gz") and is_scan_name("mask_study.nii")
    ours = "sub-01_seg-ppl_desc-T1w_qc.nii.gz"
    for name in (
        "sub-01_dseg.nii.gz",
        "x_mask.nii",
        "sub-1_label-GM_probseg.nii.gz",
        "a_entropy.nii.gz",
        ours,
    ):
        assert not is_scan_name(name)


@pytest.mark.parametrize(
    ("name", "other", "together"),
    [
        ("sub-1_run-1_seg-ppl_desc-T1w_dseg.nii.gz", "sub-1_run-1_dseg.nii.gz", True),
        ("sub-1_ses-1_T1w.nii", "sub-1_desc-brain_mask.nii", True),
        ("sub-1_run-1_dseg.nii.gz", "sub-1_run-2_dseg.nii.gz", False),
        ("sub-1_dseg.nii", "sub-2_dseg.nii", False),
        ("sub-1_dseg.nii", "a.nii", False),
    ],
)
def test_what_belongs_together(name, other, together):
    assert match_files([(Path(name), None)], [(Path(other), None)])[0] == [(Path(name), Path(other))] * together


def test_matching():
    def files(folder, *names):
        return [(Path(folder) / name, Path(folder)) for name in names]

    left = files("p", "sub-1/anat/sub-1_seg-ppl_desc-T1w_dseg.nii.gz", "sub-3_dseg.nii.gz", "x/a_dseg.nii.gz")
    right = files("t", "sub-1_dseg.nii.gz", "sub-2_dseg.nii.gz", "x/a.nii.gz", "y/a.nii.gz")
    pairs, alone_left, alone_right = match_files(left, right)
    assert pairs == [(left[0][0], right[0][0]), (left[2][0], right[2][0])]
    assert alone_left == [left[1][0]] and alone_right == [right[1][0], right[3][0]]
    with pytest.raises(InputError, match="several files match it"):
        match_files(files("p", "sub-1_dseg.nii.gz"), files("t", "sub-1_run-1_dseg.nii.gz", "sub-1_run-2_dseg.nii.gz"))
