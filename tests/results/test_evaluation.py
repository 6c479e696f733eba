from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.errors import InputError
from ppl_seg.results.dataset import TABLE, write_label_table
from ppl_seg.results.evaluation import ROW_COLUMNS, evaluate
from ppl_seg.results.tables import read_table

Save = Callable[..., Path]


def label_map(start: int = 2, shape: tuple[int, int, int] = (12, 10, 8)) -> np.ndarray:
    """Label 17 fills 4 x 4 x 4 voxels from `start` along x, label 53 the layer below."""
    labels = np.zeros(shape, np.uint8)
    labels[start : start + 4, 3:7, 2:6] = 17
    labels[start : start + 4, 3:7, 1:2] = 53
    return labels


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, data: np.ndarray | None = None, spacing: float = 1.0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(label_map() if data is None else data, np.diag([spacing, 1.0, 1.0, 1.0]))
        nib.save(image, path)
        return path

    return write


@pytest.fixture
def folders(save: Save, tmp_path: Path) -> tuple[Path, Path]:
    """Segmentations as `ppl-seg segment` writes them, one of them off by a voxel, and the truth."""
    for sub, start in (("01", 2), ("02", 3)):
        save(f"seg/sub-{sub}/anat/sub-{sub}_seg-ppl_desc-T1w_dseg.nii.gz", label_map(start))
        save(f"seg/sub-{sub}/anat/sub-{sub}_seg-ppl_desc-T1w_entropy.nii.gz")
        save(f"truth/sub-{sub}_dseg.nii.gz")
    return tmp_path / "seg", tmp_path / "truth"


