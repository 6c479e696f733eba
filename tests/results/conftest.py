"""A small scan with its segmentation, made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ppl_seg.data.images import read_scan
from ppl_seg.data.labels import LabelTable, make_entry
from ppl_seg.results.segmentation import Segmentation

SPACING = (2.0, 1.0, 1.5)


@pytest.fixture
def make_segmentation(tmp_path: Path) -> Callable[..., Segmentation]:
    """Maker of a Segmentation: label 17 fills [2:5, 2:6, 2:4] (24 voxels of 3 mm³), label 53 one corner."""

    def make(
        shape: tuple[int, int, int] = (10, 12, 6),
        name: str = "sub-01_T1w.nii.gz",
        draws: int = 5,
        channels: int = 1,
        names: tuple[str, str] = ("Left-Hippocampus", "Right-Hippocampus"),
        **changes: Any,
    ) -> Segmentation:
        random = np.random.default_rng(0)
        affine = np.array([[-2.0, 0, 0, 4], [0, 1.0, 0, -7], [0, 0, 1.5, 0], [0, 0, 0, 1]])
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        scan = nib.Nifti1Image(random.normal(100, 20, shape).astype(np.float32), affine)
        scan.header["descrip"] = b"a name"
        nib.save(scan, path)
        image = read_scan(path)
        table = LabelTable((make_entry(0, "Background"), make_entry(17, names[0]), make_entry(53, names[1])))
        label_map = np.zeros(shape, np.int32)
        label_map[2:5, 2:6, 2:4] = 17
        label_map[-1, -1, -1] = 53
        positions = table.to_positions(label_map)
        marginals = 0.1 + 0.7 * np.moveaxis(np.eye(3)[positions], -1, 0)
        entropy = -(marginals * np.log(marginals)).sum(0).astype(np.float32)
        values: dict[str, Any] = {
            "image": image,
            "table": table,
            "label_map": label_map,
            "entropy": entropy,
            "probabilities": marginals.astype(np.float32),
            "draws": np.repeat(label_map[None], draws, 0),
            "volume_draws": np.linspace(0, 1, draws)[:, None] * np.array([1000.0, 100.0, 10.0]),
            "touches_border": np.array([True, False, True]),
            "z_draws": random.normal(size=(draws, 4)),
            "observed_scan": random.normal(size=(channels, 5, 6, 3)).astype(np.float32),
            "observed": np.ones((1, 5, 6, 3), bool),
            "sample_stats": {"log_weight": random.normal(size=draws)},
            "bound": {"bound": -1.5, "kl": 0.5},
            "provenance": {
                "sources": [path],
                "model_hash": "abc",
                "version": "0.1.0",
                "seed": 3,
                "options": {"draws": draws, "channels": ("T1w",)},
                "seconds": {"read": 0.5, "infer": 1.0},
                "quality": {names[0]: 0.8},
            },
        }
        return Segmentation(**{**values, **changes})

    return make
