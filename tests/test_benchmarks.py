"""The benchmark scripts at smoke size, on subjects made here: two ellipsoids, a bit different each."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = (14, 16, 12)
METHODS_OF_SPEED = ("fused, exact", "fused, Jensen", "logsumexp, exact", "hand-written Jensen", "TraceEnum")


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def make_labels(generator: np.random.Generator) -> np.ndarray:
    """Two ellipsoids, one behind the other, of random size and place."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).astype(float)
    labels = np.zeros(SHAPE, np.uint8)
    for value, centre in ((1, (7, 5, 6)), (2, (7, 10, 6))):
        distance = (grid - centre - generator.normal(0, 0.4, 3)) / generator.normal((4, 3, 3.5), 0.2)
        labels[(distance**2).sum(-1) < 1] = value
    return labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set `hippocampus`: 9 label maps, 6 scans of 4 persons with their labels."""
    root = tmp_path_factory.mktemp("data")
    base, generator = root / "hippocampus", np.random.default_rng(0)
    for folder in ("prior", "dev/scans", "dev/truth"):
        (base / folder).mkdir(parents=True)

    def save(array: np.ndarray, path: Path) -> None:
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0])), path)

    for person in range(9):
        save(make_labels(generator), base / "prior" / f"sub-{person:03d}_run-1_dseg.nii.gz")
    for person, runs in ((11, 2), (12, 1), (13, 2), (14, 1)):
        for session in range(1, runs + 1):
            labels, stem = make_labels(generator), f"sub-{person:03d}_run-{session}"
            save(labels, base / "dev" / "truth" / f"{stem}_dseg.nii.gz")
            scan = np.where(labels > 0, 700.0, 300.0) + generator.normal(0, 60, SHAPE)
            save(scan.astype(np.float32), base / "dev" / "scans" / f"{stem}_T1w.nii.gz")
    (base / "labels.tsv").write_text("index\tname\tclass\n1\tFront\ttissue\n2\tBack\ttissue\n")
    (base / "groups.tsv").write_text("index\tgroup\n1\tAnterior\n2\tPosterior\n")
    return root


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def accuracy(data: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = ("--data", data, "--set", "hippocampus", "--out", out, "--prior-steps", "4", "--fit-steps", "4")
    return run_script("benchmark_accuracy.py", *words, *options)


def test_speed_of_the_voxel_factor() -> None:
    done = run_script("benchmark_speed.py", "--voxels", "600", "--labels", "5", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(METHODS_OF_SPEED)
    for row, method in zip(rows, METHODS_OF_SPEED, strict=True):
        assert method in row[0] and float(row[1]) > 0 and 0.05 < float(row[3]) < 4
    value = {row[0]: float(row[4]) for row in rows}
    exact = [number for name, number in value.items() if name.endswith("exact")]
    jensen = [number for name, number in value.items() if name.endswith("Jensen")]
    assert np.ptp(exact) <= 1e-4 * abs(exact[0]) and np.ptp(jensen) <= 1e-4 * abs(jensen[0])
    assert max(jensen) < min(exact)


def test_accuracy_from_prior_to_summary_and_again(data: Path, tmp_path: Path) -> None:
    done = accuracy(data, tmp_path / "out", "--rows", "0,a,b", "--no-jensen")
    assert done.returncode == 0, done.stderr + done.stdout
    out = tmp_path / "out"
    scores, summary = read_tsv(out / "scores.tsv"), read_tsv(out / "summary.tsv")
    assert len(scores) == 3 * 6 * 4 and len(summary) == 3 * 4
    assert {row["structure"] for row in summary} == {"Anterior", "Posterior", "mean", "whole"}
    assert {row["person"] for row in scores} == {"011", "012", "013", "014"}
    for row in summary:
        assert 0.3 < float(row["dice_low"]) <= float(row["dice"]) <= float(row["dice_high"]) <= 1, row
        assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])
        assert float(row["gain"]) == 0 or row["row"] != "a"
    covered = [r for r in summary if r["row"] == "b" and r["structure"] in ("Anterior", "Posterior")]
    assert all(0 <= float(row["volume_coverage"]) <= 1 for row in covered)
    page = (out / "summary.md").read_text(encoding="utf-8")
    assert "| b | per-scan inference |" in page and re.search(
        r"\| Anterior \| 0\.\d+ \| .* \| 0\.\d+ \(\d+%\) \|", page
    )
    assert "not measured (no fit, segment-d)" in page
    assert (out / "benchmark.png").stat().st_size > 5000

    marker = out / "prior" / "done.json"
    before = json.loads(marker.read_text(encoding="utf-8"))
    assert before["seconds"] > 0 and before["command"][:2] == ["ppl-seg", "prior"] and before["version"]
    again = accuracy(data, out, "--rows", "0,a,b", "--no-jensen")
    assert again.returncode == 0 and "==" not in again.stdout  # no stage runs twice
    assert (out / "summary.md").read_text(encoding="utf-8") == page


@pytest.mark.slow
def test_label_maps_of_another_protocol_teach(data: Path, tmp_path: Path) -> None:
    """The same maps with values of their own, which map.tsv brings to the set's; a structure more, which it drops."""
    other = tmp_path / "other"
    (other / "prior").mkdir(parents=True)
    for path in sorted((data / "hippocampus" / "prior").iterdir()):
        image = nib.load(path)
        labels = np.asarray(image.dataobj)
        labels = np.where(labels > 0, labels + 10, 0)
        labels[0, 0, 0] = 13
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), image.affine), other / "prior" / path.name)
    (other / "labels.tsv").write_text("index\tname\tclass\n1\tFore\ttissue\n2\tHind\ttissue\n")
    (other / "map.tsv").write_text("from\tto\n11\t1\n12\t2\n13\t0\n")
    done = accuracy(data, tmp_path / "out", "--prior-maps", str(other), "--rows", "a,b", "--no-jensen")
    assert done.returncode == 0, done.stderr + done.stdout
    summary = read_tsv(tmp_path / "out" / "summary.tsv")
    dice = {(row["row"], row["structure"]): float(row["dice"]) for row in summary}
    assert min(dice.values()) > 0.3 and ("b", "alike") not in dice
    covered = [row["volume_coverage"] for row in summary if row["row"] == "b" and row["structure"] == "Anterior"]
    assert 0 <= float(covered[0]) <= 1  # by the names of the other's table
    volumes = {(row["row"], row["structure"]): row for row in read_tsv(tmp_path / "out" / "volumes.tsv")}
    assert set(volumes) == {(row, name) for row in "ab" for name in ("Anterior", "Posterior", "whole")}
    assert all(0.3 < float(row["ratio"]) < 3 for row in volumes.values())
    assert "segmented / manual volume" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "retest.tsv").exists()  # runs are no visits


