"""The segmentation of one scan: what inference hands to tables, figures and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ppl_seg.data.alignment import Alignment
    from ppl_seg.data.images import Image
    from ppl_seg.data.labels import LabelTable


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label map in the scan's own voxels (X, Y, Z), its uncertainty and where it comes from.

    M labels of `table` (position 0 = background), S draws, D latent dimensions, C channels.

    Attributes:
        image: the scan (its first channel).
        table: the label table of the model.
        label_map: (X, Y, Z) integers, values of the table.
        entropy: (X, Y, Z) float32, entropy of the label marginals in nats.
        probabilities: (M, X, Y, Z) label marginals, or None where they were not kept.
        draws: (S, X, Y, Z) whole segmentations, values of the table, or None where they were not kept.
        volume_draws: (S, M) mm³, volumes of the draws.
        touches_border: (M,) bool, the label map's structure reaches the border of the field of view.
        z_draws: (S, D) latent shapes.
        observed_scan: (C, *grid) normalised scan on the prior's grid, what inference saw.
        observed: (1 or C, *grid) bool, where the scan has information.
        alignment: where the prior's grid lies in the scan, and how well, or None where nothing was aligned.
        sample_stats: name -> (S,) numbers of the draws.
        bound: name -> number, the bound and its terms.
        provenance: sources, model_hash, version, seed, options, seconds; optionally scan (a name for the
            tables) and quality (structure name -> number).

    Raises:
        ValueError: shapes that do not fit together.
    """

    image: Image
    table: LabelTable
    label_map: np.ndarray
    entropy: np.ndarray
    probabilities: np.ndarray | None
    draws: np.ndarray | None
    volume_draws: np.ndarray
    touches_border: np.ndarray
    z_draws: np.ndarray
    observed_scan: np.ndarray
    observed: np.ndarray
    alignment: Alignment | None = None
    sample_stats: dict[str, np.ndarray] = field(default_factory=dict)
    bound: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays whose shapes do not fit together."""
        labels, shape, draws = len(self.table), tuple(self.image.data.shape), len(self.z_draws)
        expected = {
            "label_map": shape,
            "entropy": shape,
            "volume_draws": (draws, labels),
            "touches_border": (labels,),
        }
        if self.probabilities is not None:
            expected["probabilities"] = (labels, *shape)
        if self.draws is not None:
            expected["draws"] = (draws, *shape)
        for name, wanted in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != wanted:
                raise ValueError(f"{name}: expected shape {wanted}, found {found}")

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """One row a structure: scan, structure, volume_mm3, quantiles of the draws, flags."""
        from ppl_seg.results.volumes import volume_rows

        return volume_rows(self)

    def to_arviz(self) -> Any:
        """Posterior, observed data and sample statistics: arviz.InferenceData, or DataTree from ArviZ 1.0."""
        from ppl_seg.results.inference_data import to_arviz

        return to_arviz(self)