def test_folders_match_by_entities(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "scores.tsv"
    found = evaluate(*folders, out=out)
    assert [row["structure"] for row in found.rows] == ["label-17", "label-53"] * 2
    assert [row["dice"] for row in found.rows] == [1.0, 1.0, 0.75, 0.75]
    assert found.rows[2]["scan"] == "sub-02/anat/sub-02_seg-ppl_desc-T1w_dseg.nii.gz"
    assert (found.rows[2]["truth"], found.rows[2]["person"]) == ("sub-02_dseg.nii.gz", "sub-02")
    assert [row["structure"] for row in found.summary] == ["label-17", "label-53", "mean"]
    mean = found.summary[-1]
    assert (mean["dice"], mean["dice_low"], mean["dice_high"], mean["scans"]) == (0.875, 0.75, 1.0, 2)
    assert (found.unmatched, found.exit_code) == ([], 0)
    assert "no --labels" in found.messages[0]
    written = read_table(out)
    assert tuple(written[0]) == ROW_COLUMNS and len(written) == 4
    assert written[3]["dice"] == "0.7500" and written[3]["volume_mm3"] == "16.0000"


def test_the_interval_is_over_persons(save: Save, tmp_path: Path) -> None:
    for name, start in (("sub-1_run-1", 2), ("sub-1_run-2", 2), ("sub-2_run-1", 4), ("sub-2_run-2", 4)):
        save(f"seg/{name}_seg-ppl_desc-T1w_dseg.nii.gz", label_map(start))
        save(f"truth/{name}_dseg.nii.gz")
    mean = evaluate(tmp_path / "seg", tmp_path / "truth").summary[-1]
    assert (mean["dice"], mean["dice_low"], mean["dice_high"]) == (0.75, 0.5, 1.0)


def test_labels_beside_the_segmentations_and_given(
    folders: tuple[Path, Path], tmp_path: Path, make_segmentation: Callable
) -> None:
    seg, truth = folders
    write_label_table(seg, make_segmentation().table)
    beside = evaluate(seg, truth)
    assert [row["structure"] for row in beside.summary[:-1]] == ["Left-Hippocampus", "Right-Hippocampus"]
    assert beside.messages == [f"structures are named by {seg / TABLE}"]
    labels = tmp_path / "labels.tsv"
    labels.write_text("index\tname\n17\tfirst\n99\tnowhere\n")
    given = evaluate(seg, truth, labels=labels)
    assert [row["structure"] for row in given.summary] == ["first", "mean"]
    assert given.messages == [f"{labels}: values 53 are not in it; they are not scored"]
    groups = tmp_path / "groups.tsv"
    groups.write_text("index\tgroup\n17\tboth\n53\tboth\n")
    joined = evaluate(seg, truth, groups=groups)
    assert [row["volume_mm3"] for row in joined.rows] == [80.0, 80.0] and joined.messages == []
    groups.write_text("index\tgroup\n5\tnothing\n")
    with pytest.raises(InputError, match="none of its structures occurs.*17, 53"):
        evaluate(seg, truth, groups=groups)


def test_names_that_are_not_bids_match_by_path(save: Save, tmp_path: Path) -> None:
    for name in ("a/one", "b/one", "two"):
        save(f"seg/{name}_dseg.nii.gz")
        save(f"truth/{name}.nii.gz")
    found = evaluate(tmp_path / "seg", str(tmp_path / "truth" / "**" / "*.nii.gz"))
    assert [row["scan"] for row in found.rows[::2]] == [f"{n}_dseg.nii.gz" for n in ("a/one", "b/one", "two")]
    assert {row["person"] for row in found.rows} == {row["scan"] for row in found.rows}


def test_a_folder_names_the_person(save: Save, tmp_path: Path) -> None:
    save("seg/sub-7/brain_dseg.nii.gz")
    save("truth/sub-7/brain_dseg.nii.gz")
    assert evaluate(tmp_path / "seg", tmp_path / "truth").rows[0]["person"] == "sub-7"


def test_two_folders_of_equal_names_stay_apart(save: Save, tmp_path: Path) -> None:
    for run, start in (("one", 2), ("two", 4)):
        save(f"{run}/sub-1_desc-T1w_dseg.nii.gz", label_map(start))
    truth = save("truth/sub-1_dseg.nii.gz")
    found = evaluate([tmp_path / "one", tmp_path / "two"], truth)
    assert len({row["scan"] for row in found.rows}) == 2
    assert found.summary[-1]["dice"] == 0.75 and found.summary[-1]["scans"] == 2
    assert {row["person"] for row in found.rows} == {"sub-1"}


def test_outputs_of_freesurfer_subjects_match_the_subjects(save: Save, tmp_path: Path) -> None:
    parcels = label_map()
    parcels[8:, :, :] = 3
    truth = parcels.astype(np.int32)
    truth[8:, :5, :] = 1001
    for subject in ("bert", "fred"):
        save(f"seg/{subject}/mri/orig_dseg.nii.gz", parcels)
        path = tmp_path / "subjects" / subject / "mri" / "aseg.mgz"
        path.parent.mkdir(parents=True)
        nib.save(nib.MGHImage(truth, np.eye(4)), path)
    labels = tmp_path / "seg" / TABLE
    labels.write_text("index\tname\n3\tLeft-Cerebral-Cortex\n17\tLeft-Hippocampus\n53\tRight-Hippocampus\n")
    found = evaluate(tmp_path / "seg", tmp_path / "subjects")
    assert found.unmatched == [] and {row["dice"] for row in found.rows} == {1.0}
    assert [row["structure"] for row in found.summary][0] == "Left-Cerebral-Cortex"
    assert {row["person"] for row in found.rows} == {"bert", "fred"}
    assert "1 cortical and white matter parcels" in found.messages[1]


def test_absent_structures(save: Save, tmp_path: Path) -> None:
    only_one = np.where(label_map() == 17, 17, 0).astype(np.uint8)
    seg = save("seg/sub-1_dseg.nii.gz", only_one), save("seg/sub-2_dseg.nii.gz", only_one)
    save("truth/sub-1_dseg.nii.gz", only_one)
    save("truth/sub-2_dseg.nii.gz")
    out = tmp_path / "scores.tsv"
    found = evaluate(seg, tmp_path / "truth", out=out)
    rows = [row for row in read_table(out) if row["structure"] == "label-53"]
    assert [(row["dice"], row["hd95_mm"], row["missed"]) for row in rows] == [
        ("", "", "0"),
        ("0.0000", "", "1"),
    ]
    assert [row["missed"] for row in found.summary] == [0, 1, 1]


def test_what_is_odd_about_a_file_is_said(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "sub-01_dseg.nii.gz"
    image = nib.load(path)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    with pytest.raises(InputError, match="evaluate in the scan's own voxels"):
        evaluate(*folders)  # a header without forms centres the image
    for file in folders[0].rglob("sub-01*_dseg.nii.gz"):
        nib.save(nib.Nifti1Image(np.asarray(nib.load(file).dataobj), None, image.header), file)
    assert sum("left and right are unknown" in message for message in evaluate(*folders).messages) == 2


def test_files_without_counterpart_are_listed(folders: tuple[Path, Path], save: Save) -> None:
    extra, lost = save("seg/sub-03_dseg.nii.gz"), save("truth/sub-04_dseg.nii.gz")
    found = evaluate(*folders)
    assert found.unmatched == [extra, lost] and found.exit_code == 1
    assert found.summary[-1]["scans"] == 2
    with pytest.raises(InputError, match="no segmentation matches.*sub-03.*sub-04"):
        evaluate(extra, lost)


def test_different_grids_are_an_error_before_the_work(folders: tuple[Path, Path], save: Save, tmp_path: Path) -> None:
    save("truth/sub-02_dseg.nii.gz", spacing=2.0)
    out = tmp_path / "scores.tsv"
    with pytest.raises(InputError, match="its grid is 12x10x8 .*that of .*truth.*is 12x10x8") as error:
        evaluate(*folders, out=out)
    assert "sub-02_seg-ppl" in str(error.value) and not out.exists()


def test_bad_inputs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    seg, truth = folders
    with pytest.raises(InputError, match="given as segmentation and as truth"):
        evaluate(truth, truth)
    with pytest.raises(InputError, match="no such file"):
        evaluate(tmp_path / "none", truth)
    with pytest.raises(InputError, match="a folder; give a file"):
        evaluate(seg, truth, out=tmp_path)
    with pytest.raises(InputError, match="none.tsv: no such file"):
        evaluate(seg, truth, groups=tmp_path / "none.tsv")


def test_a_table_with_other_scores_is_kept(folders: tuple[Path, Path], save: Save, tmp_path: Path) -> None:
    out = tmp_path / "scores.tsv"
    evaluate(*folders, out=out)
    before = out.read_text()
    evaluate(*folders, out=out)
    save("seg/sub-02/anat/sub-02_seg-ppl_desc-T1w_dseg.nii.gz")
    with pytest.raises(InputError, match="--force replaces it"):
        evaluate(*folders, out=out)
    assert out.read_text() == before
    evaluate(*folders, out=out, force=True)
    assert {row["dice"] for row in read_table(out)} == {"1.0000"}


def test_a_truth_that_several_share_is_said(save: Save, tmp_path: Path) -> None:
    data = np.zeros((4, 4, 4), np.uint8)
    data[1:3] = 1
    save("truth/sub-01_dseg.nii.gz", data)
    for visit in (1, 2):
        save(f"found/sub-01_ses-{visit}_dseg.nii.gz", data)
    found = evaluate(tmp_path / "found", tmp_path / "truth")
    assert any("2 segmentations share 1 true label maps" in message for message in found.messages)
    assert np.isnan(found.summary[0]["dice_low"])
