"""`prior --shape warp` and what follows it, through the real commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg import fit_scans, load_model
from ppl_seg.api import Model
from ppl_seg.errors import InputError
from ppl_seg.models.warped_atlas import WarpedAtlas
from ppl_seg.results.segmentation import Segmentation

Run = Callable[..., tuple[int, str, str]]
SHAPE = (24, 26, 22)


def ball(number: int) -> np.ndarray:
    """A ball in a ball, a little elsewhere in each."""
    centre = np.array([11.5, 12.5, 10.5]) + np.random.default_rng(number).uniform(-2, 2, 3)
    distance = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - centre, axis=-1)
    return (distance < 7).astype(np.int16) + (distance < 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four label maps and two scans."""
    folder = tmp_path_factory.mktemp("balls")
    affine = np.diag([2.0, 2, 2, 1])
    for number in range(4):
        nib.save(nib.Nifti1Image(ball(number), affine), folder / f"sub-0{number}_dseg.nii.gz")
    for number in (4, 5):
        noise = np.random.default_rng(number).normal(0, 5, SHAPE)
        scan = (100 + 60 * ball(number) + noise).astype(np.float32)
        nib.save(nib.Nifti1Image(scan, affine), folder / f"sub-0{number}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="module")
def prior(folder: Path) -> Path:
    from ppl_seg import learn_prior

    learn_prior([folder], out=folder / "prior", shape="warp", align="none", steps=30)
    return folder / "prior"


def test_the_model_directory(prior: Path) -> None:
    config = json.loads((prior / "config.json").read_text())
    assert config["shape_prior"]["decoder"] == "warp"
    assert config["shape_prior"]["options"] == {"control": 6, "label_maps": 4}
    report = json.loads((prior / "report.json").read_text())
    assert report["mean_reconstruction_dice"] > 0.8
    model = load_model(prior)
    assert isinstance(model.shape_prior, WarpedAtlas)
    assert model.hash == load_model(prior).hash


def test_segment_follows_the_scan(run: Run, prior: Path, folder: Path) -> None:
    code, out, err = run(
        "segment", folder / "sub-04_T1w.nii.gz", "--model", prior, "--out", folder / "out", "--draws", 8
    )
    assert code == 0, out + err
    (path,) = (folder / "out").rglob("*_dseg.nii.gz")
    found, truth = np.asarray(nib.load(path).dataobj), ball(4)
    for value in (1, 2):
        overlap = 2 * ((found == value) & (truth == value)).sum() / ((found == value).sum() + (truth == value).sum())
        assert overlap > 0.85


def test_the_bound_chooses_how_far_the_atlas_is_deformed(prior: Path, folder: Path) -> None:
    model, scan = load_model(prior), folder / "sub-04_T1w.nii.gz"

    def segment(*strengths: float) -> Segmentation:
        return replace(model, recipe=replace(model.recipe, strengths=strengths)).segment(scan, draws=2)

    alone = {strength: segment(strength).bound["bound"] for strength in (1.0, 0.05)}
    for chosen in (segment(1.0, 0.05), segment(0.05, 1.0)):
        best = chosen.provenance["deformation_strength"]
        assert best == max(alone, key=lambda strength: alone[strength])
        assert chosen.bound["bound"] == pytest.approx(alone[best], rel=0.02)
    assert abs(alone[1.0] - alone[0.05]) > 0.05 * abs(max(alone.values()))  # 2.5 times what two runs may differ by


def test_label_maps_make_a_template_for_a_scan(prior: Path, folder: Path) -> None:
    model, scan = load_model(prior), folder / "sub-04_T1w.nii.gz"
    assert isinstance(model.shape_prior, WarpedAtlas)
    asked = replace(model, recipe=replace(model.recipe, fusion_power=0.05, fusion_blur=6.0, strengths=(0.3,)))
    template = model.shape_prior.log_location_prior.clone()
    usual = replace(asked, recipe=replace(asked.recipe, fusion_power=0.0)).segment(scan, draws=2)
    fused = asked.segment(scan, draws=2)
    assert fused.bound["bound"] > usual.bound["bound"]  # its template is nearer to it
    assert fused.bound["bound"] == asked.segment(scan, draws=2).bound["bound"]
    assert torch.equal(model.shape_prior.log_location_prior, template)
    without = WarpedAtlas(template.exp(), 6)  # of a model from before
    without.velocity_sd.copy_(model.shape_prior.velocity_sd)
    found = replace(asked, shape_prior=without).segment(scan, draws=2)
    assert found.bound["bound"] == pytest.approx(usual.bound["bound"], rel=1e-5)


@pytest.mark.parametrize("value", [-1, 3])
def test_label_maps_of_other_labels_are_refused(prior: Path, tmp_path: Path, value: int) -> None:
    model = load_model(prior)
    assert isinstance(model.shape_prior, WarpedAtlas)
    model.shape_prior.label_maps[0, 0, 0, 0] = value
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match="label maps with other labels than the table's"):
        load_model(tmp_path / "model")


