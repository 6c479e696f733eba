"""Other tools as rows of the accuracy benchmark: what is said of them, and of one that is not installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

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
        monkeypatch.setitem(__import__("sys").modules, name, None)

    class Unused:
        def segment(self, *_: object, **__: object) -> None:
            raise AssertionError("nothing is to be computed for a tool that is not there")

    for peer, package in (("atropos", "antspyx"), ("atropos-n4", "antspyx"), ("samseg", "samseg"), ("hmrf", "dipy")):
        with pytest.raises(InputError, match=f"--rows {peer}: .*pip install {package}"):
            script.segment_by_peer(peer, Unused(), tmp_path / "sub-1_T1w.nii.gz")


def test_tissue_classes_by_hmrf(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("dipy")
    nib = pytest.importorskip("nibabel")
    place = np.indices((20, 20, 20)).max(0)
    scan = np.select([place < 6, place < 12, place < 17], [300.0, 200.0, 100.0], 0.0)
    scan += np.where(scan > 0, np.random.default_rng(0).normal(0, 10, scan.shape), 0)
    path = tmp_path / "sub-1_T1w.nii.gz"
    nib.save(nib.Nifti1Image(scan.astype(np.float32), np.eye(4)), path)
    found = script.segment_by_peer("hmrf", None, path)
    assert (found[place < 5] == 2).all() and (found[(place > 7) & (place < 11)] == 3).all()
    assert not found[place > 13].any()