def test_ablation_says_what_each_part_is_worth(data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--set", "hippocampus", "--out", tmp_path, "--prior-steps", "4", "--draws", "4")
    done = run_script("benchmark_ablation.py", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = read_tsv(tmp_path / "ablation.tsv")
    changes = [row["change"] for row in rows]
    assert changes[0] == "the whole recipe" and "one Gaussian a class" in changes and len(changes) == 6
    assert "the mask is no observation" not in changes  # a crop's never is
    assert all(0 < float(row["dice_low"]) <= float(row["dice"]) <= 1 and row["scans"] == "6" for row in rows)
    for row in rows:
        assert float(row["difference"]) == pytest.approx(
            float(row["dice"]) - float(rows[0]["dice"]), abs=2e-4
        )  # four digits
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8").count("\n") == 8


def test_other_options_do_not_mix_with_an_earlier_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "done.json").write_text('{"command": ["ppl-seg", "prior"]}')
    done = accuracy(data, tmp_path)
    assert done.returncode == 1 and "not made by these options" in done.stderr
    assert done.stderr.count("\n") == 1 and (tmp_path / "prior" / "done.json").is_file()


@pytest.mark.slow
def test_accuracy_of_all_rows(data: Path, tmp_path: Path) -> None:
    done = accuracy(data, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = list(dict.fromkeys(row["row"] for row in read_tsv(tmp_path / "summary.tsv")))
    assert rows == ["0", "a", "n", "b", "b-jensen", "c", "c-jensen", "d", "d-jensen", "f", "e-f", "e-r"]
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert re.search(r"Best of b–d: [bcd], 0\.\d+; minus \(a\): [+-]0\.\d+ \[", page)
    assert re.search(r"\(f\) minus [bcd]: [+-]0\.\d+", page) and "s of 3600 s, kept" in page
    assert len(re.findall(r"Calibration error .* (marginal|jensen): 0\.\d+", page)) == 2
    for name in ("benchmark.png", "steps_marginal.png", "steps_jensen.png", "reliability.png"):
        assert (tmp_path / name).stat().st_size > 5000
    steps = read_tsv(tmp_path / "steps-fit" / "steps.tsv")
    assert sorted({int(row["step"]) for row in steps}) == [0, 10, 20, 40, 80] and len(steps) == 30
    assert all(np.isfinite(float(row["bound_per_voxel"])) for row in steps)
    halves = [json.loads((tmp_path / f"fit-f{half}" / "done.json").read_text())["command"] for half in (0, 1)]
    scans = [{word for word in half if word.endswith("_T1w.nii.gz")} for half in halves]
    persons = [{Path(scan).name.split("_")[0] for scan in half} for half in scans]
    assert not persons[0] & persons[1] and len(scans[0] | scans[1]) == 6
