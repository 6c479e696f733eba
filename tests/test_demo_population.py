"""The demo's simulated population: complete, reproducible, anatomically sane, made without a network."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ppl_seg import demo_population
from ppl_seg.demo_population import make_label_maps, make_scan, population_grid, write_population
from ppl_seg.demo_template import STRUCTURES, template_label_map

INDICES = [structure.index for structure in STRUCTURES]
PAIRS = [
    (left, right)
    for left in STRUCTURES
    for right in STRUCTURES
    if left.name.startswith("Left-") and right.name == left.name.replace("Left-", "Right-")
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the demo's population must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def label_maps() -> np.ndarray:
    return make_label_maps(6, seed=3)


def largest_share(mask: np.ndarray) -> float:
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return float(np.bincount(parts.ravel())[1:].max() / mask.sum()) if count else 0.0


def test_template_is_made_without_network_and_has_every_structure_in_one_piece() -> None:
    template_label_map.cache_clear()
    labels, affine = template_label_map()
    assert set(np.unique(labels)) == {0, *INDICES}
    assert np.array_equal(np.diag(affine), [2.0, 2.0, 2.0, 1.0])
    # Fluid is around and between: it may have small ponds of its own.
    assert all(largest_share(labels == index) > (0.95 if index == 24 else 0.99) for index in INDICES)


def test_template_has_the_known_places_and_sides() -> None:
    labels, affine = template_label_map()
    known = {
        (-12, -18, 8): 10,
        (12, -18, 8): 49,
        (-26, 4, 2): 12,
        (13, 14, 6): 50,
        (0, -28, -32): 16,
        (-30, -65, -40): 8,
        (-30, -20, 28): 2,
        (28, -42, 6): 43,
        (0, 60, 60): 0,
    }
    for place, index in known.items():
        x, y, z = np.round(np.linalg.inv(affine) @ (*place, 1.0)).astype(int)[:3]
        assert labels[x, y, z] == index, place
    for left, right in PAIRS:
        volumes = [(labels == structure.index).sum() for structure in (left, right)]
        assert max(volumes) < 1.05 * min(volumes), left.name


def test_left_and_right_are_pairs_of_one_tissue_and_several_structures_share_one() -> None:
    assert len(PAIRS) == 8
    assert all(left.tissue == right.tissue for left, right in PAIRS)
    assert len({structure.tissue for structure in STRUCTURES}) <= len(STRUCTURES) // 3


def test_every_label_map_has_every_structure_mainly_in_one_piece(label_maps: np.ndarray) -> None:
    assert label_maps.shape == (6, *population_grid()[0]) == (6, 40, 48, 40)
    for labels in label_maps:
        assert set(np.unique(labels)) == {0, *INDICES}
        # 4 mm voxels cut thin sheets: the cerebellum's white matter and the ventricles lose a few.
        assert min(largest_share(labels == index) for index in INDICES) > 0.6
        assert all(largest_share(labels == index) > 0.95 for index in (2, 3, 10, 16, 41, 42, 49))
        assert largest_share(labels > 0) == 1.0


def test_persons_differ_and_ventricles_vary_most(label_maps: np.ndarray) -> None:
    ventricle = np.array([np.isin(labels, (4, 43)).sum() for labels in label_maps])
    brain = np.array([(labels > 0).sum() for labels in label_maps])
    assert ventricle.std() / ventricle.mean() > 2 * brain.std() / brain.mean()
    assert min((a != b).mean() for i, a in enumerate(label_maps) for b in label_maps[:i]) > 0.05


def test_deformations_do_not_fold() -> None:
    for person in range(4):
        flow = demo_population._flow(demo_population._random_velocity(np.random.default_rng([0, person])))
        jacobian = np.stack([np.stack(np.gradient(component, demo_population._FIELD_SPACING)) for component in flow])
        determinants = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)) + np.eye(3))
        assert determinants.min() > 0


def test_a_person_depends_on_seed_and_number_alone(label_maps: np.ndarray) -> None:
    assert np.array_equal(make_label_maps(1, seed=3, first=5)[0], label_maps[4])
    assert not np.array_equal(make_label_maps(1, seed=4, first=5)[0], label_maps[4])


def test_a_finer_grid_has_the_same_anatomy(label_maps: np.ndarray) -> None:
    fine = make_label_maps(1, seed=3, spacing=3.0)[0]
    assert fine.shape == population_grid(3.0)[0] == (53, 64, 53)
    for index in (3, 10, 16):
        assert (fine == index).sum() * 27 == pytest.approx((label_maps[0] == index).sum() * 64, rel=0.15)


def test_no_persons_and_bad_spacing() -> None:
    assert make_label_maps(0).shape == (0, 40, 48, 40)
    with pytest.raises(ValueError, match="spacing must be positive"):
        population_grid(0.0)


@pytest.mark.parametrize("contrast", ["t1", "inverted"])
def test_scan_is_reproducible_finite_and_zero_outside(
    label_maps: np.ndarray, contrast: demo_population.Contrast
) -> None:
    scan = make_scan(label_maps[0], contrast, seed=1)
    assert scan.dtype == np.float32 and scan.shape == label_maps[0].shape
    assert np.isfinite(scan).all() and (scan >= 0).all()
    assert np.array_equal(scan, make_scan(label_maps[0], contrast, seed=1))
    assert not np.array_equal(scan, make_scan(label_maps[0], contrast, seed=2))
    outside = label_maps[0] == 0
    assert (scan[~outside] > 0).mean() > 0.999
    # The brain extraction is not perfect: a little that has no label is left.
    assert 0.005 < (scan[outside] > 0).sum() / (~outside).sum() < 0.2


def test_contrasts_are_inverse_and_left_and_right_share_an_intensity(label_maps: np.ndarray) -> None:
    for contrast, sign in (("t1", 1), ("inverted", -1)):
        differences: dict[str, list[float]] = {left.name: [] for left, _ in PAIRS}
        for seed, labels in enumerate(label_maps):
            scan = make_scan(labels, contrast, seed)
            white, cortex = (float(np.median(scan[np.isin(labels, pair)])) for pair in ((2, 41), (3, 42)))
            assert sign * (white - cortex) > 0.15 * max(white, cortex)
            for left, right in PAIRS:
                a, b = (float(scan[labels == structure.index].mean()) for structure in (left, right))
                differences[left.name].append((a - b) / (a + b))
        # Only the bias field and neighbours in the same voxel tell the sides apart, and they favour none.
        assert max(abs(np.mean(values)) for values in differences.values()) < 0.06


def test_written_population_can_be_read_and_is_the_same_again(tmp_path: Path) -> None:
    files = write_population(tmp_path / "a", num_prior=2, num_scans=1, seed=5)
    again = write_population(tmp_path / "b", num_prior=2, num_scans=1, seed=5)
    assert [path.name for path in files.label_maps] == ["sub-01_dseg.nii.gz", "sub-02_dseg.nii.gz"]
    assert [path.relative_to(tmp_path / "a") for path in (*files.scans, *files.truth)] == [
        Path("scans/sub-101_T2w.nii.gz"),
        Path("truth/sub-101_dseg.nii.gz"),
    ]
    for one, other in zip(
        (*files.label_maps, *files.scans, *files.truth),
        (*again.label_maps, *again.scans, *again.truth),
        strict=True,
    ):
        image = nib.load(one)
        assert isinstance(image, nib.Nifti1Image)
        assert np.allclose(image.affine, population_grid()[1]) and np.allclose(image.get_qform(), image.affine)
        assert np.array_equal(image.get_fdata(), nib.load(other).get_fdata())  # type: ignore[attr-defined]
    truth = np.asarray(nib.load(files.truth[0]).dataobj)  # type: ignore[attr-defined]
    scan = np.asarray(nib.load(files.scans[0]).dataobj)  # type: ignore[attr-defined]
    assert truth.dtype == np.uint8 and np.array_equal(truth, make_label_maps(1, seed=5, first=101)[0])
    assert np.array_equal(scan, make_scan(truth, "inverted", seed=5101))


def test_label_table(tmp_path: Path) -> None:
    table = write_population(tmp_path, num_prior=0, num_scans=0, contrast="t1").table
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    assert rows[:2] == [["index", "name", "color"], ["0", "Background", "#000000"]]
    assert [int(row[0]) for row in rows[1:]] == [0, *INDICES]
    assert ["10", "Left-Thalamus", "#00760E"] in rows


def test_too_many_label_maps_would_collide_with_the_scanned_persons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_prior=101"):
        write_population(tmp_path, num_prior=101)


@pytest.mark.slow
def test_default_population_is_quick(tmp_path: Path) -> None:
    start = time.process_time()
    files = write_population(tmp_path)
    assert (len(files.label_maps), len(files.scans)) == (24, 12)
    assert time.process_time() - start < 20
