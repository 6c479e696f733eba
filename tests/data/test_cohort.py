from __future__ import annotations

import os
from pathlib import Path

import pytest

from ppl_seg.data.cohort import Selection, check_output_apart, find_label_maps, find_masks, find_scans
from ppl_seg.data.images import read_label_map, read_scan
from ppl_seg.data.names import output_location
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


def test_a_folder_of_a_dataset(tree):
    root = tree("ds/sub-1/anat/sub-1_T1w.nii", "ds/sub-1/func/sub-1_bold.nii", "ds/extra/sub-1_T2w.nii", "x/y_T1w.nii")
    (root / "ds" / "dataset_description.json").write_text("{}")
    assert names(find_scans([root / "ds" / "sub-1"])) == ["sub-1_T1w.nii"]
    assert names(find_scans([root], suffix="T1w")) == ["sub-1_T1w.nii", "y_T1w.nii"]
    assert names(find_scans([root / "ds" / "extra"])) == ["sub-1_T2w.nii"]
    tree("ds/derivatives/manual/sub-1/anat/sub-1_dseg.nii.gz")
    with pytest.raises(InputError, match="no label maps .* its derivatives are not looked at, give their folder"):
        find_label_maps([root / "ds"])
    manual = root / "ds" / "derivatives" / "manual"
    (manual / "dataset_description.json").write_text('{"DatasetType": "derivative"}')
    assert names(find_label_maps([manual])) == ["sub-1_dseg.nii.gz"]


def test_linked_folders_are_followed_once(tree):
    root = tree("archive/sub-1_T1w.nii", "study/sub-2_T1w.nii")
    (root / "study" / "sub-1").symlink_to(root / "archive")
    (root / "archive" / "loop").symlink_to(root / "study")
    assert names(find_scans([root / "study"])) == ["sub-1_T1w.nii", "sub-2_T1w.nii"]


def test_freesurfer_subjects(tree, caplog):
    caplog.set_level("INFO", "ppl_seg")
    every = ("orig", "nu", "aseg", "brainmask", "aparc+aseg")
    volumes = [f"{name}/mri/{volume}.mgz" for name in ("bert", "sub-02_ses-1", "fsaverage") for volume in every]
    root = tree(*volumes, "early/mri/orig/001.mgz", "broken/scripts/recon-all.error", "runs/scripts/IsRunning.lh+rh")
    tree("broken/mri/orig.mgz", "runs/mri/orig.mgz", "runs/mri/aseg.mgz", "late/mri/orig.mgz", "lh.orig.mgz.txt")

    scans = find_scans([root])
    assert [str(scan.path.relative_to(root)) for scan in scans] == [
        "bert/mri/orig.mgz", "late/mri/orig.mgz", "sub-02_ses-1/mri/orig.mgz",
    ]  # fmt: skip
    assert sorted(record.message.removeprefix(f"{root}/") for record in caplog.records) == [
        "broken: recon-all ended with an error; skipped",
        "early: no mri/orig.mgz; skipped",
        "fsaverage: FreeSurfer's template; skipped",
        "runs: recon-all is not finished; skipped",
    ]
    assert [output_location(scan.path, scan.base) for scan in scans] == [
        (Path("bert/mri"), "orig"),
        (Path("late/mri"), "orig"),
        (Path("sub-02/ses-1/anat"), "sub-02_ses-1_seg-ppl_desc-orig"),
    ]
    assert output_location(root / "bert/mri/orig.mgz") == (Path("bert/mri"), "orig")
    assert names(find_scans([root], suffix="nu")) == ["nu.mgz", "nu.mgz"]
    assert names(find_scans([root / "bert"])) == ["orig.mgz"]
    assert [len(f.paths) for f in find_scans([root], channels=["nu", "orig"])] == [2, 2]
    maps = find_label_maps([root])
    assert [str(found.path.relative_to(root)) for found in maps] == ["bert/mri/aseg.mgz", "sub-02_ses-1/mri/aseg.mgz"]
    assert len(find_label_maps([f"{root}/*/mri/aparc+aseg.mgz"])) == 2  # without fsaverage
    assert names(find_masks(root)) == ["brainmask.mgz", "brainmask.mgz"]
    with pytest.raises(InputError, match=r"several contrasts .* nu \(2\), orig \(3\)"):
        find_scans([f"{root}/*/mri/[no]*.mgz"])
    assert names(find_scans([root], selection=Selection(participants=("bert",)))) == ["orig.mgz"]
    with pytest.raises(InputError, match="no scans in this folder"):
        find_scans([root / "early"])


