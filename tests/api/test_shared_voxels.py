"""Partial volume changes what a brain is read out with, and nothing of what was inferred."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ppl_seg import learn_prior
from ppl_seg.api import Model
from ppl_seg.api.scan_inference import Inference, infer_scan
from ppl_seg.data.loading import load_scan
from ppl_seg.inference.recipes import Recipe, build_recipe
from tests.data.heads import BRIGHT, head_labels, resized, scan_of

TABLE = "index\tname\n0\tBackground\n3\tLeft-Cerebral-Cortex\n4\tLeft-Cerebral-White-Matter\n"
TABLE += "5\tLeft-Lateral-Ventricle\n6\tLeft-Putamen\n7\tBrain-Stem\n"


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A prior of brains, and a scan of one."""
    folder = tmp_path_factory.mktemp("brains")
    labels, affine = head_labels(heads=False)
    (folder / "labels.tsv").write_text(TABLE)
    for name, size in (("1", 1.0), ("2", 1.04), ("3", 0.96)):
        nib.save(nib.Nifti1Image(resized(labels, size), affine), folder / f"sub-{name}_dseg.nii.gz")
    scan = np.where(labels > 0, np.maximum(scan_of(labels, affine, BRIGHT).data, 1), 0)
    nib.save(nib.Nifti1Image(scan.astype(np.float32), affine), folder / "sub-1_T1w.nii.gz")
    maps = sorted(folder.glob("*dseg.nii.gz"))
    prior = learn_prior(maps, labels=folder / "labels.tsv", spacing=6, steps=2, align="none")
    return prior, folder / "sub-1_T1w.nii.gz"


def infer(brain: tuple[Model, Path], recipe: Recipe) -> Inference:
    model, path = brain
    _, scan, observed, _ = model.place(load_scan((path,)), "none", "brain", recipe)
    torch.manual_seed(0)
    return infer_scan(model, recipe, scan, observed)


@pytest.mark.parametrize(("local_blur", "mask"), [(0.0, 1.0), (4.0, 0.3)])
def test_what_is_read_out_has_shared_voxels(brain: tuple[Model, Path], local_blur: float, mask: float) -> None:
    """With the mask as an observation, too: then z is inferred with another program than is read out."""
    recipe = replace(brain[0].adapted_recipe(build_recipe("default")), local_blur=local_blur)
    recipe = replace(recipe, mask_background=mask, mask_fluid=mask)
    assert recipe.partial_volume and brain[0].field_of_view == "brain"
    without, found = (infer(brain, replace(recipe, partial_volume=on)) for on in (False, True))
    background, *others = without.model.intensity.components
    assert found.model.intensity.components == (background, *(k + 1 for k in others))
    assert (found.program is found.model) == (mask == 1)
    assert found.program.intensity.components == found.model.intensity.components
    assert found.model.intensity.outliers == found.program.intensity.outliers == recipe.outliers > 0
    assert found.bound == without.bound and torch.equal(found.posterior.q.mean, without.posterior.q.mean)
    marginals = found.label_marginals(2, 1.0)
    torch.testing.assert_close(marginals.sum(1), torch.ones_like(marginals[:, 0]))


def test_a_class_of_its_own_for_each_label_knows_no_fluid(brain: tuple[Model, Path]) -> None:
    recipe = replace(brain[0].adapted_recipe(build_recipe("default")), classes="labels", partial_volume=True)
    found = infer(brain, recipe)
    assert set(found.model.intensity.components[1:]) == {recipe.components}


@pytest.mark.parametrize("mask", [1.0, 0.3])
def test_z_and_intensities_once_more_beside_shared_voxels(brain: tuple[Model, Path], mask: float) -> None:
    """As heads have it: z moves, the bound is of what it was inferred with, and voxels are shared once."""
    recipe = replace(brain[0].adapted_recipe(build_recipe("default")), local_blur=0.0, mask_background=mask)
    before = infer(brain, replace(recipe, mask_fluid=mask))
    found = infer(brain, replace(recipe, mask_fluid=mask, shared_steps=4, again_steps=20))
    assert found.model.intensity.components == before.model.intensity.components
    assert found.program.intensity.components == before.program.intensity.components
    assert not torch.equal(found.posterior.q.mean, before.posterior.q.mean)
    assert found.bound > before.bound and found.kl > 0 and len(found.posterior.bounds) == 20
    assert bool(found.posterior.theta.mean.isfinite().all() and (found.posterior.theta.sd > 0).all())
