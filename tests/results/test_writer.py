from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.names import output_location
from ppl_seg.errors import InputError
from ppl_seg.results.dataset import append_log, check_room, merge_volumes, write_dataset_files
from ppl_seg.results.tables import read_table, write_table
from ppl_seg.results.volumes import volume_rows
from ppl_seg.results.writer import is_complete, recorded, write_segmentation


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_files_of_one_segmentation(make_segmentation, out):
    seg = make_segmentation()
    location = output_location(seg.image.path)
    files = write_segmentation(seg, out, location, probabilities=True, save_draws=True)
    names = {file.name.removeprefix("sub-01_seg-ppl_desc-T1w_") for file in (out / "sub-01" / "anat").iterdir()}
    assert names == {
        "dseg.nii.gz", "dseg.json", "entropy.nii.gz", "probseg.nii.gz", "probseg.json", "draws.nii.gz",
        "posterior.nc", "qc.png",
    }  # fmt: skip
    assert all(file.is_file() for file in files) and files[-1].name.endswith("_dseg.json")

    by_name = {file.name.rsplit("_", 1)[-1]: file for file in files}
    label_map = nib.load(by_name["dseg.nii.gz"])
    assert label_map.get_data_dtype() == np.uint8 and np.allclose(label_map.affine, seg.image.affine)
    assert label_map.header["descrip"].item() == b""
    assert np.array_equal(np.asarray(label_map.dataobj), seg.label_map)
    draws = nib.load(by_name["draws.nii.gz"])
    assert draws.shape == (10, 12, 6, 5) and draws.get_data_dtype() == np.uint8
    probabilities = nib.load(by_name["probseg.nii.gz"])
    assert probabilities.get_data_dtype() == np.uint8
    assert np.moveaxis(probabilities.get_fdata(), -1, 0) == pytest.approx(seg.probabilities, abs=0.002)
    assert json.loads(by_name["probseg.json"].read_text())["LabelMap"] == list(seg.table.names)
    assert nib.load(by_name["entropy.nii.gz"]).get_data_dtype() == np.float32
    assert read_table(out / "seg-ppl_dseg.tsv")[1]["index"] == "17"

    sidecar = json.loads(by_name["dseg.json"].read_text())
    assert (sidecar["ModelHash"], sidecar["Seed"], sidecar["Seconds"]) == ("abc", 3, 1.5)
    assert sidecar["Sources"] == [str(seg.image.path)]


def test_volume_tables_merge_by_scan(make_segmentation, out):
    for name in ("sub-02_T1w.nii.gz", "sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz"):
        seg = make_segmentation(name=name)
        write_segmentation(seg, out, output_location(name))
    rows = read_table(out / "volumes.tsv")
    assert [row["scan"] for row in rows] == ["sub-01/anat/sub-01_T1w.nii.gz"] * 2 + [
        "sub-02/anat/sub-02_T1w.nii.gz"
    ] * 2
    assert rows[0] == {
        "scan": "sub-01/anat/sub-01_T1w.nii.gz", "structure": "Left-Hippocampus", "volume_mm3": "72.0000",
        "q05": "5.0000", "q50": "50.0000", "q95": "95.0000", "draws": "5", "touches_border": "false",
        "quality": "0.8000",
    }  # fmt: skip
    assert rows[1]["quality"] == "n/a" and rows[1]["touches_border"] == "true"
    wide = read_table(out / "volumes_wide.tsv")
    assert len(wide) == 2 and wide[0]["brain_volume_mm3"] == "75.0000"


def test_complete_means_the_same_options_and_all_files(make_segmentation, out):
    seg, location = make_segmentation(), (Path("a"), "scan")
    options = seg.provenance["options"]
    assert recorded(out, location) is None and not is_complete(out, location, options)
    write_segmentation(seg, out, location)
    assert is_complete(out, location, options) and is_complete(out, location, options, model_hash="abc")
    assert not is_complete(out, location, {**options, "draws": 6})
    assert not is_complete(out, location, options, model_hash="other")
    (out / "a" / "scan_qc.png").unlink()
    assert not is_complete(out, location, options) and recorded(out, location) is not None


