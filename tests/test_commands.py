"""The real commands, one after another, on tiny ellipsoids made here; and what they say to bad input."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg import __version__

SHAPE = (16, 18, 12)
Run = Callable[..., tuple[str, str]]
Ask = Callable[..., str]


@dataclass(frozen=True)
class Study:
    """Folders of label maps, scans and their truth, of the models, the segmentations."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def scan(self, sub: str = "01") -> Path:
        return self.root / "scans" / f"sub-{sub}_T1w.nii.gz"


def ellipsoids(random: np.random.Generator) -> np.ndarray:
    """Two neighbours, labels 1 and 2, that differ from map to map."""
    axes = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - (np.array(SHAPE) - 1) / 2
    distance = (((axes - random.normal(0, 0.5, 3)) / random.uniform(0.9, 1.1, 3) / (4.5, 5.5, 3.5)) ** 2).sum(-1)
    return np.where(distance < 1, np.where(axes[..., 1] > 0, 2, 1), 0).astype(np.uint8)


def save(path: Path, data: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([-spacing, spacing, spacing, 1.0])), path)
    return path


def scan_of(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return (np.array([60.0, 100.0, 110.0])[labels] + random.normal(0, 8, SHAPE)).astype(np.float32)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ppl_seg", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """prior → fit → segment, as separate processes."""
    random = np.random.default_rng(0)
    study = Study(tmp_path_factory.mktemp("study"))
    for n in range(9):
        save(study.maps / f"sub-{n:02}_dseg.nii.gz", ellipsoids(random))
    for n in range(1, 4):
        labels = ellipsoids(random)
        save(study.truth / f"sub-{n:02}_dseg.nii.gz", labels)
        save(study.scan(f"{n:02}"), scan_of(labels, random))
    small = ("--steps", 6, "--threads", 1)
    done = command("prior", study.maps, "--out", study.prior, "--latent-dim", 4, *small)
    assert done.stdout == f"{study.prior}\n" and "label-1, label-2" in done.stderr
    command("fit", study.scans, "--prior", study.prior, "--out", study.fitted, *small)
    done = command("segment", study.scans, "--model", study.fitted, "--out", study.out, "--draws", 8)
    assert done.stdout.count("│ ok") == 3
    return study


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Run:
    """run(*arguments, code=0) in this process gives (stdout, stderr)."""

    def call(*arguments: object, code: int = 0) -> tuple[str, str]:
        found, out, err = run(*arguments)
        assert found == code, out + err
        return out, err

    return call


@pytest.fixture
def ask(run: Run) -> Ask:
    """ask(*arguments) of bad input gives the one line on stderr; nothing else may be printed."""

    def call(*arguments: object) -> str:
        out, err = run(*arguments, code=2)
        assert out == "" and err.startswith("ppl-seg: ") and err.count("\n") == 1, out + err
        return err

    return call


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_models_are_complete(study: Study) -> None:
    for folder in (study.prior, study.fitted):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "weights.safetensors", "training.csv", "report.json", "training.png"} <= names
        assert not any("checkpoint" in name or name.startswith(".") for name in names)
    assert (study.prior / "draws.png").is_file()


def test_segmentations_are_where_they_belong(study: Study) -> None:
    stem = "sub-01/anat/sub-01_seg-ppl_desc-T1w"
    found = {str(path.relative_to(study.out)) for path in study.out.rglob("*") if path.is_file()}
    ends = ("dseg.nii.gz", "dseg.json", "entropy.nii.gz", "posterior.nc", "qc.png", "align.png")
    ends += ("from-T1w_to-prior_mode-image_xfm.tfm",)
    shared = {"seg-ppl_dseg.tsv", "seg-ppl_dseg_lut.txt", "volumes.tsv", "volumes_wide.tsv"}
    shared |= {"dataset_description.json", "README"}
    expected = shared | {f"{stem}_{end}".replace("01", sub) for end in ends for sub in ("01", "02", "03")}
    assert found == expected | {".bidsignore", "log.txt"}
    image, scan = nib.load(study.out / f"{stem}_dseg.nii.gz"), nib.load(study.scan())
    assert image.shape == SHAPE and np.array_equal(image.affine, scan.affine)
    assert image.get_data_dtype() == np.uint8
    with (study.out / "volumes.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 6 and {row["draws"] for row in rows} == {"8"}
    assert json.loads((study.out / f"{stem}_dseg.json").read_text())["Sources"] == [str(study.scan())]


def test_the_log_and_the_sidecars_say_what_was_run(study: Study) -> None:
    log = (study.out / "log.txt").read_text()
    about, machine, *scans, summary = log.splitlines()
    assert f"ppl_seg {__version__}: ppl-seg segment {study.scans} --model" in about
    assert "'CPUs': " in machine and "'Torch': " in machine and "options {'recipe'" in machine
    stages = r"\(read \S+, align \S+, infer \S+, readout \S+, write \S+\)"
    assert all(re.search(rf" ok \S+T1w.nii.gz \S+ s {stages} quality 0\.\d+$", line) for line in scans)
    assert summary.endswith(f"3 ok; results: {study.out}")
    sidecar = json.loads((study.out / "sub-01/anat/sub-01_seg-ppl_desc-T1w_dseg.json").read_text())
    assert sidecar["Command"].startswith("ppl-seg segment") and 0 < sidecar["Quality"] <= 1
    reports = [json.loads((folder / "report.json").read_text()) for folder in (study.prior, study.fitted)]
    assert [report["command"].split()[1] for report in reports] == ["prior", "fit"]
    assert all({"version", "machine", "stages"} <= report.keys() for report in reports)
    assert not any(platform.node() in text for text in (log, str(sidecar["Machine"]), str(reports)))


def test_more_files_need_no_force(study: Study, run: Run, tmp_path: Path) -> None:
    shutil.copytree(study.out, tmp_path / "out")
    command = ("segment", study.scans, "--model", study.fitted, "--out", tmp_path / "out", "--draws", 8)
    assert run(*command, "--probabilities")[0].count("│ ok") == 3
    assert run(*command, "--probabilities")[0].count("│ skipped") == 3
    assert run(*command)[0].count("│ skipped") == 3
    save(tmp_path / "sub-01_T1w.nii.gz", scan_of(ellipsoids(np.random.default_rng(9)), np.random.default_rng(9)))
    other = ("segment", tmp_path / "sub-01_T1w.nii.gz", *command[2:])
    assert "made from another scan, mask, model or options" in run(*other, code=2)[1]


def test_segment_again_skips(study: Study, run: Run) -> None:
    before = snapshot(study.out)
    screen, _ = run("segment", study.scans, "--model", study.fitted, "--out", study.out, "--draws", 8)
    assert screen.count("│ skipped") == 3
    after = snapshot(study.out)
    before.pop("log.txt"), after.pop("log.txt")
    assert before == after


def test_evaluate(study: Study, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "scores.tsv"
    screen, err = run("evaluate", study.out, study.truth, "--out", out)
    assert "label-1" in screen and "mean" in screen and "seg-ppl_dseg.tsv" in err
    with out.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["person"] for row in rows[::2]] == ["sub-01", "sub-02", "sub-03"]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)


def test_a_prior_segments_one_scan(study: Study, run: Run, tmp_path: Path) -> None:
    options = ("--refine", 2, "--draws", 3, "--probabilities", "--save-draws", "--readout", "decoder")
    screen, _ = run("segment", study.scan(), "--model", study.prior, "--out", tmp_path, *options)
    assert "│ ok" in screen
    stem = tmp_path / "sub-01/anat/sub-01_seg-ppl_desc-T1w"
    assert nib.load(f"{stem}_draws.nii.gz").shape == (*SHAPE, 3)
    assert nib.load(f"{stem}_probseg.nii.gz").shape == (*SHAPE, 3)


def test_one_bad_scan_among_others(study: Study, run: Run, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(study.scans, scans)
    (scans / "sub-02_T1w.nii.gz").write_bytes(b"not an image")
    save(scans / "sub-03_T1w.nii.gz", np.full(SHAPE, np.nan, np.float32))
    options = ("--model", study.fitted, "--out", tmp_path / "out", "--draws", 3, "--refine", 0)
    screen, err = run("segment", scans, *options, code=1)
    assert screen.count("│ ok") == 1 and screen.count("│ failed") == 2
    assert err.count("sub-02_T1w.nii.gz") == err.count("sub-03_T1w.nii.gz") == 1
    written = {path.name for path in (tmp_path / "out").rglob("*_dseg.nii.gz")}
    assert written == {"sub-01_seg-ppl_desc-T1w_dseg.nii.gz"}


def test_a_prior_of_few_maps(study: Study, run: Run, tmp_path: Path) -> None:
    maps = sorted(study.maps.iterdir())[:4]
    run("prior", *maps, "--out", tmp_path / "few", "--latent-dim", 2, "--steps", 2)
    assert "too few" in json.loads((tmp_path / "few" / "report.json").read_text())["judged_on"]


def test_ctrl_c(study: Study, tmp_path: Path) -> None:
    arguments = ("prior", str(study.maps), "--out", str(tmp_path / "out"), "--steps", "100000", "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "ppl_seg", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        while "label maps" not in process.stderr.readline():
            assert process.poll() is None
        for _ in range(6):  # what falls into C code may be swallowed there, on a busy machine; people press again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.communicate(timeout=20)[1] == "ppl-seg: interrupted\n"
                break
        assert process.returncode == 130
    finally:
        process.kill()


def test_prior_bad_input(study: Study, ask: Ask, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--steps", 2)
    assert "none: no such file" in ask("prior", tmp_path / "none", *out)
    assert "no label maps" in ask("prior", study.scans, *out)
    one = study.maps / "sub-00_dseg.nii.gz"
    assert "needs at least" in ask("prior", one, *out)
    assert "given twice" in ask("prior", one, one, *out)
    assert "give the label map" in ask("prior", *study.scans.iterdir(), *out)
    assert "--align elastic: " in ask("prior", study.maps, *out, "--align", "elastic")
    assert "--objective enum" in ask("prior", study.maps, *out, "--objective", "enum")
    assert "--guide" in ask("prior", study.maps, *out, "--guide", "nothing")
    assert "--spacing" in ask("prior", study.maps, *out, "--spacing", -1)
    assert "none.tsv: no such file" in ask("prior", study.maps, *out, "--labels", tmp_path / "none.tsv")
    assert not (tmp_path / "out").exists()


def test_an_existing_model_is_kept(study: Study, ask: Ask) -> None:
    before = snapshot(study.prior)
    line = ask("prior", study.maps, "--out", study.prior, "--steps", 2)
    assert "--force" in line and str(study.prior) in line
    line = ask("fit", study.scans, "--prior", study.prior, "--out", study.fitted, "--steps", 2)
    assert "--force" in line
    line = ask("fit", study.scans, "--prior", study.prior, "--out", study.prior, "--steps", 2, "--force")
    assert "the output folder is an input" in line
    assert snapshot(study.prior) == before


def test_fit_bad_input(study: Study, ask: Ask, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--steps", 2)
    fit = ("fit", study.scans, "--prior", study.prior, *out)
    maps = study.truth.glob("*")
    assert "label map" in ask("fit", *maps, "--prior", study.prior, *out)
    assert "segment" in ask("fit", study.scan(), "--prior", study.prior, *out)
    assert "config.json" in ask("fit", study.scans, "--prior", study.scans, *out)
    assert "--recipe" in ask(*fit, "--recipe", "nothing")
    assert "--objective" in ask(*fit, "--objective", "nothing")
    assert "--guide" in ask(*fit, "--guide", "nothing")
    assert "--align elastic: " in ask(*fit, "--align", "elastic")
    assert "--likelihood-power" in ask(*fit, "--likelihood-power", -1)
    assert "_FLAIR" in ask(*fit, "--suffix", "FLAIR")
    assert "none.nii.gz" in ask(*fit, "--mask", tmp_path / "none.nii.gz")
    assert not (tmp_path / "out").exists()


def test_segment_bad_input(study: Study, ask: Ask, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    segment = ("segment", study.scans, "--model", study.fitted, *out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no scans in this folder" in ask("segment", empty, "--model", study.fitted, *out)
    assert "no such file" in ask("segment", tmp_path / "none.nii.gz", "--model", study.fitted, *out)
    truth = study.truth / "sub-01_dseg.nii.gz"
    assert "label map" in ask("segment", truth, "--model", study.fitted, *out)
    assert "config.json" in ask("segment", study.scans, "--model", empty, *out)
    assert "--align elastic: " in ask(*segment, "--align", "elastic")
    assert "--objective" in ask(*segment, "--objective", "nothing")
    assert "--guide" in ask(*segment, "--guide", "low-rank")
    before = snapshot(study.scans)
    into = ("segment", study.scans, "--model", study.fitted, "--draws", 3, "--out", study.scans)
    assert "--out" in ask(*into)
    assert snapshot(study.scans) == before
    assert not (tmp_path / "out").exists()


def test_other_options_need_force(study: Study, ask: Ask) -> None:
    before = snapshot(study.out)
    options = ("segment", study.scans, "--model", study.fitted, "--out", study.out)
    assert "--force" in ask(*options, "--draws", 9)
    assert snapshot(study.out) == before


def test_a_model_that_was_altered(study: Study, ask: Ask, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(study.fitted, model)
    weights = bytearray((model / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "weights.safetensors").write_bytes(weights)
    line = ask("segment", study.scans, "--model", model, "--out", tmp_path / "out")
    assert "weights.safetensors" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_asked_for_and_absent(study: Study, ask: Ask, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--device", "cuda")
    assert "cuda" in ask("prior", study.maps, *out).lower()
    assert "cuda" in ask("fit", study.scans, "--prior", study.prior, *out).lower()
    assert "cuda" in ask("segment", study.scans, "--model", study.prior, *out).lower()
    assert not (tmp_path / "out").exists()


def test_evaluate_bad_input(study: Study, ask: Ask, tmp_path: Path) -> None:
    other = save(tmp_path / "sub-01_dseg.nii.gz", np.ones(SHAPE, np.uint8), spacing=2.0)
    line = ask("evaluate", study.out, other)
    assert str(other) in line and "sub-01_seg-ppl_desc-T1w_dseg.nii.gz" in line and "its grid is" in line
    assert "no such file" in ask("evaluate", study.out, tmp_path / "none")