def test_participants_and_sessions(tree):
    root = tree(*(f"sub-{p}/sub-{p}_ses-{s}_T1w.nii" for p in ("01", "02") for s in (1, 2)), "plain.nii")
    (root / "plain.nii").rename(root / "plain_T1w.nii")

    def chosen(participants=(), sessions=()) -> list[str]:
        return names(find_scans([root], "T1w", (), Selection(participants, sessions)))

    assert chosen(("sub-01",)) == ["sub-01_ses-1_T1w.nii", "sub-01_ses-2_T1w.nii"]
    assert chosen(("02", "01"), ("ses-2",)) == ["sub-01_ses-2_T1w.nii", "sub-02_ses-2_T1w.nii"]
    assert len(chosen()) == 5 and len(chosen((), ("1",))) == 2
    with pytest.raises(InputError, match="--participant-label 1, 9: no such participant; there are: 01, 02"):
        chosen(("01", "1", "9"))
    with pytest.raises(InputError, match="--session-label 3: no such session; there are: 1, 2"):
        chosen(("01",), ("3",))
    tree("m/sub-01_ses-1_dseg.nii", "m/sub-02_ses-1_dseg.nii")
    assert names(find_label_maps([root / "m"], Selection(("01",)))) == ["sub-01_ses-1_dseg.nii"]


def test_annexed_files_of_equal_content_are_two(tree):
    root = tree("notes.txt")
    for name in ("sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"):
        (root / name).symlink_to(".git/annex/objects/aa/bb/KEY/KEY")
    assert len(find_scans([root])) == 2


def test_either_name_of_a_pair(tree):
    root = tree("a.hdr", "a.img")
    assert names(find_scans([root])) == ["a.hdr"]
    with pytest.raises(InputError, match="given twice"):
        find_scans([root / "a.hdr", root / "a.img"])


def test_the_output_folder_is_not_an_input_folder(tree):
    root = tree("s/a/sub-1_T1w.nii")
    found = find_scans([root / "s"])
    check_output_apart(found, root / "out")
    for out in (root / "s", root / "s" / "a", f"{root}/s/a/../a/"):
        with pytest.raises(InputError, match="the output folder is a folder of inputs"):
            check_output_apart(found, out)


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
    assert found[0].contrasts == ("FLAIR", "T1w") and find_scans([root], suffix="T1w")[0].contrasts == ()
    with pytest.raises(InputError, match="give one of the two"):
        find_scans([root], "T1w", ["FLAIR", "T1w"])
    three = ",".join(str(root / f"sub-2_ses-1_{c}.nii") for c in ("FLAIR", "T1w")) + f",{root / 'c.nii'}"
    tree("c.nii")
    with pytest.raises(InputError, match=r"3 channels, .*sub-1_FLAIR.nii has 2"):
        find_scans([f"{root / 'sub-1_FLAIR.nii'},{root / 'sub-1_T1w.nii'}", three])
    (root / "c.nii").unlink()
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


def test_files_of_one_name_are_told_apart_by_their_folders(tree, monkeypatch):
    root = tree("s1/T1.nii.gz", "s2/T1.nii.gz", "s2/x/T1.nii.gz")
    monkeypatch.chdir(root)
    given = ["s1/T1.nii.gz", "s2/T1.nii.gz", root / "s2/x/T1.nii.gz"]
    found = find_scans(given)
    places = [str(output_location(file.path, file.base)[0]) for file in found]
    assert places == ["s1", "s2", "s2/x"] and all(file.path.exists() for file in found)
    assert all(file.base is None for file in find_scans(given[:1]))


def test_contrasts_of_plain_names_need_a_suffix_too(tree):
    root = tree("s1/T1.nii.gz", "s1/FLAIR.nii.gz", "s2/T1.nii.gz", "t/one.nii.gz", "t/two.nii.gz")
    with pytest.raises(InputError, match=r"several contrasts among the scans: FLAIR \(1\), T1 \(2\); choose one"):
        find_scans([root])
    assert names(find_scans([root], "T1")) == ["T1.nii.gz"] * 2
    assert names(find_scans([root / "t"])) == ["one.nii.gz", "two.nii.gz"]


def test_a_person_of_freesurfers_longitudinal_stream_counts_once_a_visit(tree, caplog):
    visits = ("bert_1", "bert_2", "bert_base", "bert_1.long.bert_base", "bert_2.long.bert_base")
    root = tree(*(f"{visit}/mri/{volume}.mgz" for visit in visits for volume in ("orig", "aseg")), "bert_base/base-tps")
    with caplog.at_level("INFO", "ppl_seg"):
        assert [file.path.parts[-3] for file in find_label_maps([root])] == ["bert_1", "bert_2"]
    assert "bert_base: FreeSurfer's mean of several visits; skipped" in caplog.text