def test_an_encoder_speaks_of_the_strength_that_it_was_fitted_with(prior: Path, folder: Path) -> None:
    scans = [folder / f"sub-0{number}_T1w.nii.gz" for number in (4, 5)]
    fitted = fit_scans(scans, prior=prior, mask="none", steps=2, label_rounds=0)

    def segment(model: Model, *strengths: float, refine: int | None = None) -> Segmentation:
        return replace(model, recipe=replace(model.recipe, strengths=strengths)).segment(
            scans[0], draws=2, refine=refine, mask="none"
        )

    assert segment(fitted, 1.0, 0.05, refine=0).provenance["deformation_strength"] is None  # the encoder alone
    elsewhere, of_the_prior = (segment(model, 0.05) for model in (fitted, load_model(prior)))
    assert elsewhere.bound["bound"] == pytest.approx(of_the_prior.bound["bound"], rel=1e-6)
    first = segment(fitted, 1.0)
    chosen = segment(fitted, 0.05, 1.0)
    best = max((first, elsewhere), key=lambda result: result.bound["bound"])
    assert chosen.provenance["deformation_strength"] == best.provenance["deformation_strength"]
    assert chosen.bound["bound"] == pytest.approx(best.bound["bound"], rel=0.02)


def test_a_label_map_of_the_scan_gives_the_shape(prior: Path, folder: Path) -> None:
    truth = folder / "sub-04_dseg.nii.gz"
    nib.save(nib.Nifti1Image(ball(4), np.diag([2.0, 2, 2, 1])), truth)
    try:
        result = load_model(prior).segment(folder / "sub-04_T1w.nii.gz", shape_from=truth, readout="decoder", draws=4)
    finally:
        truth.unlink()
    assert (result.label_map == ball(4)).mean() > 0.95


def test_fit_and_segment(run: Run, prior: Path, folder: Path) -> None:
    quick = ("--prior", prior, "--steps", 2, "--mask", "none")
    code, out, err = run(
        "fit", folder / "sub-04_T1w.nii.gz", folder / "sub-05_T1w.nii.gz", *quick, "--out", folder / "fit"
    )
    assert code == 0, out + err
    code, out, err = run(
        "segment",
        folder / "sub-05_T1w.nii.gz",
        "--model",
        folder / "fit",
        "--draws",
        2,
        "--refine",
        2,
        "--out",
        folder / "fitted",
    )
    assert code == 0, out + err
    (path,) = (folder / "fitted").rglob("*_dseg.nii.gz")
    found, truth = np.asarray(nib.load(path).dataobj) > 0, ball(5) > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shape", "sphere"), "--shape sphere: unknown; choose convolutional, warp, or a decoder"),
        (("--shape", "warp", "--latent-dim", 4), "leave --latent-dim and --objective out"),
        (("--shape", "warp", "--objective", "trace"), "leave --latent-dim and --objective out"),
    ],
)
def test_what_does_not_go_together(
    run: Run, folder: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    code, _, err = run("prior", folder, "--out", tmp_path / "model", *options)
    assert code == 2 and words in err
    assert not (tmp_path / "model").exists()


def test_outside_the_mask_is_background(prior: Path, folder: Path, tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[: SHAPE[0] // 2] = 1
    nib.save(nib.Nifti1Image(mask, np.diag([2.0, 2, 2, 1])), tmp_path / "sub-04_mask.nii.gz")
    scan = folder / "sub-04_T1w.nii.gz"
    result = load_model(prior).segment(scan, mask=tmp_path / "sub-04_mask.nii.gz", draws=3, keep_draws=True)
    assert result.draws is not None
    for labels in (result.label_map, *result.draws):
        assert not labels[mask == 0].any() and labels[mask == 1].any()
    assert not result.entropy[mask == 0].any()
