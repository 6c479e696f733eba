from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline

from ppl_seg.data.information import _BINS, Comparison, most_informative, strain
from ppl_seg.data.registration import Volume

from .heads import BRIGHT, INVERTED, SPACING, head_labels, scan_of
from .test_alignment import moved


def comparison(contrast: tuple[float, ...], affine: np.ndarray, number: int = 6000) -> Comparison:
    """Of the made head with its own classes, the scan elsewhere."""
    classes, own = head_labels()
    scan = scan_of(classes, affine, contrast).data
    moving = Volume(((scan - scan.min()) / np.ptp(scan)).astype(np.float32), affine)
    seen = Volume(np.ones_like(moving.data), affine)
    return Comparison.of(Volume(classes.astype(np.float32), own), moving, seen, [(classes > 0, number)], SPACING)


def test_information_is_that_of_a_histogram_with_splines():
    compared = comparison(BRIGHT, head_labels()[1], 500)
    world = moved(np.eye(4), (3, 2, -4), (5, -70, 6))[1]  # some points leave the scan
    places = np.c_[compared.points, np.ones(500)] @ (compared.to_voxel.numpy() @ world).T
    volumes = [
        ndimage.map_coordinates(v, places[:, :3].T, order=1, mode="grid-constant") for v in compared.scan[0].numpy()
    ]
    seen = volumes[1]
    steps = np.clip(volumes[0] / np.maximum(seen, 1e-3), 0, 1) * (_BINS - 4) + 1.5
    joint = np.zeros((8, _BINS))
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    for b in range(_BINS):
        np.add.at(joint[:, b], compared.classes.numpy(), seen * np.nan_to_num(spline(steps - b)))
    joint /= joint.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)))
    assert 0.3 < seen.mean() < 0.95
    value = float(compared.information(torch.from_numpy(world)))
    assert value == pytest.approx(np.nansum(terms) * seen.mean(), rel=1e-6)


def test_gradient_is_that_of_differences():
    compared = comparison(INVERTED, head_labels()[1], 800)
    world = torch.from_numpy(moved(np.eye(4), (3, 2, -4), (5, -7, 6))[1]).requires_grad_()
    (gradient,) = torch.autograd.grad(compared.information(world), world)
    random = np.random.default_rng(0)
    direction = torch.from_numpy(np.r_[random.normal(0, 1, (3, 4)) * [0.02, 0.02, 0.02, 1], np.zeros((1, 4))])
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (float(compared.information(world + sign * step * direction)) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_the_optimum_does_not_depend_on_the_start(kind):
    affine, world = moved(head_labels()[1], (4, -3, 5), (6, 4, -5))
    compared = comparison(INVERTED, affine, 20_000)
    found = []
    for angles, shift in (((4, -3, 5), (6, 4, -5)), ((6, -1, 2), (9, 1, -8)), ((1, -5, 6), (4, 7, -1))):
        start = moved(np.eye(4), angles, shift)[1]
        found.append(most_informative(compared, start, kind))
    points = np.c_[compared.points.numpy(), np.ones(len(compared.points))]
    for other, information in found[1:]:
        assert np.linalg.norm(points @ (other - found[0][0]).T, axis=1).max() < 0.2  # mm
        assert information == pytest.approx(found[0][1], abs=1e-5)
    assert np.linalg.norm(points @ (found[0][0] - world).T, axis=1).max() < 1.0


def test_stiffness_costs_stretches_and_no_turns():
    affine, _ = moved(head_labels()[1], (4, -3, 5), (6, 4, -5), (1.1, 0.95, 1.0))
    compared = comparison(INVERTED, affine)
    strains = []
    for stiffness in (0.0, 3.0, 300.0):
        found, _ = most_informative(compared, np.eye(4), "affine", stiffness=stiffness)
        stretch = np.linalg.svd(found[:3, :3], compute_uv=False)
        strains.append(float(np.abs(np.log(stretch)).max()))
    assert strains[0] == pytest.approx(np.log(1.1), abs=0.02)
    assert strains[0] > strains[1] > strains[2] and strains[2] < 0.02
    assert np.linalg.norm(found[:3, :3] - np.eye(3)) > 0.1  # turned all the same


def test_strain_is_of_the_whole_map_and_not_of_its_last_step():
    """A stage that begins where another has shrunk pays for both."""
    random = np.random.default_rng(0)
    world = np.eye(4)
    world[:3, :3] += 0.2 * random.normal(size=(3, 3))
    expected = (np.log(np.linalg.svd(world[:3, :3], compute_uv=False)) ** 2).sum()
    assert float(strain(torch.from_numpy(world))) == pytest.approx(expected, rel=1e-10)
    compared = comparison(INVERTED, head_labels()[1])
    begun = np.diag([0.8, 0.8, 0.8, 1.0])
    found, _ = most_informative(compared, begun, "similarity", stiffness=300.0)
    assert np.linalg.svd(found[:3, :3], compute_uv=False) == pytest.approx(np.ones(3), abs=0.02)
