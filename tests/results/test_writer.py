from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.names import output_location
from ppl_seg.errors import InputError
from ppl_seg.results.dataset import append_log, check_room, listed_scans, merged_volumes, write_dataset_files
from ppl_seg.results.tables import read_table, write_table
from ppl_seg.results.volumes import volume_rows
from ppl_seg.results.writer import earlier_result, recorded, write_segmentation


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
    assert (sidecar["ModelHash"], sidecar["Seed"], sidecar["Command"]) == ("abc", 3, "Python API")
    assert sidecar["Sources"] == [str(seg.image.path)] and len(sidecar["SourceHashes"][0]) == 64
    assert list(sidecar["Seconds"]) == ["read", "infer", "write", "total"]
    assert sidecar["Seconds"]["total"] == pytest.approx(1.5 + sidecar["Seconds"]["write"], abs=1e-3)
    assert sidecar["Quality"] == pytest.approx(0.8)
    stated = json.dumps(sidecar["Machine"])
    assert "CPUs" in stated and platform.node() not in stated and getpass.getuser() not in stated
    lut = (out / "seg-ppl_dseg_lut.txt").read_text().splitlines()
    assert lut[2].split() == ["17", "Left-Hippocampus", "220", "216", "20", "0"]


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
    assert len(wide) == 2 and wide[0]["Left-Hippocampus"] == "72.0000"
    assert wide[0]["brain_volume_mm3"] == "n/a"  # a hippocampus is no brain


def test_what_is_there_already(make_segmentation, out):
    seg, location = make_segmentation(), (Path("a"), "scan")

    def state(options=seg.provenance["options"], model_hash="abc", sources=(seg.image.path,), endings=()):
        return earlier_result(out, location, options, model_hash, sources, listed_scans(out), endings)

    assert recorded(out, location) is None and state() == "absent"
    write_segmentation(seg, out, location)
    assert state() == "complete" == state(endings=["entropy.nii.gz"])
    assert state(endings=["probseg.nii.gz"]) == "partial"
    assert state(options={**seg.provenance["options"], "draws": 6}) == "other" == state(model_hash="other")
    assert state(sources=(out / "seg-ppl_dseg.tsv",)) == "other" and state(sources=(out / "none",)) == "partial"
    (out / "volumes_wide.tsv").rename(out / "w.tsv")
    assert state() == "partial"  # its rows are gone
    (out / "w.tsv").rename(out / "volumes_wide.tsv")
    assert state() == "complete"
    (out / "a" / "scan_qc.png").unlink()
    assert state() == "partial"


def test_results_of_other_channels_have_rows_of_their_own(make_segmentation, out):
    seg = make_segmentation()
    flair = Path(seg.image.path).with_name("sub-01_FLAIR.nii.gz")
    flair.write_bytes(Path(seg.image.path).read_bytes())
    both = replace(seg, provenance={**seg.provenance, "sources": [str(seg.image.path), str(flair)]})
    write_segmentation(seg, out, (Path("a"), "sub-01_desc-T1w"))
    write_segmentation(both, out, (Path("a"), "sub-01_desc-T1wFLAIR"))
    assert listed_scans(out) == {"a/sub-01_T1w.nii.gz", "a/sub-01_T1w.nii.gz+sub-01_FLAIR.nii.gz"}


@pytest.mark.parametrize("broken", ["ppl_seg.results.figures.qc_figure", "ppl_seg.results.writer.head_size"])
def test_an_interrupted_writing_leaves_what_was_there(make_segmentation, out, monkeypatch, broken):
    seg, location = make_segmentation(), (Path("a"), "scan")
    write_segmentation(seg, out, location)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, fail)
    with pytest.raises(KeyboardInterrupt):
        write_segmentation(replace(seg, label_map=seg.label_map * 0), out, location)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_same_segmentation_is_the_same_files(make_segmentation, tmp_path):
    seg = make_segmentation()
    for name in ("one", "two"):
        write_segmentation(seg, tmp_path / name, (Path("a"), "scan"), probabilities=True, save_draws=True)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.name != "scan_dseg.json":  # holds the seconds of its writing
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


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
    check_room(out, 1000, 3)
    with pytest.raises(InputError, match="--probabilities"):
        check_room(out, 10**15, 300)


def test_tables_keep_what_was_there(make_segmentation, out):
    out.mkdir()

    def merge(scan, **sizes):
        for name, text in merged_volumes(out, volume_rows(make_segmentation(), scan), sizes).items():
            (out / name).write_text(text)

    merge("b", brain_volume_mm3=1.0)
    before = (out / "volumes.tsv").read_text()
    merge("a")
    merge("b", brain_volume_mm3=2.0)
    assert (out / "volumes.tsv").read_text().endswith(before.split("\n", 1)[1])
    wide = read_table(out / "volumes_wide.tsv")
    assert [(row["scan"], row["brain_volume_mm3"]) for row in wide] == [("a", "n/a"), ("b", "2.0000")]
    write_table(out / "x.tsv", [{"a": float("nan"), "b": None}, {"c": True}])
    assert (out / "x.tsv").read_text() == "a\tb\tc\n\tn/a\tn/a\nn/a\tn/a\ttrue\n"


def test_importing_the_dataclass_is_light():
    heavy = ("torch", "arviz", "monai", "matplotlib")
    code = f"import sys, ppl_seg.results.segmentation; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
