"""q(s|x) from end to end: learned by `prior` or `fit`, kept in the folder, used by `segment`, left out without harm."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import ppl_seg.api.labels as labels_api
import ppl_seg.api.prior as prior_api
from ppl_seg.api import Model, fit_scans, learn_prior, load_model
from ppl_seg.api.output import LABELS
from ppl_seg.api.scan_inference import MARGINAL_DRAWS, infer_scan
from ppl_seg.data.loading import load_scan
from ppl_seg.errors import InputError
from ppl_seg.inference.label_training import log_label_marginals

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
    bare = model.without_label_network()
    bare.save(tmp_path / "bare")
    assert load_model(tmp_path / "bare").label_network is None
    off = replace(model, recipe=replace(model.recipe, label_guide=False))
    plain, probabilities = segmented(bare, study[1][0])
    assert np.array_equal(segmented(off, study[1][0])[1], probabilities)
    assert np.array_equal(segmented(load_model(tmp_path / "bare"), study[1][0])[0], plain)
    assert not np.array_equal(segmented(model, study[1][0])[1], probabilities)


def test_reported_marginals_are_those_inferred_with_their_borders_moved(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]]
) -> None:
    """b changes their mean as it changes that of the root of what the fit inferred; the bound hears nothing of it."""
    model, without = replace(fitted[0], border_shift=copy.deepcopy(fitted[0].border_shift)), fitted[0]
    without = replace(without, border_shift=None)
    assert model.border_shift is not None
    model.border_shift.shift *= 2 / model.border_shift.shift.abs().max()  # a large one, to be seen beside draws of z
    placed = [model.place(load_scan([scan])) for scan in study[1]]
    scans, observed = (torch.cat([one[part] for one in placed]) for part in (1, 2))
    inferred = labels_api.infer_targets(without, scans, observed, 1).float()
    before, after = (
        (t.sqrt() / t.sqrt().sum(1, keepdim=True)).mean(0).numpy()
        for t in (inferred, torch.stack([model.border_shift.move(r) for r in inferred]))
    )
    results = [[one.segment(scan, draws=40, keep_probabilities=True) for scan in study[1]] for one in (without, model)]
    plain, moved = (np.mean([one.probabilities for one in of_model], axis=0) for of_model in results)
    assert np.abs((moved - plain) - (after - before)).mean() < 0.3 * np.abs(after - before).mean()
    assert [one.bound for one in results[0]] == [one.bound for one in results[1]]


def test_word_of_the_label_guide_stays_a_distribution(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number added to b at a place, all labels alike, changes nothing, `log_evidence` neither."""
    other = replace(fitted[0], border_shift=copy.deepcopy(fitted[0].border_shift))
    assert other.border_shift is not None
    other.border_shift.shift += 3.0
    first, second = (one.segment(study[1][0], draws=4, refine=1) for one in (fitted[0], other))
    np.testing.assert_allclose(first.sample_stats["log_evidence"], second.sample_stats["log_evidence"], rtol=1e-4)


def test_a_warped_atlas_of_crops_has_its_borders_moved_too(study: tuple[Path, list[Path]], tmp_path: Path) -> None:
    maps = sorted(study[0].parent.glob("*_dseg.nii.gz"))
    prior = learn_prior(maps, shape="warp", steps=4)
    model = fit_scans(study[1], prior=prior, out=tmp_path / "model", steps=2, label_rounds=1)
    assert model.border_shift is not None and load_model(tmp_path / "model").hash == model.hash
    assert bool(model.border_shift.shift.any())
    _, *data, _ = model.place(load_scan([study[1][0]]))
    found = []
    for one in (model, replace(model, border_shift=None)):
        torch.manual_seed(1)
        found.append(infer_scan(one, model.recipe, *data))
        if one is not model:
            r = found[1].label_marginals(MARGINAL_DRAWS, 1.0)[0]  # with the random numbers that the first had
    moved, plain = (one.log_u for one in found)
    assert moved is not None and plain is not None
    torch.testing.assert_close(moved, (plain + model.border_shift(r)).log_softmax(0))


def test_a_refined_scan_has_background_maps_of_its_own(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]]
) -> None:
    """Those that the fit learned of all scans are for z as the encoder says it; a single step moves z, and no map."""
    model = fitted[0]
    assert model.theta is not None and model.theta.log_weight_maps is not None
    _, *data, _ = model.place(load_scan([study[1][0]]))
    common, own = (infer_scan(model, model.recipe, *data, refine).posterior.theta for refine in (1, 2))
    assert common.log_weight_maps is not None and own.log_weight_maps is not None
    assert torch.equal(common.log_weight_maps, model.theta.log_weight_maps)
    assert float((own.log_weight_maps.exp() - common.log_weight_maps.exp()).abs().max()) > 0.05


