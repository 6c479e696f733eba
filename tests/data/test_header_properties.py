"""Any header: the values and the affine are those of the standard, or the file is refused for a reason it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_seg.data.images import read_label_map, read_scan, write_image
from ppl_seg.errors import InputError
from tests.reference.nifti import CODES, UNITS, Nifti

SMALLEST, LARGEST = 0.05, 20.0  # mm
SIZES = st.floats(0.03, 30).map(np.float32).map(float)
NEAR = st.floats(0.3, 3).map(np.float32).map(float)


@st.composite
def headers(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(CODES)) -> Nifti:
    """Files of 1 to 5 axes, every type, both byte orders, with forms that are right, oblique, sheared or none."""
    shape = draw(st.lists(st.integers(3, 6), min_size=2, max_size=3)) + draw(st.sampled_from([[], [1], [1, 1], [2]]))
    kind = np.dtype(draw(st.sampled_from(kinds)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (-1e4, 1e4) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    stored = (random.uniform(low, high, shape)).astype(kind)
    unit = draw(st.sampled_from(sorted(UNITS)))
    version = draw(st.sampled_from((1, 2)))
    size = np.array([draw(SIZES if draw(st.booleans()) else NEAR) for _ in range(3)]) / UNITS[unit]
    turn = draw(st.tuples(*[st.floats(-0.57, 0.57)] * 3))  # b, c, d: their squares sum to less than 1
    shear = np.eye(3) + np.triu(random.uniform(-0.3, 0.3, (3, 3)), 1) * draw(st.sampled_from((0, 1)))
    exact = np.float32 if version == 1 else np.float64
    offset = random.uniform(-200, 200, 3) / UNITS[unit]
    form = Nifti(stored, pixdim=tuple(size), qform_code=1, quaternion=turn, unit=0).affine[:3, :3]  # type: ignore[arg-type]
    return Nifti(
        stored,
        slope=float(exact(draw(st.sampled_from((0.0, 1.0, 0.5, -2.0, 1e-3, np.nan, np.inf))))),
        inter=draw(st.sampled_from((0.0, -100.0, 7.5))),
        pixdim=tuple(exact(size).tolist()),
        qfac=draw(st.sampled_from((1.0, -1.0, 0.0))),
        unit=unit,
        sform_code=draw(st.integers(0, 4)),
        qform_code=draw(st.integers(0, 4)),
        rows=exact(np.column_stack([form @ shear, offset])),
        quaternion=tuple(exact(turn).tolist()),
        offset=tuple(exact(offset).tolist()),
        version=version,
        order=draw(st.sampled_from("<>")),
        gap=draw(st.sampled_from((0, 16, 1000))),
    )


def refusal(file: Nifti) -> str:
    """Words of the error that the file deserves; empty where it is right."""
    shape = [*file.stored.shape]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)
    if not np.isfinite(file.slope):
        return "scl_slope"
    if len(shape) > 3:
        return "expected three axes"
    if spacing.min() < SMALLEST or spacing.max() > LARGEST:
        return "voxels of"
    return ""


def on_the_edge(file: Nifti) -> bool:
    """Voxel sizes that rounding decides about."""
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)
    return bool((np.abs(np.log(spacing[:, None] / [SMALLEST, LARGEST])) < 1e-5).any())


@given(headers(), st.booleans(), st.sampled_from((".nii", ".nii.gz")))
@settings(max_examples=60)
def test_scans(tmp_path_factory: pytest.TempPathFactory, file: Nifti, compressed: bool, extension: str) -> None:
    check_scan(tmp_path_factory.mktemp("scans"), file, compressed, extension)


@pytest.mark.slow
@given(headers(), st.booleans(), st.sampled_from((".nii", ".nii.gz")))
@settings(max_examples=3000)
def test_many_scans(tmp_path_factory: pytest.TempPathFactory, file: Nifti, compressed: bool, extension: str) -> None:
    check_scan(tmp_path_factory.getbasetemp(), file, compressed, extension)


def check_scan(folder: Path, file: Nifti, compressed: bool, extension: str) -> None:
    path = folder / f"a{extension}"
    path.write_bytes(file.content(compressed))
    reason = refusal(file)
    if on_the_edge(file):
        return
    if reason:
        with pytest.raises(InputError, match=reason) as caught:
            read_scan(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        return
    if len(np.unique(file.values.astype(np.float32))) <= 16:  # of few voxels, or of int8: taken for a label map
        return
    scan = read_scan(path)
    expected = file.values.reshape(scan.shape, order="F").astype(np.float32)
    np.testing.assert_allclose(scan.data, expected, rtol=1e-6)
    np.testing.assert_allclose(scan.affine, file.affine, rtol=1e-4, atol=1e-3)
    unknown = any("left and right are unknown" in warning for warning in scan.warnings)
    assert unknown == (file.sform_code == file.qform_code == 0)

    out = folder / "out.nii"
    write_image(out, np.zeros(scan.shape, np.uint8) + 1, scan)
    np.testing.assert_allclose(read_label_map(out).affine, scan.affine, rtol=1e-12, atol=1e-12)


@given(headers(kinds=("u1", "i2", "i4", "i8", "f4", "f8")), st.integers(1, 5))
def test_label_maps(tmp_path_factory: pytest.TempPathFactory, file: Nifti, number: int) -> None:
    path = tmp_path_factory.mktemp("maps") / "a_dseg.nii"
    file.stored = (np.abs(file.stored.astype(np.float64)) % (number + 1)).astype(file.stored.dtype)
    path.write_bytes(file.content())
    whole = np.isfinite(file.slope) and (file.values == np.round(file.values)).all()
    if on_the_edge(file):
        return
    if refusal(file) or not whole or not file.values.any():
        with pytest.raises(InputError):
            read_label_map(path)
        return
    image = read_label_map(path)
    np.testing.assert_array_equal(image.data, file.values.reshape(image.shape, order="F"))
