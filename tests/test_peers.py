"""Other tools as rows of the accuracy benchmark: what is said of them, and of one that is not installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "scripts"
TISSUES = {"grey matter": 0.9, "white matter": 0.8}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_accuracy")


def rows(row: str, dice: dict[str, float]) -> list[dict[str, object]]:
    """Scores of three scans of two persons; each scan is 0.01 better than the one before."""
    return [
        {"row": row, "scan": str(n), "person": str(n // 2), "structure": name, "dice": value + 0.01 * n}
        | {"hd95_mm": 1.0, "asd_mm": 0.5, "missed": 0}
        for n in range(3)
        for name, value in dice.items()
    ]


def test_each_peer_is_compared_scan_by_scan(script: ModuleType) -> None:
    everything = {"A": 0.8, "mean": 0.8, "whole": 0.9}
    scores = rows("b", everything | TISSUES) + rows("atropos", {name: 0.6 for name in everything | TISSUES})
    scores += rows("hmrf", {"grey matter": 0.7, "white matter": 0.6})
    summary = script.summarise(scores, {row: {} for row in ("b", "atropos", "hmrf")})
    text = script.page(scores, summary, ["A"], ["0", "0", "1"], {}, {}, 10)
    assert "- b minus atropos: +0.200 [+0.200, +0.200]." in text
    assert "| atropos | ANTs Atropos with the location prior | 0.610 [" in text
    assert "| hmrf | tissue" not in text  # it has no structures
    grey = next(line for line in text.splitlines() if line.startswith("| grey matter"))
    assert [cell.split()[0] for cell in grey.split("|")[2:5]] == ["0.910", "0.610", "0.710"]


def test_tissues_are_known_where_all_their_structures_are(script: ModuleType) -> None:
    structures = [name for names in script.TISSUES.values() for name in names]
    groups = {name: (n,) for n, name in enumerate([*structures, "Thalamus", "4th-Ventricle"], 1)}
    tissues, mixed = script.tissues_of(groups)
    assert tissues["white matter"] == (groups["Cerebral-White-Matter"][0], groups["Cerebellum-White-Matter"][0])
    assert mixed == list(groups["Thalamus"]) and len(tissues["grey matter"]) == 7
    assert script.tissues_of({"Anterior": (1,)}) == ({}, [])
    assert script.tissues_of({name: (1,) for name in structures[1:]})[0].keys() == {"white matter"}


def test_a_peer_that_is_not_installed(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ants", "dipy", "dipy.segment.tissue", "samseg"):
        monkeypatch.setitem(sys.modules, name, None)

    class Unused:
        def segment(self, *_: object, **__: object) -> None:
            raise AssertionError("nothing is to be computed for a tool that is not there")

    for peer, package in (("atropos", "antspyx"), ("atropos-n4", "antspyx"), ("samseg", "samseg"), ("hmrf", "dipy")):
        with pytest.raises(InputError, match=f"--rows {peer}: .*pip install {package}"):
            script.segment_by_peer(peer, Unused(), tmp_path / "sub-1_T1w.nii.gz")


def test_tissue_classes_get_the_labels_that_stand_for_them(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scan = np.random.default_rng(0).uniform(100, 300, (8, 8, 8)).astype(np.float32)
    scan[0] = 0
    tissues = np.digitize(scan, (50, 150, 250))

    class Classifier:
        def classify(self, image: np.ndarray, number: int, smoothness: float) -> tuple[None, np.ndarray, None]:
            assert number == 3 and np.array_equal(image, scan)
            return None, tissues, None

    module = ModuleType("dipy.segment.tissue")
    monkeypatch.setattr(module, "TissueClassifierHMRF", Classifier, raising=False)
    for name, value in (("dipy", ModuleType("dipy")), ("dipy.segment", ModuleType("dipy.segment"))):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setitem(sys.modules, "dipy.segment.tissue", module)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "sub-1_T1w.nii.gz")
    found = script.segment_by_peer("hmrf", None, tmp_path / "sub-1_T1w.nii.gz")
    groups = {"Cerebral-White-Matter": (2, 41), "Cerebral-Cortex": (3, 42)}
    assert set(found[tissues == 2]) == {groups["Cerebral-Cortex"][0]}
    assert set(found[tissues == 3]) == {groups["Cerebral-White-Matter"][0]}
    assert not found[tissues < 2].any()
