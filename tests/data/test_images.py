from __future__ import annotations

import gzip
import itertools
import os
import struct

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.images import (
    check_same_grid,
    read_label_map,
    read_mask,
    read_scan,
    same_grid,
    write_image,
    write_probabilities,
)
from ppl_seg.errors import InputError

from .conftest import blocks, noise

FORMS = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "srow_x",
    "srow_y",
    "srow_z",
)


def orientations() -> list[np.ndarray]:
    """The 48 ways voxel axes can run along the world's."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            linear = np.zeros((3, 3))
            linear[list(order), range(3)] = signs
            found.append(linear)
    return found


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles, degrees=True).as_matrix()


OBLIQUE = [
    rotation(a) @ o for a, o in zip([(10, -7, 20), (3, 40, -15), (-60, 5, 1)], orientations()[5::16], strict=False)
]


@pytest.mark.parametrize("linear", orientations() + OBLIQUE)
def test_round_trip_keeps_voxel_order_and_geometry(save, tmp_path, linear):
    affine = np.eye(4)
    affine[:3, :3] = linear * [1.0, 1.5, 2.0]
    affine[:3, 3] = [-90.5, 12.25, 33]
    path = save("a_T1w.nii.gz", noise(), affine)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.data, noise())
    np.testing.assert_allclose(scan.affine, affine, atol=1e-4)
    np.testing.assert_allclose(scan.spacing, (1, 1.5, 2), atol=1e-5)
    assert scan.voxel_volume == pytest.approx(3, rel=1e-5)
    assert scan.warnings == ()

    write_image(tmp_path / "out" / "a_dseg.nii.gz", blocks(), scan)
    again = nib.load(tmp_path / "out" / "a_dseg.nii.gz")
    source = nib.load(path)
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), blocks())
    assert np.array_equal(again.affine, source.affine)
    for field in FORMS:
        assert np.array_equal(again.header[field], source.header[field]), field
    np.testing.assert_array_equal(again.header["pixdim"][:4], source.header["pixdim"][:4])


def test_outputs_carry_nothing_that_identifies(save, tmp_path):
    def edit(image):
        image.header["descrip"] = b"Jane Doe"
        image.header["aux_file"] = b"jane"
        image.header["intent_name"] = b"jane"
        image.header["cal_max"] = 7
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
        image.header.set_xyzt_units("mm", "sec")

    scan = read_scan(save("a.nii", noise(), edit=edit))
    write_image(tmp_path / "b.nii", blocks(), scan)
    content = (tmp_path / "b.nii").read_bytes()
    assert b"ane" not in content
    header = nib.load(tmp_path / "b.nii").header
    assert header["cal_max"] == 0 and not header.extensions and header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (np.array([0, 255]), np.uint8),
        (np.array([True, False]), np.uint8),
        (np.array([0, 256]), np.uint16),
        (np.array([-1, 3]), np.int16),
        (np.array([0, 70000]), np.int32),
        (np.array([0.25, 0.5]), np.float32),
    ],
)
def test_smallest_type(save, tmp_path, data, kind):
    scan = read_scan(save("a.nii", noise((2, 3, 4))))
    data = np.broadcast_to(data[:, None, None], (2, 3, 4))
    write_image(tmp_path / "b.nii.gz", data, scan)
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.get_data_dtype() == kind
    np.testing.assert_array_equal(written.get_fdata(), data.astype(float))


def test_draws_and_probabilities_are_the_fourth_axis(save, tmp_path):
    scan = read_scan(save("a.nii", noise((3, 4, 5))))
    draws = np.random.default_rng(0).integers(0, 3, (7, 3, 4, 5))
    write_image(tmp_path / "draws.nii.gz", draws, scan)
    written = nib.load(tmp_path / "draws.nii.gz")
    assert written.shape == (3, 4, 5, 7) and written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.moveaxis(np.asanyarray(written.dataobj), -1, 0), draws)

    probs = np.random.default_rng(0).dirichlet(np.ones(3), (3, 4, 5)).transpose(3, 0, 1, 2)
    write_probabilities(tmp_path / "p.nii.gz", probs, scan)
    written = nib.load(tmp_path / "p.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(np.moveaxis(written.get_fdata(), -1, 0), probs, atol=0.5 / 255 + 1e-6)
    with pytest.raises(ValueError, match="expected the shape"):
        write_image(tmp_path / "x.nii.gz", draws.transpose(1, 2, 3, 0), scan)


def test_nothing_is_left_behind_where_writing_fails(save, tmp_path, monkeypatch):
    scan = read_scan(save("a.nii", noise()))
    out = tmp_path / "o"
    write_image(out / "b.nii.gz", blocks(), scan)
    before = (out / "b.nii.gz").read_bytes()

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppl_seg.data.images.nib.save", full)
    with pytest.raises(InputError, match="No space left"):
        write_image(out / "b.nii.gz", blocks() * 3, scan)
    assert os.listdir(out) == ["b.nii.gz"] and (out / "b.nii.gz").read_bytes() == before


def test_content_decides_not_the_extension(save, tmp_path):
    plain = save("a.nii", noise())
    (tmp_path / "b.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(read_scan(tmp_path / name).data, noise())


def test_mgz_gives_a_nifti_of_the_same_vox2ras(tmp_path):
    affine = np.array([[-1.0, 0, 0, 30], [0, 0, 1, -40], [0, -1, 0, 20], [0, 0, 0, 1]])
    nib.save(nib.MGHImage(noise(), affine), tmp_path / "orig.mgz")
    scan = read_scan(tmp_path / "orig.mgz")
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    write_image(tmp_path / "o.nii.gz", blocks(), scan)
    written = nib.load(tmp_path / "o.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    np.testing.assert_allclose(written.header.get_qform(), affine, atol=1e-4)
    np.testing.assert_array_equal(written.get_fdata(), blocks())


def test_nifti2_and_analyze(tmp_path):
    nib.save(nib.Nifti2Image(noise(), np.diag([2, 2, 2, 1.0])), tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_array_equal(scan.data, noise())
    write_image(tmp_path / "b.nii.gz", blocks(), scan)
    assert isinstance(nib.load(tmp_path / "b.nii.gz"), nib.Nifti2Image)
    nib.save(nib.AnalyzeImage(noise(), np.diag([-1.0, 1, 1, 1])), tmp_path / "c.hdr")
    scan = read_scan(tmp_path / "c.hdr")
    np.testing.assert_array_equal(scan.data, noise())
    assert "left and right are unknown" in scan.warnings[0]


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 6), (5, 6, 1)), ((5, 6, 4, 1, 1), (5, 6, 4)), ((5, 6, 1, 1), (5, 6, 1))]
)
def test_trailing_axes_of_one(save, shape, expected):
    assert read_scan(save("a.nii", noise(shape))).shape == expected


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e3), ("micron", 1e-3), ("unknown", 1.0)])
def test_units_are_converted_and_kept_in_outputs(save, tmp_path, unit, factor):
    path = save("a.nii", noise(), np.diag([2 / factor] * 3 + [1]), lambda im: im.header.set_xyzt_units(unit))
    scan = read_scan(path)
    np.testing.assert_allclose(scan.spacing, 2, rtol=1e-5)
    write_image(tmp_path / "b.nii", blocks(), scan)
    assert nib.load(tmp_path / "b.nii").header.get_xyzt_units()[0] == unit
    np.testing.assert_allclose(read_label_map(tmp_path / "b.nii").affine, scan.affine)


def test_warnings(save):
    def both_zero(image):
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)

    def disagree(image):
        image.set_sform(np.diag([1, 1, 1, 1.0]), code=1)
        shifted = np.eye(4)
        shifted[0, 3] = 5
        image.set_qform(shifted, code=1)

    assert "left and right are unknown" in read_scan(save("a.nii", noise(), edit=both_zero)).warnings[0]
    scan = read_scan(save("b.nii", noise(), edit=disagree))
    assert "differ by 5 mm" in scan.warnings[0] and scan.affine[0, 3] == 0
    data = noise()
    data[0, 0, :3] = [np.nan, np.inf, -np.inf]
    scan = read_scan(save("c.nii", data))
    assert "3 voxels are NaN or Inf" in scan.warnings[0] and np.isnan(scan.data[0, 0, 0])


def test_sheared_affine_is_accepted(save):
    affine = np.eye(4)
    affine[0, 1] = 0.3
    np.testing.assert_allclose(read_scan(save("a.nii", noise(), affine)).affine, affine, atol=1e-6)


def patched(path, offset: int, form: str, *values: float) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + struct.calcsize("<" + form)] = struct.pack("<" + form, *values)
    path.write_bytes(content)


def test_bad_files(save, tmp_path):
    def bad(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_scan(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)

    good = save("good.nii", noise()).read_bytes()
    bad("a.nii", b"", "empty")
    bad("b.nii", good[:500], "truncated")
    bad("c.nii.gz", gzip.compress(good)[:300], "truncated or damaged gzip")
    bad("d.nii", b"hello, this is no image" * 40, "not a NIfTI")
    bad("e.nii", good[:100], "not a NIfTI")
    bad("f.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull")
    bad("g.nii.gz", b"/annex/objects/MD5E-s1--1.nii.gz\n", "datalad get")
    with pytest.raises(InputError, match="no such file"):
        read_scan(tmp_path / "missing.nii.gz")
    with pytest.raises(InputError, match="a folder"):
        read_scan(tmp_path)
    (tmp_path / "h.nii.gz").symlink_to("../.git/annex/objects/aa/bb/KEY/KEY")
    with pytest.raises(InputError, match="datalad get .*h.nii.gz"):
        read_scan(tmp_path / "h.nii.gz")
    (tmp_path / "i.nii.gz").symlink_to("nowhere")
    with pytest.raises(InputError, match="a link to nowhere"):
        read_scan(tmp_path / "i.nii.gz")


def test_bad_voxels_and_headers(save):
    def bad(data: np.ndarray, message: str, affine: np.ndarray | None = None, edit=None) -> None:
        with pytest.raises(InputError, match=message):
            read_scan(save("x.nii", data, affine, edit))

    bad(noise((3, 3, 3)).astype(np.complex64), "colour or complex")
    bad(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour or complex")
    bad(np.full((3, 3, 3), np.nan, np.float32), "no voxel is a finite number")
    bad(np.full((3, 3, 3), 7, np.float32), "every voxel is 7")
    bad(noise((3, 4, 5, 2)), r"\(3, 4, 5, 2\), expected three axes.*--channels")
    bad(noise(), "voxels of 30 x 30 x 30 mm", np.diag([30, 30, 30, 1.0]))
    bad(noise(), "voxels of 0.01", np.diag([0.01, 1, 1, 1]))

    def form(matrix):
        def edit(image):
            for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
                image.header[name] = matrix[row]
            image.header["sform_code"] = 1

        return edit

    path = save("y.nii", noise())
    for matrix, message in (
        ([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], "voxels of"),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], "singular"),
        ([[1, 0, 0, np.nan], [0, 1, 0, 0], [0, 0, 1, 0]], "not finite"),
    ):
        patched(path, 280, "12f", *np.array(matrix, float).ravel())
        with pytest.raises(InputError, match=message):
            read_scan(path)
    path = save("z.nii", noise().astype(np.int16))
    patched(path, 112, "2f", np.nan, 0)
    with pytest.raises(InputError, match="scl_slope"):
        read_scan(path)


def test_label_maps(save):
    path = save("a_dseg.nii.gz", blocks().astype(np.float32))
    image = read_label_map(path)
    assert image.data.dtype == np.int32
    np.testing.assert_array_equal(image.data, blocks())
    with pytest.raises(InputError, match="named as a label map"):
        read_scan(path)
    with pytest.raises(InputError, match=r"a label map \(integers 0, 1, 2\) where a scan"):
        read_scan(save("a.nii", blocks()))
    large = np.kron(np.arange(27).reshape(3, 3, 3), np.ones((5, 5, 5))).astype(np.uint8)
    with pytest.raises(InputError, match="27 values.* where a scan"):
        read_scan(save("a.nii", large))
    with pytest.raises(InputError, match=r"found 0.5, 1.25"):
        read_label_map(save("b.nii", np.array([0, 1, 0.5, 1.25, 1, 2, 0, 0], np.float32).reshape(2, 2, 2)))
    with pytest.raises(InputError, match="found nan"):
        read_label_map(save("b.nii", np.array([0, 1, np.nan, 1, 1, 2, 0, 0], np.float32).reshape(2, 2, 2)))
    with pytest.raises(InputError, match="all voxels are 0"):
        read_label_map(save("b.nii", np.zeros((3, 3, 3), np.uint8)))
    with pytest.raises(InputError, match="looks like a scan"):
        read_label_map(save("b.nii", noise((9, 9, 9)).round().astype(np.int16)))
    assert read_scan(save("c.nii", noise((9, 9, 9)).round().astype(np.uint8))).shape == (9, 9, 9)


def test_masks(save):
    data = np.array([0, 0.2, 0.5, 1], np.float32).reshape(4, 1, 1)
    assert read_mask(save("p.nii", data)).data.ravel().tolist() == [False, False, True, True]
    assert read_mask(save("m.nii", data * 10)).data.ravel().tolist() == [False, True, True, True]
    assert read_mask(save("n.nii", (data > 0.3).astype(np.uint8))).data.ravel().tolist() == [
        False,
        False,
        True,
        True,
    ]
    with pytest.raises(InputError, match="the mask is empty"):
        read_mask(save("e.nii", np.zeros((3, 3, 3), np.uint8)))


def test_same_grid(save):
    a = read_scan(save("a.nii", noise()))
    b = read_scan(save("b.nii", noise(), np.diag([1, 1, 1.0005, 1])))
    c = read_scan(save("c.nii", noise(), np.diag([1, 1, 1.1, 1])))
    d = read_scan(save("d.nii", noise((6, 7, 9))))
    assert same_grid(a, b) and not same_grid(a, c) and not same_grid(a, d)
    with pytest.raises(InputError, match="6x7x9 with affine .* 6x7x8 with affine .*; do this"):
        check_same_grid([a, b, d], "do this")


def test_broken_qform(save):
    path = save("a.nii", noise(), edit=lambda image: image.set_sform(np.eye(4), code=1))
    patched(path, 252, "2h3f", 1, 1, 2.0, 2.0, 2.0)  # a quaternion longer than 1
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.affine, np.eye(4))
    assert scan.warnings == (f"{path}: the qform is invalid; the sform is used",)
    patched(path, 252, "2h", 1, 0)  # and no sform to stand in
    with pytest.raises(InputError, match="the header is damaged"):
        read_scan(path)


def test_damaged_mgz_and_lone_header(save, tmp_path):
    nib.save(nib.MGHImage(noise(), np.eye(4)), tmp_path / "a.mgh")
    content = bytearray((tmp_path / "a.mgh").read_bytes())
    (tmp_path / "b.mgz").write_bytes(gzip.compress(bytes(content[:600])))
    with pytest.raises(InputError, match="truncated"):
        read_scan(tmp_path / "b.mgz")
    content[28:30] = b"\x00\x00"  # goodRASFlag
    (tmp_path / "c.mgh").write_bytes(content)
    assert "carries no orientation" in read_scan(tmp_path / "c.mgh").warnings[0]
    nib.save(nib.Nifti1Pair(noise(), np.eye(4)), tmp_path / "d.img")
    np.testing.assert_array_equal(read_scan(tmp_path / "d.hdr").data, noise())
    (tmp_path / "d.img").unlink()
    with pytest.raises(InputError, match="d.hdr"):
        read_scan(tmp_path / "d.hdr")
    (tmp_path / "e.nii").write_bytes((tmp_path / "d.hdr").read_bytes().ljust(400, b"\0"))
    with pytest.raises(InputError, match="header half"):
        read_scan(tmp_path / "e.nii")
