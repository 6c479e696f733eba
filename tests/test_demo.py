"""The demo's table, and a tiny run of all of it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppl_seg import demo, demo_report
from ppl_seg.cli import main
from ppl_seg.errors import InputError

ROOT = Path(__file__).parents[1]
TITLES = {way.name: way.title for way in demo.WAYS}


def scores(shift: float = 0.0, persons: int = 3) -> list[dict[str, object]]:
    """Rows as of `evaluate`: Dice rises with the person; putamen is absent on the left."""
    names = [structure.name for structure in demo_report.STRUCTURES]
    return [
        {
            "person": f"sub-{person}",
            "structure": name,
            "dice": math.nan if name == "Left-Putamen" else 0.5 + 0.1 * person + shift + 0.1 * name.startswith("Left"),
        }
        for person in range(persons)
        for name in names
    ]


def test_rows_merge_sides_and_end_with_the_mean() -> None:
    rows = demo_report.dice_rows({"a": scores(), "b": scores(0.1)})
    assert len(rows) == 11 and rows[-1]["structure"] == "mean"
    by_name = {row["structure"]: row for row in rows}
    assert by_name["Cerebral White Matter"]["a"] == pytest.approx(0.65)  # left 0.7, right 0.6
    assert by_name["Brain Stem"]["a"] == pytest.approx(0.6)
    assert by_name["Putamen"]["a"] == pytest.approx(0.6)  # the right one alone
    assert by_name["mean"]["a"] == pytest.approx(np.mean([row["a"] for row in rows[:-1]]))
    assert by_name["mean"]["b"] - by_name["mean"]["a"] == pytest.approx(0.1)


def test_a_structure_that_nobody_has_is_empty_and_not_counted() -> None:
    found = [{**row, "dice": math.nan if row["structure"] == "CSF" else 0.5} for row in scores()]
    rows = {row["structure"]: row["a"] for row in demo_report.dice_rows({"a": found})}
    assert math.isnan(rows["CSF"]) and rows["mean"] == pytest.approx(0.5)


def test_gain_is_paired_by_person() -> None:
    line = demo_report.gain_line("refined", scores(0.05, 5), list(reversed(scores(persons=5))), "location + EM")
    assert "refined against location + EM" in line and "5 simulated persons" in line
    assert "+0.050 [+0.050, +0.050]" in line  # persons differ, their differences do not


def test_table_on_screen(capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo_report.dice_rows({way: scores(0.01 * number) for number, way in enumerate(TITLES)})
    demo_report.print_table(rows, TITLES)
    shown = capsys.readouterr().out
    for title in TITLES.values():
        assert all(word in shown for word in title.split("\n"))
    assert "…" not in shown and shown.count("Cerebral White Matter") == 1


def test_columns_that_the_demo_promises() -> None:
    plain = [title.replace("\n", " ") for title in TITLES.values()]
    assert plain[:3] == ["location prior", "location + EM", "recipe notes"]
    for way in ("per-scan", "amortised", "refined"):
        assert f"{way} marginal" in plain and f"{way} jensen" in plain
    assert {demo.BASELINE, demo.BEST, *demo.CALIBRATION} <= set(TITLES)


def test_only_a_demos_own_folder_is_emptied(tmp_path: Path) -> None:
    demo.claim(tmp_path / "new")
    old = tmp_path / "new" / "prior" / "config.json"
    old.parent.mkdir()
    old.touch()
    (tmp_path / "new" / "my-notes.txt").touch()
    demo.claim(tmp_path / "new")
    assert not old.exists() and (tmp_path / "new" / "my-notes.txt").exists()
    other = tmp_path / "other"
    (other / "prior").mkdir(parents=True)
    with pytest.raises(InputError, match="no demo's"):
        demo.claim(other)
    assert (other / "prior").is_dir()
    with pytest.raises(InputError, match="a file"):
        demo.claim(tmp_path / "new" / "my-notes.txt")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, int]] = []
    monkeypatch.setattr(demo, "run", lambda out, seed=0: calls.append((out, seed)))
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--out", str(tmp_path / "demo"), "--seed", "3"])
    assert calls == [(tmp_path / "demo", 3)]


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = f"from ppl_seg import demo; demo.run({str(out)!r}, smoke=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert demo_report.HONEST in done.stdout and "refined against location + EM" in done.stdout
    assert " s  prior" in done.stderr and " s  segment, evaluate: refined marginal" in done.stderr
    with (out / "table.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["structure", *TITLES] and len(rows) == 11
    assert all(0 < float(row["location-em"]) < 1 for row in rows)
    for way in TITLES:
        assert len(list((out / "segmentations" / way).rglob("*_dseg.nii.gz"))) == demo.SMOKE.scans
    assert (out / "segmentations" / demo.BEST / "volumes.tsv").is_file()
    pictures = {path.stem for path in (out / "figures").glob("*.png")}
    assert pictures == {
        *("qc", "prior_draws", "segmentation_draws", "training_prior", "training_fit", "reliability", "dice")
    }
    for model in ("prior", "fit", "fit-jensen", "notes"):
        assert (out / model / "config.json").is_file()