def test_an_interrupted_writing_is_not_complete(make_segmentation, out, monkeypatch):
    seg, location = make_segmentation(), (Path("a"), "scan")
    write_segmentation(seg, out, location)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppl_seg.results.figures.qc_figure", fail)
    with pytest.raises(KeyboardInterrupt):
        write_segmentation(seg, out, location)
    assert not is_complete(out, location, seg.provenance["options"])
    assert not [file for file in out.rglob("*") if file.name.startswith(".")]


def test_files_of_an_earlier_run_with_more_options_go(make_segmentation, out):
    seg, location = make_segmentation(), (Path("a"), "scan")
    write_segmentation(seg, out, location, probabilities=True, save_draws=True)
    (out / "a" / "scan_notes.txt").write_text("the user's")
    write_segmentation(seg, out, location)
    left = {file.name for file in (out / "a").iterdir()}
    assert left == {
        f"scan_{n}" for n in ("dseg.nii.gz", "dseg.json", "entropy.nii.gz", "posterior.nc", "qc.png", "notes.txt")
    }


def test_a_second_label_table_is_refused_before_anything_is_written(make_segmentation, out):
    write_segmentation(make_segmentation(), out, (Path(), "one"))
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match=r"seg-ppl_dseg.tsv: .*other labels; choose another --out"):
        write_segmentation(make_segmentation(names=("A", "B")), out, (Path(), "two"))
    assert sorted(out.rglob("*")) == before


def test_what_is_asked_for_must_be_there(make_segmentation, out):
    with pytest.raises(ValueError, match="probabilities"):
        write_segmentation(make_segmentation(probabilities=None), out, (Path(), "x"), probabilities=True)
    with pytest.raises(ValueError, match="draws"):
        write_segmentation(replace(make_segmentation(), draws=None), out, (Path(), "x"), save_draws=True)
    assert not out.exists()


def test_a_folder_that_is_a_file_is_one_line(make_segmentation, out):
    out.mkdir()
    (out / "a").write_text("")
    with pytest.raises(InputError):
        write_segmentation(make_segmentation(), out, (Path("a"), "scan"))


def test_dataset_files(out, tmp_path):
    write_dataset_files(out, [tmp_path / "one"], "0.1.0")
    (out / "README").write_text("mine")
    write_dataset_files(out, [tmp_path / "one", tmp_path / "two"], "0.1.1")
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"] == [{"Name": "ppl_seg", "Version": "0.1.1"}]
    assert [source["URL"][-3:] for source in description["SourceDatasets"]] == ["one", "two"]
    assert (out / "README").read_text() == "mine"
    ignored = (out / ".bidsignore").read_text().splitlines()
    assert "*_entropy.nii.gz" in ignored and len(ignored) == len(set(ignored))


def test_another_dataset_is_not_written_into(out):
    out.mkdir()
    (out / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.8.0"}')
    with pytest.raises(InputError, match="another dataset"):
        write_dataset_files(out, [], "0.1.0")
    assert "raw" in (out / "dataset_description.json").read_text()
    (out / "dataset_description.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        write_dataset_files(out, [], "0.1.0")


def test_log_lines_are_appended(out):
    append_log(out, "ppl-seg segment a\nversion 0.1.0")
    append_log(out, "done")
    lines = (out / "log.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[1].endswith(" version 0.1.0") and lines[0].startswith("20")


def test_room_is_checked(out):
    check_room(out, (10, 10, 10), 3)
    with pytest.raises(InputError, match="--probabilities"):
        check_room(out, (100_000, 100_000, 100_000), 300)


def test_tables_keep_what_was_there(make_segmentation, out):
    rows = volume_rows(make_segmentation(), "b")
    merge_volumes(out, rows)
    before = (out / "volumes.tsv").read_text()
    merge_volumes(out, volume_rows(make_segmentation(), "a"))
    merge_volumes(out, rows)
    assert (out / "volumes.tsv").read_text().endswith(before.split("\n", 1)[1])
    write_table(out / "x.tsv", [{"a": float("nan"), "b": None}, {"c": True}])
    assert (out / "x.tsv").read_text() == "a\tb\tc\n\tn/a\tn/a\nn/a\tn/a\ttrue\n"


def test_importing_the_dataclass_is_light():
    heavy = ("torch", "arviz", "monai", "matplotlib")
    code = f"import sys, ppl_seg.results.segmentation; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
