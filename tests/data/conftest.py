"""Small files to read: a noise scan, a label map of a few blocks, and a writer of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


def noise(shape: tuple[int, ...] = (6, 7, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def blocks(shape: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[1:5, 1:4, 1:7] = 1
    labels[1:5, 4:6, 1:7] = 2
    return labels


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(name, data, affine, header=None) writes a NIfTI file below the test's folder."""

    def write(name: str, data: np.ndarray, affine: np.ndarray | None = None, edit=None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
        if edit is not None:
            edit(image)
        nib.save(image, path)
        return path

    return write
