"""The experimenter's scripts at smoke size, as a user runs them: label maps → prior → fit → segmentations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ("train_prior", "fit_scans", "sample_segmentations")
SHAPE = (16, 16, 4)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
MEANS = np.array([20.0, 60.0, 100.0])


def ellipsoids(rng: np.random.Generator) -> np.ndarray:
    """A structure inside another, of random width: values 0, 1, 2."""
    centre = (np.array(SHAPE) - 1) / 2
    place = (np.indices(SHAPE) - centre[:, None, None, None]) / np.array([1.0, 1.0, 0.4])[:, None, None, None]
    width = np.array([rng.uniform(5, 7), rng.uniform(4, 6), 6.0])[:, None, None, None]
    radius = np.sqrt(((place / width) ** 2).sum(0))
    return ((radius < 1).astype(np.uint8) + (radius < 0.6)).astype(np.uint8)


def run(name: str, *arguments: str | Path) -> str:
    """Run a script from another folder, on one thread; what it printed."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Label maps of four persons, scans and true label maps of three others."""
    folder, rng = tmp_path_factory.mktemp("population"), np.random.default_rng(0)
    paths: dict[str, list[Path]] = {"maps": [], "scans": [], "truth": []}

    def save(kind: str, name: str, data: np.ndarray) -> None:
        paths[kind].append(folder / name)
        nib.save(nib.Nifti1Image(data, AFFINE), paths[kind][-1])

    for person in range(4):
        save("maps", f"sub-{person}_dseg.nii.gz", ellipsoids(rng))
    for person in range(4, 7):
        truth = ellipsoids(rng)
        save("truth", f"sub-{person}_dseg.nii.gz", truth)
        noisy = MEANS[truth] + rng.normal(0, 6, SHAPE)
        save("scans", f"sub-{person}_T1w.nii.gz", noisy.astype(np.float32))
    return paths


@pytest.fixture(scope="module")
def prior(population: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prior") / "prior.pt"
    run("train_prior", *population["maps"], "--out", out, "--latent", "4", "--steps", "25")
    return out


@pytest.fixture(scope="module")
def fitted(population: dict[str, list[Path]], prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "fitted.pt"
    run("fit_scans", *population["scans"], "--prior", prior, "--out", out, "--epochs", "8")
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_script_fits_on_a_page(name: str) -> None:
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for forbidden in ("ppl_seg.api", "ppl_seg.cli", "inference.trainer"):
        assert forbidden not in text


def test_a_prior_is_learned(prior: Path) -> None:
    saved = load(prior)
    losses = saved["losses"]
    assert len(losses) == 25 and all(map(math.isfinite, losses))
    assert [row["index"] for row in saved["table"]] == [0, 1, 2]
    assert saved["prior"]["log_location_prior"].shape == (3, *saved["grid"]["shape"])
    assert saved["prior"]["decoder.to_scores.weight"].abs().max() > 0  # it starts at zero


def test_a_prior_by_trace_with_a_low_rank_guide(population: dict[str, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "prior.pt"
    arguments = ["--elbo", "trace", "--guide", "low-rank", "--latent", "4", "--steps", "3"]
    printed = run("train_prior", *population["maps"], "--out", out, *arguments)
    assert "step 3 of 3" in printed
    assert all(map(math.isfinite, load(out)["losses"]))


@pytest.mark.parametrize("guide", ["mean-field", "low-rank"])
@pytest.mark.parametrize("elbo", ["marginal", "jensen", "trace", "enum"])
def test_every_bound_fits(
    elbo: str, guide: str, population: dict[str, list[Path]], prior: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fitted.pt"
    arguments = ["--elbo", elbo, "--guide", guide, "--epochs", "2"]
    run("fit_scans", *population["scans"], "--prior", prior, "--out", out, *arguments)
    saved = load(out)
    assert len(saved["losses"]) == 2 and all(map(math.isfinite, saved["losses"]))
    assert saved["factor"] == ("prior" if elbo == "jensen" else "posterior") and saved["recipe"]["guide"] == guide
    before = load(prior)["prior"]
    assert all(torch.equal(saved["prior"][name], before[name]) for name in before)
    assert saved["maps"].exp().sum(0).allclose(torch.ones(()))


@pytest.mark.parametrize("factor", ["r", "f"])
def test_drawn_segmentations(
    factor: str, fitted: Path, population: dict[str, list[Path]], prior: Path, tmp_path: Path
) -> None:
    if factor == "f":
        fitted = tmp_path / "jensen.pt"
        options = ["--elbo", "jensen", "--epochs", "4"]
        run("fit_scans", *population["scans"], "--prior", prior, "--out", fitted, *options)
    options = ["--fitted", str(fitted), "--out", str(tmp_path / "new" / "sub-4"), "--draws", "12"]
    printed = run("sample_segmentations", population["scans"][0], *options)
    label_map = nib.load(tmp_path / "new" / "sub-4_dseg.nii.gz")
    draws = nib.load(tmp_path / "new" / "sub-4_draws.nii.gz")
    assert label_map.shape == SHAPE and draws.shape == (*SHAPE, 12)
    assert np.array_equal(label_map.affine, AFFINE) and np.array_equal(draws.affine, AFFINE)
    drawn = np.asarray(draws.dataobj)
    assert set(np.unique(drawn)) <= {0, 1, 2} and (drawn[..., 0] != drawn[..., 1]).any()
    truth = np.asarray(nib.load(population["truth"][0]).dataobj)
    found = np.asarray(label_map.dataobj)
    overlap = 2 * ((found > 0) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum())
    assert overlap > 0.8
    volumes = (drawn == 1).sum((0, 1, 2)) * 12.0
    assert f"label-1: {np.quantile(volumes, 0.5):.0f} mm³" in printed
