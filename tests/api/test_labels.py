"""q(s|x) from end to end: learned by `fit`, kept in the model's folder, used by `segment`, left out without harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import ppl_seg.api.labels as labels_api
from ppl_seg.api import Model, fit_scans, learn_prior, load_model
from ppl_seg.api.output import LABELS
from ppl_seg.errors import InputError

STEPS = 4


def write(path: Path, data: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The folder of a prior of two half balls, and scans of such."""
    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(1)
    axes = np.stack(np.meshgrid(*map(np.arange, (12, 11, 8)), indexing="ij"), -1) - 4.5
    scans = []
    for n in range(7):
        inside = ((axes / random.uniform(3, 4.5, 3)) ** 2).sum(-1) < 1
        labels = (inside * (1 + (axes[..., 0] > 0))).astype(np.uint8)
        if n < 4:
            write(folder / f"sub-{n}_dseg.nii.gz", labels)
        else:
            scan = 100 * (1 - 0.5 * inside) + 5 * random.standard_normal(labels.shape)
            scans.append(write(folder / f"sub-{n}_T1w.nii.gz", scan.astype(np.float32)))
    learn_prior([folder / f"sub-{n}_dseg.nii.gz" for n in range(4)], out=folder / "prior", latent_dim=3, steps=20)
    return folder / "prior", scans


@pytest.fixture(scope="module")
def fitted(study: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    out = tmp_path_factory.mktemp("fitted") / "model"
    return fit_scans(study[1], prior=study[0], out=out, steps=STEPS), out


def segmented(model: Model, scan: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    result = model.segment(scan, draws=4, refine=1, keep_probabilities=True, **options)
    assert result.probabilities is not None
    return result.label_map, result.probabilities


def test_a_fit_keeps_its_network_and_a_loaded_model_segments_alike(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]]
) -> None:
    model, out = fitted
    again = load_model(out)
    assert model.label_network is not None and again.label_network is not None
    assert again.hash == model.hash
    assert float(next(again.label_network.to_scores.parameters()).abs().max()) > 0
    for mine, theirs in zip(segmented(again, study[1][0]), segmented(model, study[1][0]), strict=True):
        assert np.array_equal(mine, theirs)
    assert not (out / LABELS).exists()


def test_without_the_network_a_model_is_what_it_was(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, _ = fitted
    config = {name: value for name, value in model.config.items() if name != "label_network"}
    bare = replace(model, label_network=None, config=config)
    bare.save(tmp_path / "bare")
    assert load_model(tmp_path / "bare").label_network is None
    off = replace(model, recipe=replace(model.recipe, label_rounds=0))
    plain, probabilities = segmented(bare, study[1][0])
    assert np.array_equal(segmented(off, study[1][0])[1], probabilities)
    assert np.array_equal(segmented(load_model(tmp_path / "bare"), study[1][0])[0], plain)
    assert not np.array_equal(segmented(model, study[1][0])[1], probabilities)


def test_other_units_of_intensity_change_nothing(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """a·x + b with powers of two: exact in float32."""
    image = nib.load(study[1][1])
    data = np.asarray(image.dataobj).round()
    paths = [tmp_path / name / study[1][1].name for name in ("a", "b")]
    for path, values in zip(paths, (data, 4 * data + 64), strict=True):
        path.parent.mkdir()
        write(path, values.astype(np.float32))
    first, second = (segmented(fitted[0], path) for path in paths)
    assert np.array_equal(first[0], second[0])
    np.testing.assert_allclose(first[1], second[1], atol=1e-5)


def test_a_fit_killed_between_rounds_resumes_to_the_same_model(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, calls = labels_api.infer_targets, []

    def dies(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return infer(*arguments)

    monkeypatch.setattr(labels_api, "infer_targets", dies)
    with pytest.raises(KeyboardInterrupt):
        fit_scans(study[1], prior=study[0], out=tmp_path / "model", steps=STEPS)
    assert (tmp_path / "model" / LABELS / "1" / "checkpoint.json").is_file()
    monkeypatch.setattr(labels_api, "infer_targets", infer)
    fit_scans(study[1], prior=study[0], out=tmp_path / "model", steps=STEPS, resume=True)
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (tmp_path / "model", fitted[1])]
    assert weights[0] == weights[1]


def test_altered_options_of_the_network_are_an_error(fitted: tuple[Model, Path], tmp_path: Path) -> None:
    model, _ = fitted
    other = {"network": "u-net", "options": {"width": 8}}
    replace(model, config={**model.config, "label_network": other}).save(tmp_path / "m")
    with pytest.raises(InputError, match="label_network"):
        load_model(tmp_path / "m")
