from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.api.model import Model
from ppl_seg.api.run import segment_scans
from ppl_seg.errors import InputError

FORMAT_1 = Path(__file__).parents[1] / "inference" / "format-1"


def write(path: Path, data: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def test_another_mask_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    scan = write(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(100, 10, (8, 8, 6)).astype(np.float32))
    mask = np.ones((8, 8, 6), np.uint8)
    path = write(tmp_path / "brain_mask.nii.gz", mask)

    def again() -> str:
        options: dict[str, Any] = {"model": FORMAT_1, "out": tmp_path / "out", "mask": path, "draws": 2, "refine": 0}
        return str(segment_scans([scan], **options).rows[0]["status"])

    assert [again(), again()] == ["ok", "skipped"]
    mask[0] = 0
    write(path, mask)
    with pytest.raises(InputError, match="made from another scan, mask, model or options"):
        again()


def test_a_label_map_that_somebody_drew_is_kept(tmp_path: Path) -> None:
    scan = write(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(100, 10, (8, 8, 6)).astype(np.float32))
    out = tmp_path / "out"
    out.mkdir()
    before = write(out / "scan_dseg.nii.gz", np.ones((8, 8, 6), np.uint8)).read_bytes()
    with pytest.raises(InputError, match="or not by ppl_seg; choose another --out, or --force"):
        segment_scans([scan], model=FORMAT_1, out=out, draws=2, refine=0)
    assert [path.name for path in out.iterdir()] == ["scan_dseg.nii.gz"]
    assert (out / "scan_dseg.nii.gz").read_bytes() == before
    assert segment_scans([scan], model=FORMAT_1, out=out, draws=2, refine=0, force=True).exit_code == 0


def test_an_error_that_nobody_foresaw_ends_one_scan_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, segment = np.random.default_rng(0), Model.segment
    for name in ("bad", "good"):
        write(tmp_path / f"{name}.nii.gz", random.normal(100, 10, (8, 8, 6)).astype(np.float32))

    def singular(self: Model, scan: Any, **options: Any) -> Any:
        if scan[0].name == "bad.nii.gz":
            raise np.linalg.LinAlgError("SVD did not converge")
        return segment(self, scan, **options)

    monkeypatch.setattr(Model, "segment", singular)
    scans = [tmp_path / "bad.nii.gz", tmp_path / "good.nii.gz"]
    report = segment_scans(scans, model=FORMAT_1, out=tmp_path / "out", draws=2, refine=0)
    assert [row["status"] for row in report.rows] == ["failed", "ok"] and report.exit_code == 1
    assert report.rows[0]["message"] == "LinAlgError: SVD did not converge"
