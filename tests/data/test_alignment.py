from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ppl_seg.data.alignment import LEAST_GAIN, Alignment, align_scan
from ppl_seg.data.fields import field_of_scan
from ppl_seg.data.grids import alignment_matrix
from ppl_seg.data.images import Image
from ppl_seg.errors import InputError

from .heads import BRAIN, BRIGHT, INVERTED, SPACING, atlas, head_labels, scan_of
from .test_images import orientations


def moved(affine: np.ndarray, angles, shift, stretch=(1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """An affine after a known world matrix, and that matrix."""
    world = np.eye(4)
    world[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(stretch)
    world[:3, 3] = shift
    return world @ affine, world


def error_in_mm(found: Alignment, world: np.ndarray) -> float:
    """Largest distance between where the two put the brain's voxels."""
    classes, affine = head_labels()
    points = np.argwhere(np.isin(classes, BRAIN)) @ affine[:3, :3].T + affine[:3, 3]
    points = np.c_[points, np.ones(len(points))]
    return float(np.linalg.norm((points @ (found.world - world).T)[:, :3], axis=1).max())


def observed_of(image: Image) -> np.ndarray:
    return image.data != 0 if (image.data == 0).mean() > 0.2 else np.ones(image.shape, dtype=bool)


@pytest.mark.parametrize("contrast", [BRIGHT, INVERTED])
def test_a_head_in_any_contrast(contrast):
    classes, affine = head_labels()
    affine, world = moved(affine, (14, -10, 8), (22, -18, 30), (1.06, 0.96, 1.0))
    image = scan_of(classes, affine, contrast)
    found = align_scan("affine", image, observed_of(image), atlas(), "head")
    assert error_in_mm(found, world) < 1.0 < SPACING
    np.testing.assert_allclose(image.affine @ found.matrix @ np.linalg.inv(atlas().grid.affine), found.world)
    assert (
        found.overlap is not None
        and found.overlap > 0.95
        and found.gain is not None
        and found.gain > 1.2 * LEAST_GAIN["head"]
    )


def test_voxels_that_are_not_numbers_do_not_count():
    classes, affine = head_labels()
    affine, world = moved(affine, (0, 0, 0), (12, -8, 10), (1.0, 1.0, 1.0))
    image = scan_of(classes, affine, BRIGHT)
    image.data[:4] = np.nan
    found = align_scan("rigid", image, np.isfinite(image.data), atlas(), "head")
    assert error_in_mm(found, world) < SPACING / 2


@pytest.mark.parametrize("prior_of_heads", [False, True])
def test_a_brain(prior_of_heads):
    classes, affine = head_labels(heads=False)
    affine, world = moved(affine, (-8, 12, 15), (300, -200, 80), (0.92, 1.05, 1.0))
    image = scan_of(classes, affine, INVERTED)
    seen = observed_of(image)
    assert field_of_scan(image, seen) == "brain"
    found = align_scan("affine", image, seen, atlas(prior_of_heads), "brain")
    assert error_in_mm(found, world) < SPACING / 3
    assert found.overlap is not None and found.overlap > 0.95
    assert found.gain is not None and found.gain > 2 * LEAST_GAIN["brain"]


def test_rigid_has_no_scale():
    classes, affine = head_labels()
    affine, _ = moved(affine, (5, 0, 10), (10, 0, 0), (1.1, 1.1, 1.1))
    image = scan_of(classes, affine, BRIGHT)
    found = align_scan("rigid", image, observed_of(image), atlas(), "head")
    linear = found.world[:3, :3]
    np.testing.assert_allclose(linear.T @ linear, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(
    "linear", [orientations()[3], *(pytest.param(orientations()[k], marks=pytest.mark.slow) for k in (20, 41))]
)
def test_the_order_of_voxels_does_not_matter(linear):
    classes, affine = head_labels(heads=False)
    plain = scan_of(classes, affine, BRIGHT)
    turned, shape = plain.data, plain.shape
    inverse = np.zeros((4, 4))
    inverse[3, 3] = 1
    turned = np.transpose(turned, [int(np.abs(linear[:, k]).argmax()) for k in range(3)])
    for k in range(3):
        old = int(np.abs(linear[:, k]).argmax())
        sign = int(linear[old, k])
        inverse[old, k] = sign
        if sign < 0:
            turned = np.flip(turned, k)
            inverse[old, 3] = shape[old] - 1
    image = replace(plain, data=np.ascontiguousarray(turned), affine=plain.affine @ inverse)
    one = align_scan("affine", plain, observed_of(plain), atlas(False), "brain")
    other = align_scan("affine", image, observed_of(image), atlas(False), "brain")
    assert max(error_in_mm(one, np.eye(4)), error_in_mm(other, np.eye(4))) < SPACING / 3


def test_registering_twice_gives_the_same():
    classes, affine = head_labels(heads=False)
    image = scan_of(classes, moved(affine, (5, 5, 5), (9, 9, 9))[0], BRIGHT)
    first, second = (align_scan("affine", image, observed_of(image), atlas(False), "brain") for _ in range(2))
    np.testing.assert_array_equal(first.matrix, second.matrix)


@pytest.mark.parametrize("heads", [True, False])
def test_a_header_that_puts_it_elsewhere_changes_nothing(heads):
    classes, affine = head_labels(heads)
    elsewhere, world = moved(affine, (18, -20, 15), (30, -25, 28))
    images = [scan_of(classes, at.astype(np.float32).astype(float), BRIGHT) for at in (affine, elsewhere)]
    field = "head" if heads else "brain"
    one, other = (align_scan("affine", image, observed_of(image), atlas(heads), field) for image in images)
    np.testing.assert_array_equal(one.matrix, other.matrix)
    np.testing.assert_allclose(world @ one.world, other.world, atol=1e-3)


def test_a_sheared_grid_is_not_made_right_by_turning():
    classes, affine = head_labels(heads=False)
    shear = np.eye(4)
    shear[0, 1] = 0.05
    places = np.linalg.inv(affine) @ shear @ affine
    image = scan_of(ndimage.affine_transform(classes, places[:3, :3], places[:3, 3], order=0), shear @ affine, BRIGHT)
    found = align_scan("rigid", image, observed_of(image), atlas(False), "brain")
    assert error_in_mm(found, np.eye(4)) < SPACING / 3
    np.testing.assert_allclose(found.world[:3, :3].T @ found.world[:3, :3], np.eye(3), atol=2e-4)


def test_none_and_center_are_what_the_headers_say():
    classes, affine = head_labels()
    image = scan_of(classes, affine, BRIGHT)
    for kind in ("none", "center"):
        found = align_scan(kind, image, observed_of(image), replace(atlas(), field="crop"), "head")
        np.testing.assert_array_equal(found.matrix, alignment_matrix(kind, image, atlas().grid))
        assert found.overlap is None


def test_center_brings_brains_together_by_their_centroids():
    classes, affine = head_labels(heads=False)
    image = scan_of(classes, moved(affine, (0, 0, 0), (50, 60, -70))[0], BRIGHT)
    found = align_scan("center", image, observed_of(image), atlas(False), "brain")
    np.testing.assert_allclose(found.world[:3, 3], (50, 60, -70), atol=0.2)
    with pytest.raises(InputError, match="--align affine.*--mask"):
        align_scan("center", image, observed_of(image), atlas(False), "head")


def test_what_cannot_be_registered():
    prior = atlas(heads=False)
    classes, affine = head_labels(heads=False)
    random = np.random.default_rng(1)
    brain = scan_of(classes, affine, BRIGHT)
    noise = replace(brain, data=np.where(classes > 0, random.normal(100, 10, classes.shape), 0).astype(np.float32))
    stick = np.zeros(classes.shape, bool)
    stick[10:12, :, 20:22] = True
    with pytest.raises(
        InputError, match="sub-01_T1w.nii.gz: wrong anatomy or no overlap.* times as well as 20 mm away"
    ):
        align_scan("affine", noise, observed_of(noise), prior, "brain")
    with pytest.raises(InputError, match="wrong anatomy or no overlap"):
        align_scan("affine", brain, stick, prior, "brain")
    with pytest.raises(InputError, match="wrong anatomy or no overlap"):
        far = replace(brain, data=random.normal(100, 10, classes.shape).astype(np.float32))
        align_scan("rigid", far, np.ones(classes.shape, bool), prior, "head")
    slice_of_it = replace(brain, data=brain.data[:, :, 20:21])
    with pytest.raises(InputError, match="needs at least 16 voxels.*--align center"):
        align_scan("affine", slice_of_it, observed_of(slice_of_it), prior, "brain")
    with pytest.raises(InputError, match="--align typo"):
        align_scan("typo", brain, observed_of(brain), prior, "brain")
