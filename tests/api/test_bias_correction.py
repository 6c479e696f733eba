"""Where a bias field is divided out: of heads, unless somebody says otherwise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from ppl_seg import learn_prior
from ppl_seg.api import Model
from ppl_seg.api.fit import _Stage
from ppl_seg.data.loading import load_scan
from ppl_seg.errors import InputError
from ppl_seg.inference.networks import build_scan_guide
from ppl_seg.inference.recipes import build_recipe
from ppl_seg.inference.training_log import TrainingLog
from ppl_seg.models.segmentation import SegmentationModel
from tests.data.heads import BRIGHT, head_labels, resized, scan_of
from tests.data.test_bias_field import wave

TABLE = "index\tname\n0\tBackground\n1\tSkin\n2\tSkull\n3\tLeft-Cerebral-Cortex\n4\tLeft-Cerebral-White-Matter\n"
TABLE += "5\tLeft-Lateral-Ventricle\n6\tLeft-Putamen\n7\tBrain-Stem\n"
WHITE_MATTER = 4


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A prior of heads, and a scan with a field of the person in the middle."""
    folder = tmp_path_factory.mktemp("heads")
    labels, affine = head_labels()
    (folder / "labels.tsv").write_text(TABLE)
    for name, size in (("1", 1.0), ("2", 1.04), ("3", 0.96)):
        nib.save(nib.Nifti1Image(resized(labels, size), affine), folder / f"sub-{name}_dseg.nii.gz")
    scan = np.maximum(scan_of(labels, affine, BRIGHT).data, 0) * np.exp(wave(labels.shape))
    nib.save(nib.Nifti1Image(scan.astype(np.float32), affine), folder / "sub-1_T1w.nii.gz")
    prior = learn_prior(
        sorted(folder.glob("*dseg.nii.gz")), labels=folder / "labels.tsv", spacing=8, steps=1, align="none"
    )
    return prior, folder / "sub-1_T1w.nii.gz"


def spread(model: Model, scan: Path, choice: str, view: str) -> tuple[float, float]:
    """Standard deviation of the white matter's normalised intensities: in the scan's own voxels, and on the grid."""
    own = load_scan((scan,))
    normalised, on_grid, _, alignment = model.place(own, "none", view, build_recipe("default", bias_field=choice))
    white = head_labels()[0] == WHITE_MATTER
    inner = ndimage.binary_erosion(white, iterations=2)
    places = np.rint((np.argwhere(inner) - alignment.matrix[:3, 3]) @ np.linalg.inv(alignment.matrix[:3, :3]).T)
    return float(normalised[0].numpy()[inner].std()), float(on_grid[0, 0].numpy()[tuple(places.astype(int).T)].std())


def test_heads_lose_their_field_and_brains_keep_it(head: tuple[Model, Path]) -> None:
    kept = spread(*head, "none", "head")
    for lost, whole in zip(spread(*head, "auto", "head"), kept, strict=True):
        assert lost < 0.5 * whole
    for view in ("brain", "crop"):
        assert spread(*head, "auto", view) == spread(*head, "none", view)


def test_what_was_done_is_recorded(head: tuple[Model, Path]) -> None:
    model, scan = head
    for choice, done in (("none", "none"), (None, "n4")):
        found = model.segment(scan, draws=1, align="none", recipe="location-em", bias_field=choice, view="head")
        assert found.provenance["bias_field"] == done
        assert f"'bias_field': '{choice or 'auto'}'" in str(found.provenance["options"])


def test_an_unknown_choice_is_refused(head: tuple[Model, Path]) -> None:
    with pytest.raises(InputError, match="--bias-field N3: unknown; choose one of auto, n4, none"):
        head[0].segment(head[1], bias_field="N3")


def test_simulated_heads_are_normalised_by_the_brain_as_real_ones_are(
    head: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scan = head
    regions = []

    def spy(self: _Stage, program: SegmentationModel, *_: Any) -> TrainingLog:
        regions.append(program.region)
        return TrainingLog()

    monkeypatch.setattr(_Stage, "_fit", spy)
    for view in ("head", "crop"):
        own = load_scan((scan,))
        _, x, observed, _ = model.place(own, "none", view, build_recipe("default"))
        stage = _Stage(model, model.recipe, x, observed, view, None, False, False, {})
        stage.learn_asleep(build_scan_guide(model.shape_prior, "mean-field", 1), stage.start()[1])
    of_head, of_crop = regions
    assert torch.equal(of_head, torch.from_numpy(model.atlas().brain > 0.5)) and 0 < of_head.float().mean() < 0.5
    assert of_crop is None


@pytest.mark.parametrize(
    "view, said", [("head", []), ("brain", ["a brain, under a prior of heads"]), ("crop", ["a crop"])]
)
def test_what_a_scan_is_taken_for_is_said_where_it_decides(
    head: tuple[Model, Path], caplog: pytest.LogCaptureFixture, view: str, said: list[str]
) -> None:
    """Without a registration, too: labels outside a brain are left out, a head loses its bias field."""
    own = load_scan((head[1],))
    with caplog.at_level(logging.INFO, "ppl_seg"):
        model, shown = head[0].for_scan(own, view)
        model.place(own, "none", shown)
    assert len(caplog.messages) == len(said)
    assert all(words in message for words, message in zip(said, caplog.messages, strict=True))


def test_scans_below_zero_keep_their_field(head: tuple[Model, Path], tmp_path: Path, caplog: Any) -> None:
    """A multiplicative field has no place where intensities are z-scores, and N4 would look at half of them."""
    model, scan = head
    image = nib.load(scan)
    data = image.get_fdata()
    z_scores = tmp_path / "z_T1w.nii.gz"
    nib.save(nib.Nifti1Image(((data - data.mean()) / data.std()).astype(np.float32), image.affine), z_scores)
    with caplog.at_level(logging.INFO, "ppl_seg"):
        found = model.segment(z_scores, align="none", view="head", draws=2, mask="none")
    assert found.provenance["bias_field"] == "none" and "its bias field is not corrected" in caplog.text
    with pytest.raises(InputError, match="intensities are below 0, which a multiplicative bias field does not allow"):
        model.segment(z_scores, align="none", view="head", draws=2, mask="none", bias_field="n4")
