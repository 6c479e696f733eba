from __future__ import annotations

import os
from pathlib import Path

import pytest

from ppl_seg.data.cohort import find_label_maps, find_scans
from ppl_seg.data.images import read_label_map, read_scan
from ppl_seg.errors import InputError


@pytest.fixture
def tree(tmp_path):
    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names(found) -> list[str]:
    return [file.path.name for file in found]


def test_folder_of_scans(tree):
    ours = "sub-1_seg-ppl_desc-T1w_entropy.nii.gz"
    scans = ("b/sub-2_T1w.nii.gz", "sub-1_T1w.nii")
    root = tree(*scans, "sub-1_dseg.nii.gz", "sub-1_mask.nii.gz", "notes.txt", ".x.nii", ".git/x_T1w.nii", ours)
    found = find_scans([root])
    assert sorted(names(found)) == ["sub-1_T1w.nii", "sub-2_T1w.nii.gz"]
    assert all(file.base == root for file in found)
    assert names(find_label_maps([root])) == ["sub-1_dseg.nii.gz"]


def test_files_and_globs(tree):
    root = tree("s/sub-1_T1w.nii.gz", "s/sub-2_T1w.nii.gz", "s/sub-2_mask.nii.gz", "l/a.nii.gz", "l/b.nii.gz")
    assert names(find_scans([f"{root}/*/sub-*.nii.gz"])) == ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]
    assert find_scans([f"{root}/*/sub-*.nii.gz"])[0].base == root
    single = find_scans([root / "s" / "sub-2_T1w.nii.gz"])
    assert names(single) == ["sub-2_T1w.nii.gz"] and single[0].base is None
    assert names(find_label_maps([f"{root}/l/*.nii.gz"])) == ["a.nii.gz", "b.nii.gz"]
    tree("l/c_dseg.nii.gz")
    assert names(find_label_maps([f"{root}/l/*.nii.gz"])) == ["c_dseg.nii.gz"]


def test_refusals(tree):
    root = tree("sub-1_T1w.nii", "sub-1_dseg.nii.gz", "empty/readme.txt")
    for given, message in (
        ([root / "gone.nii"], "no such file or folder"),
        ([root / "empty"], "no scans in this folder"),
        ([f"{root}/*.mgz"], "no scans match"),
        ([root / "sub-1_dseg.nii.gz"], "a label map, mask or one of our outputs"),
        ([root / "sub-1_T1w.nii", root / "sub-1_T1w.nii"], "given twice"),
        ([root / "sub-1_T1w.nii", root], "given twice"),
        ([], "no scans given"),
    ):
        with pytest.raises(InputError, match=message):
            find_scans(given)
    with pytest.raises(InputError, match="no label maps .* in this folder"):
        find_label_maps([root / "empty"])
    os.symlink(root / "sub-1_T1w.nii", root / "sub-9_T1w.nii")
    with pytest.raises(InputError, match="given twice"):
        find_scans([root])


def test_contrasts_need_a_suffix(tree):
    root = tree("sub-1_T1w.nii", "sub-1_FLAIR.nii", "sub-2_T1w.nii", "sub-1_mask.nii")
    with pytest.raises(InputError, match=r"several contrasts .*: FLAIR \(1\), T1w \(2\); choose one with --suffix"):
        find_scans([root])
    assert names(find_scans([root], suffix="FLAIR")) == ["sub-1_FLAIR.nii"]
    everything = [path for path in root.iterdir() if path.suffix == ".nii"]
    assert len(find_scans(everything, suffix="T1w")) == 2
    with pytest.raises(InputError, match="no scan ends in _PDw; there are: FLAIR, T1w"):
        find_scans([root], suffix="PDw")


def test_raw_bids_dataset(tree):
    root = tree(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/func/sub-1_task-x_bold.nii.gz",
        "derivatives/p/sub-1/anat/sub-1_T1w.nii.gz",
        "sourcedata/anat/sub-1_T1w.nii.gz",
        "sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz",
    )
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    assert names(find_scans([root])) == ["sub-1_T1w.nii.gz", "sub-2_ses-1_T1w.nii.gz"]
    (root / "dataset_description.json").write_text("{")
    with pytest.raises(InputError, match="dataset_description.json: cannot be read"):
        find_scans([root])


def test_freesurfer_trees_come_later(tree):
    root = tree("bert/mri/orig.mgz", "bert/mri/aseg.mgz", "fred/mri/orig.mgz")
    with pytest.raises(InputError, match=r"a FreeSurfer tree; give the files"):
        find_scans([root])
    assert len(find_scans([f"{root}/*/mri/orig.mgz"])) == 2


def test_channels(tree):
    root = tree("sub-1_T1w.nii", "sub-1_FLAIR.nii", "sub-2_ses-1_T1w.nii", "sub-2_ses-1_FLAIR.nii", "a.nii", "b.nii")
    for path in ("a.nii", "b.nii"):
        assert find_scans([f"{root / 'a.nii'},{root / 'b.nii'}"])[0].paths[0 if path == "a.nii" else 1].name == path
    with pytest.raises(InputError, match="b.nii: given twice"):
        find_scans([f"{root / 'b.nii'},{root / 'b.nii'}"])
    (root / "a.nii").unlink()
    (root / "b.nii").unlink()
    found = find_scans([root], channels=["FLAIR", "T1w"])
    assert [[p.name for p in f.paths] for f in found] == [
        ["sub-1_FLAIR.nii", "sub-1_T1w.nii"],
        ["sub-2_ses-1_FLAIR.nii", "sub-2_ses-1_T1w.nii"],
    ]
    tree("sub-1_run-2_T1w.nii")
    with pytest.raises(InputError, match="sub-1: expected one T1w scan, found .*sub-1_.*, .*sub-1_"):
        find_scans([root], channels=["FLAIR", "T1w"])
    (root / "sub-2_ses-1_T1w.nii").unlink()
    (root / "sub-1_run-2_T1w.nii").unlink()
    with pytest.raises(InputError, match="sub-2 ses-1: expected one T1w scan, found none"):
        find_scans([root], channels=["FLAIR", "T1w"])


def test_real_files_are_read_as_what_they_are(real_data):
    maps = find_label_maps([real_data / "hippocampus" / "prior"])
    scans = find_scans([real_data / "hippocampus" / "dev" / "scans"])
    assert len(maps) == 116 and len(scans) == 61
    assert read_label_map(maps[0].path).data.max() == 2
    assert all(read_scan(scan.path).warnings == () for scan in scans[:20])
