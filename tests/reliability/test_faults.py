"""A full disk, a folder that may not be written, two runs at once, a long cohort: one line, and nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Ask, content, fit, is_temporary, segment, write_scans


def check_refused(answer: Any, words: str) -> None:
    assert answer.code in (1, 2) and answer.stderr.count("\n") <= 2 and words in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("room", [20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 1500))])
def test_a_disk_that_fills_up(ask: Ask, scans: Path, tmp_path: Path, room: int) -> None:
    """A limit on the size of files stands for the disk: what comes first fails, the tables, images or the picture."""
    out = tmp_path / "out"
    assert ask(*segment(scans, out)).code == 0
    before = content(out)
    check_refused(ask(*segment(scans, out, "--draws", 4, "--force"), file_size=room), "cannot write")
    assert content(out) == before
    assert ask(*segment(scans, out, "--draws", 4, "--force")).code == 0


@pytest.mark.parametrize("room", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_in_training(ask: Ask, scans: Path, tmp_path: Path, room: int) -> None:
    out = tmp_path / "out"
    check_refused(ask(*fit(scans, out), file_size=room), "cannot write")
    assert not (out / "config.json").exists() and not any(map(is_temporary, content(out)))
    assert ask(*fit(scans, out, "--resume")).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 250 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_small_disk(ask: Ask, small_disk: Path, tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 6)
    check_refused(ask(*segment(scans, small_disk)), "No space left on device")
    done = [path for path in small_disk.rglob("*_dseg.json")]
    assert 0 < len(done) < 6
    assert not any(map(is_temporary, content(small_disk)))
    whole = tmp_path / "whole"
    assert ask(*segment(scans, whole)).code == 0
    for path in done:
        stem = path.name.removesuffix("_dseg.json")
        for file in path.parent.glob(f"{stem}_*.nii.gz"):
            assert file.read_bytes() == (whole / file.relative_to(small_disk)).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="root obeys permissions on request")
@pytest.mark.parametrize("command", [segment, fit])
def test_permission_denied(ask: Ask, scans: Path, tmp_path: Path, command: Any) -> None:
    tmp_path.chmod(0o555)
    check_refused(ask(*command(scans, tmp_path / "out"), plain=True), "Permission denied")
    tmp_path.chmod(0o755)
    (tmp_path / "out").mkdir(mode=0o555)
    check_refused(ask(*command(scans, tmp_path / "out"), plain=True), "Permission denied")
    assert not list((tmp_path / "out").iterdir())


def test_one_folder_of_one_person_cannot_be_written(ask: Ask, scans: Path, tmp_path: Path) -> None:
    """Unlike a full disk this is one scan's failure."""
    (tmp_path / "out" / "sub-000").mkdir(parents=True)
    (tmp_path / "out" / "sub-000" / "anat").write_text("in the way")
    answer = ask(*segment(scans, tmp_path / "out"))
    assert answer.code == 1 and "sub-000" in answer.stderr and "1 failed, 1 ok" in answer.stderr
    assert len(list((tmp_path / "out").rglob("*_dseg.json"))) == 1


def test_two_runs_at_once(ask: Ask, scans: Path, tmp_path: Path) -> None:
    """The same scan by both, and another one by one of them: as if they had run one after the other."""
    first, second = sorted(scans.iterdir())
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert ask(*segment(scans, alone)).code == 0
    for answer in ask(*segment(scans, both), together=segment(first, both)):
        assert answer.code == 0, answer.stderr
    expected, found = content(alone), content(both)
    for description in (expected, found):
        description.pop("dataset_description.json")  # the folders of the sources, in the order they came
    assert found == expected
    assert "volumes.tsv" in found and second.name.encode() in found["volumes.tsv"]


def test_what_a_living_run_writes_is_not_stale(tmp_path: Path) -> None:
    from ppl_seg.results.staging import remove_stale, staging

    with staging(tmp_path, tmp_path / "a") as stage:
        (stage / "file").touch()
        remove_stale(tmp_path, [tmp_path / "a"])
        assert (stage / "file").exists()
        shutil.copytree(stage, tmp_path / "a" / ".tmp-dead")  # what a process that was killed leaves
        (tmp_path / "a" / ".tmp-dead.json").touch()
        remove_stale(tmp_path, [tmp_path / "a"])
        assert {path.name for path in (tmp_path / "a").iterdir()} == {stage.name}
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_cohort_with_bad_scans(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % bad ones: all others done, the bad ones listed, exit code 1, memory flat."""
    from ppl_seg.api import segment_scans
    from ppl_seg.results import writer

    from .conftest import MODEL

    if number == 20:
        for picture in ("figures.qc_figure", "alignment_figure.alignment_figure"):
            monkeypatch.setattr(f"ppl_seg.results.{picture}", lambda _, path: Path(path).touch())
    scans = write_scans(tmp_path / "scans", number)
    paths = sorted(scans.iterdir())
    bad = paths[3::20]
    for n, path in enumerate(bad):
        whole = path.read_bytes()
        path.write_bytes([b"", b"not an image", whole[: len(whole) // 2]][n % 3])
    peaks: list[int] = []
    write = writer.write_segmentation

    def measured(*arguments: Any) -> Any:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return write(*arguments)

    monkeypatch.setattr(writer, "write_segmentation", measured)
    report = segment_scans([scans], model=MODEL, out=tmp_path / "out", draws=3, refine=1)
    failed = [row["scan"] for row in report.rows if row["status"] == "failed"]
    assert report.exit_code == 1 and failed == [str(path) for path in bad] and len(bad) == number // 20
    assert len(list((tmp_path / "out").rglob("*_dseg.json"))) == number - len(bad)
    assert len((tmp_path / "out" / "volumes_wide.tsv").read_text().splitlines()) == 1 + number - len(bad)
    settled = len(peaks) // 2
    assert peaks[-1] - peaks[settled] < 30_000, np.diff(peaks[settled:])  # kB
