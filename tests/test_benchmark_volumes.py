"""Volumes of the accuracy benchmark: two visits of a person, agreement with manual volumes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.images import read_label_map

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_volumes")


def scores(found: dict[str, list[float]], manual: dict[str, list[float]]) -> list[dict[str, object]]:
    """Rows of persons 1, 1, 2, 3, the first one with two visits; a mean over structures has no volume."""
    visits = [("1", "1"), ("1", "2"), ("2", ""), ("3", "")]
    rows: list[dict[str, object]] = []
    for n, (person, session) in enumerate(visits):
        keys = {"row": "b", "scan": f"{n}", "person": person, "session": session, "box_mm3": 1000.0 - n}
        for name, volumes in found.items():
            rows.append({**keys, "structure": name, "volume_mm3": volumes[n], "truth_volume_mm3": manual[name][n]})
        rows.append({**keys, "structure": "mean", "dice": 0.8})
    return rows


def test_two_visits_of_a_person(script: ModuleType) -> None:
    rows = scores({"A": [90, 110, 5, 5], "B": [50, 50, 5, 5]}, {"A": [100, 100, 5, 5], "B": [0, 0, 5, 5]})
    changes = {(r["row"], r["structure"]): r["change"] for r in script.retest(rows)}
    assert changes["b", "A"] == pytest.approx(0.2) and changes["b", "B"] == 0
    assert changes["manual", "A"] == 0 and np.isnan(changes["manual", "B"]) and len(changes) == 4
    assert all(r["sessions"] == "1, 2" and r["person"] == "1" for r in script.retest(rows))
    page = script.volumes_page(script.retest(rows), script.agreement(rows))
    assert "| 1 (1, 2) | of the pairs' means |" in page and "| b | 10.0 % | 10.0 % |" in page
    assert "| manual | 0.0 % | 0.0 % |" in page


def test_agreement_with_manual_volumes(script: ModuleType) -> None:
    rows = scores({"A": [20, 40, 60, 800], "B": [7, 7, 7, 7]}, {"A": [10, 20, 30, 40], "B": [1, 2, 3, 4]})
    of = {row["structure"]: row for row in script.agreement(rows)}
    assert set(of) == {"A", "B"} and of["A"]["ratio"] == pytest.approx(9.2)
    assert of["A"]["spearman"] == pytest.approx(1) and of["A"]["box_spearman"] == pytest.approx(-1)
    assert of["A"]["pearson"] == pytest.approx(np.corrcoef([20, 40, 60, 800], [10, 20, 30, 40])[0, 1])
    assert np.isnan(of["B"]["pearson"]) and of["B"]["ratio"] == pytest.approx(2.8)
    assert "| A | 9.20, 0.80, 1.00 | -1.00 |" in script.volumes_page([], script.agreement(rows))


def test_what_a_box_says_of_volumes(script: ModuleType, tmp_path: Path) -> None:
    """Volumes that are linear in the logarithms of the sides are found again."""
    for n, side in enumerate((20, 22, 25, 29, 34, 40)):
        labels = np.zeros((side, side + n, 10 + n % 3), np.uint8)
        labels.flat[: round(1000 * np.log(side))] = 3
        nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / f"sub-{n}_dseg.nii.gz")
    coefficients = script.box_baseline(tmp_path, {"A": (3, 4), "B": (5,)})
    image = read_label_map(tmp_path / "sub-3_dseg.nii.gz")
    assert script.box_of(image) == pytest.approx([1, np.log(29), np.log(32), np.log(20)])
    assert script.box_of(image) @ coefficients["A"] == pytest.approx(2000 * np.log(29), rel=1e-3)
    assert np.allclose(coefficients["B"], 0)
