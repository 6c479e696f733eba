"""The process that reads damaged files: what is wrong with it shows in its exit code, output and memory."""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import json
import logging
import random
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np

from ppl_seg.data.images import Image, read_label_map, read_mask, read_scan
from ppl_seg.data.nifti import MOST_VOXELS
from ppl_seg.errors import InputError
from tests.fuzz.mutations import bombs, mutate

SLOW = 10.0  # seconds for one file


@cache
def seeds() -> list[tuple[str, str, bytes]]:
    """(name, kind, content) of images that are right."""
    source = np.random.default_rng(0)
    scan = source.normal(100, 20, (9, 10, 11)).astype(np.float32)
    labels = np.zeros((9, 10, 11), np.uint8)
    labels[2:7, 2:5, 2:9], labels[2:7, 5:8, 2:9] = 1, 2
    affine = np.array([[-1.0, 0.1, 0, 20], [0.1, 1.2, 0, -30], [0, 0, 2, 5], [0, 0, 0, 1]])
    affine[:3, 1] = np.cross([0, 0, 1.2], [-1.0, 0.1, 0]) / np.hypot(1, 0.1)

    def written(kind: type, data: np.ndarray, slope: float | None = None) -> bytes:
        image = kind(data, affine)
        if slope is not None:
            image.header.set_slope_inter(slope, -3)
        return bytes(image.to_bytes())

    found = [
        ("a.nii", "nii", written(nib.Nifti1Image, scan)),
        ("b.nii", "nii", written(nib.Nifti1Image, (scan * 30).astype(np.int16), 0.5)),
        ("c_dseg.nii", "nii", written(nib.Nifti1Image, labels)),
        ("d.nii", "nii2", written(nib.Nifti2Image, scan.astype(np.float64))),
        ("e.mgh", "mgh", written(nib.MGHImage, scan)),
        ("f_dseg.mgh", "mgh", written(nib.MGHImage, labels.astype(np.int32))),
    ]
    packed = [(f"{name}.gz", kind, gzip.compress(content, mtime=0)) for name, kind, content in found]
    return found + packed


def case(number: int) -> tuple[str, bytes]:
    """(name, content) of a damaged file; the first numbers are the bombs."""
    if number < len(bombs()):
        return f"bomb{number}.nii.gz", bombs()[number][1]
    source = random.Random(number)
    name, kind, content = source.choice(seeds())
    return f"{number}{name}", mutate(content, kind, source)


def read_image(path: Path) -> str:
    """Read with the reader for the name; what was read is compared with nibabel's. Returns what came of it."""
    readers: tuple[Callable[..., Image], ...] = (read_label_map,) if "dseg" in path.name else (read_scan, read_mask)
    outcome = "refused"
    for reader in readers:
        try:
            image = reader(path)
        except InputError as error:
            message = str(error)
            assert message.startswith(str(path)) and "\n" not in message and len(message) < 1000, message
            continue
        assert image.data.size <= MOST_VOXELS and np.isfinite(image.affine).all()
        if reader is not read_mask:
            compare(path, image)
        outcome = "read"
    return outcome


def compare(path: Path, image: Image) -> None:
    """The voxels and the affine are those that nibabel reads from the same bytes."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    number = content[:4]
    kind = nib.MGHImage if number == b"\0\0\0\1" else nib.Nifti1Image if b"\x5c" in number else nib.Nifti2Image
    if kind is nib.Nifti1Image:
        content = (
            content[:348] + bytes(4) + content[352:]
        )  # nibabel refuses damaged header extensions; nobody reads them
    theirs = kind.from_bytes(content)
    with np.errstate(all="ignore"):
        expected = np.asarray(theirs.dataobj, dtype=np.float64).reshape(image.shape, order="F")
        if image.data.dtype == np.int32:
            np.testing.assert_array_equal(image.data, np.round(expected))
        else:
            np.testing.assert_allclose(image.data, expected.astype(np.float32), rtol=1e-5, equal_nan=True)
    unit = {1: 1e3, 3: 1e-3}.get(int(theirs.header["xyzt_units"]) & 7, 1.0) if kind is not nib.MGHImage else 1.0
    np.testing.assert_allclose(image.affine[:3], theirs.affine[:3] * unit, rtol=1e-4, atol=1e-4)


def read_model(path: Path) -> str:
    """Load a model directory; what was loaded has to be whole."""
    from ppl_seg.api import load_model

    try:
        model = load_model(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(str(path)) and "\n" not in message and len(message) < 3000, message
        return "refused"
    assert model.hash and len(model.table) == model.shape_prior.num_labels
    return "read"


def main() -> int:
    """Read the cases with the given numbers; every strange one is told on stderr. Memory and counts on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("images", "models"))
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "models":
        from tests.fuzz.models import damaged_model

        assert (
            read_model(args.folder / "model") == "read"
        )  # what it imports costs seconds, now and not the first case's

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # the comparison's
    counts: Counter[str] = Counter()
    strange = 0
    for number in range(args.first, args.last):
        faulthandler.dump_traceback_later(SLOW, exit=True)
        if args.what == "models":
            path, read = damaged_model(args.folder, number), read_model
        else:
            name, content = case(number)
            path, read = args.folder / name, read_image
            path.write_bytes(content)
        try:
            counts[read(path)] += 1
        except BaseException:
            strange += 1
            print(f"case {number}, {path.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if args.what == "images":
            path.unlink()
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, **counts}))
    return int(strange > 0)


if __name__ == "__main__":
    raise SystemExit(main())