def test_a_model_without_moved_borders_is_read(
    fitted: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    older = replace(fitted[0], border_shift=None)
    older.save(tmp_path / "older")
    again = load_model(tmp_path / "older")
    assert again.border_shift is None and again.hash == older.hash
    assert np.array_equal(segmented(again, study[1][0])[1], segmented(older, study[1][0])[1])


@pytest.mark.parametrize("name", ["usual", "blur"])
def test_borders_moved_by_no_size_are_refused(fitted: tuple[Model, Path], tmp_path: Path, name: str) -> None:
    other = copy.deepcopy(fitted[0].border_shift)
    assert other is not None
    getattr(other, name).zero_()
    replace(fitted[0], border_shift=other).save(tmp_path / "m")
    with pytest.raises(InputError, match="border_shift"):
        load_model(tmp_path / "m")


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
    fitted: tuple[Model, Path],
    study: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    other = {**model.config["label_network"], "options": {"width": 8}}
    replace(model, config={**model.config, "label_network": other}).save(tmp_path / "m")
    with pytest.raises(InputError, match="label_network"):
        load_model(tmp_path / "m")


@pytest.fixture(scope="module")
def asleep(study: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A prior whose q(s|x) learned from simulated scans."""
    out = tmp_path_factory.mktemp("asleep") / "model"
    maps = sorted(study[0].parent.glob("*_dseg.nii.gz"))
    return learn_prior(maps, out=out, latent_dim=3, steps=20, label_steps=STEPS), out


def test_a_prior_keeps_its_network_and_segments_with_it(
    asleep: tuple[Model, Path], study: tuple[Path, list[Path]]
) -> None:
    model, out = asleep
    again = load_model(out)
    assert model.label_network is not None and again.hash == model.hash and not (out / LABELS).exists()
    assert set(json.loads((out / "report.json").read_text())["label_guide"]) >= {"bound_per_voxel"}
    mine, theirs = (segmented(m, study[1][0]) for m in (model, again))
    assert np.array_equal(mine[1], theirs[1])
    without = replace(model, recipe=replace(model.recipe, label_guide=False))
    assert not np.array_equal(segmented(without, study[1][0])[1], mine[1])
    plain = load_model(study[0])
    assert np.array_equal(segmented(without, study[1][0])[1], segmented(plain, study[1][0])[1])
    for recipe in ("location", "location-em"):  # these look at intensities at most
        assert np.array_equal(
            segmented(model, study[1][0], recipe=recipe)[1], segmented(plain, study[1][0], recipe=recipe)[1]
        )


def test_its_share_goes_from_the_program_to_the_network(
    asleep: tuple[Model, Path], study: tuple[Path, list[Path]]
) -> None:
    model, scan = asleep[0], study[1][0]

    def with_share(share: float, **options: Any) -> np.ndarray:
        return segmented(replace(model, recipe=replace(model.recipe, label_share=share)), scan, **options)[1]

    r, u = with_share(0.0), with_share(1.0)
    np.testing.assert_allclose(r, segmented(load_model(study[0]), scan)[1], atol=1e-6)
    own = load_scan([scan])
    _, on_grid, observed, alignment = model.place(own)
    assert np.allclose(alignment.matrix, np.eye(4)) and model.label_network is not None
    said = log_label_marginals(model.label_network, model.shape_prior.log_location_prior, on_grid, observed)[0].exp()
    np.testing.assert_allclose(u, said.numpy(), atol=1e-5)
    pooled = r**0.7 * u**0.3
    assert np.abs(with_share(0.3) - pooled / pooled.sum(0)).max() < 0.05  # r is the mean of four draws here, not each


def test_its_network_serves_any_number_of_channels(asleep: tuple[Model, Path], study: tuple[Path, list[Path]]) -> None:
    both = asleep[0].segment((study[1][0], study[1][0]), draws=4, refine=1, keep_probabilities=True)
    assert both.probabilities is not None and np.isfinite(both.probabilities).all()


def test_a_fit_keeps_the_priors_network_or_replaces_it(
    asleep: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    kept = fit_scans(study[1], prior=asleep[1], out=tmp_path / "kept", steps=2, label_rounds=0)
    assert kept.label_network is not None and load_model(tmp_path / "kept").hash == kept.hash
    assert kept.config["label_network"] == asleep[0].config["label_network"]
    replaced = fit_scans(study[1], prior=asleep[1], out=tmp_path / "replaced", steps=2, label_rounds=1)
    assert replaced.config["label_network"]["network"] == "u-net"
    again = fit_scans(study[1], prior=replaced, out=tmp_path / "again", steps=2, label_rounds=0)
    assert (
        again.label_network is None and again.border_shift is None and load_model(tmp_path / "again").hash == again.hash
    )
    assert "label_guide" in kept.config["training"] and "label_guide" not in replaced.config["training"]


def test_a_prior_killed_while_asleep_resumes_to_the_same_model(
    asleep: tuple[Model, Path], study: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, options = sorted(study[0].parent.glob("*_dseg.nii.gz")), {"latent_dim": 3, "steps": 20, "label_steps": STEPS}

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prior_api, "draw_prior", dies)
    with pytest.raises(KeyboardInterrupt):
        learn_prior(maps, out=tmp_path / "model", **options)
    assert (tmp_path / "model" / LABELS / "checkpoint.json").is_file()
    monkeypatch.undo()
    with pytest.raises(InputError, match="interrupted training; go on with --resume"):
        learn_prior(maps, out=tmp_path / "model", **options)
    model = learn_prior(maps, out=tmp_path / "model", resume=True, **options)
    assert model.hash == asleep[0].hash
    with pytest.raises(InputError, match="--label-steps"):
        learn_prior(maps, out=tmp_path / "other", label_steps=-1)


def test_flat_label_maps_teach_no_network(tmp_path: Path) -> None:
    flat = np.zeros((12, 12, 1), np.uint8)
    flat[3:9, 3:9] = 1
    maps = [write(tmp_path / f"sub-{n}_dseg.nii.gz", flat) for n in range(3)]
    with pytest.raises(InputError, match="--label-steps learns from volumes"):
        learn_prior(maps, out=tmp_path / "model", latent_dim=2, steps=2, label_steps=1)


def test_a_folder_of_the_users_own_labels_is_left_alone(study: tuple[Path, list[Path]], tmp_path: Path) -> None:
    own = tmp_path / LABELS / "mine_dseg.nii.gz"
    own.parent.mkdir()
    own.write_bytes(b"precious")
    with pytest.raises(InputError, match="holds labels of something else"):
        learn_prior(sorted(study[0].parent.glob("*_dseg.nii.gz")), out=tmp_path, latent_dim=3, steps=2)
    assert own.read_bytes() == b"precious"
