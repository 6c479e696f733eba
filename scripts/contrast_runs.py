"""What both sets of `benchmark_contrasts.py` share: options, priors from head_labels, runs of `segment`, Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppl_seg import learn_prior
from ppl_seg.api import Model, segment_scans
from ppl_seg.data.cohort import Found, find_scans
from ppl_seg.data.names import output_location
from ppl_seg.data.tables import read_groups, read_value_map

Structures = dict[str, tuple[int, ...]]  # name -> label values


@dataclass(frozen=True)
class Options:
    """data: holds head_labels, oasis, openms. out: of all results. draws, recipes: of `segment`.

    contrasts: of the simulated heads. spacing, prior_steps, label_steps: of `prior`, mm and steps (None: the default).
    """

    data: Path
    out: Path
    draws: int
    recipes: tuple[str, ...]
    contrasts: tuple[str, ...]
    spacing: float
    prior_steps: int | None
    label_steps: int

    @property
    def maps(self) -> Path:
        """The folder of the label maps that teach."""
        return self.data / "head_labels"

    def prior(self, name: str, mapped: bool) -> Model:
        """Learned, or read where it is there. mapped: by map.tsv, which leaves brains of heads."""
        return learn_prior(
            [self.maps / "prior"],
            out=self.out / name,
            labels=self.maps / "labels.tsv",
            value_map=self.maps / "map.tsv" if mapped else None,
            spacing=self.spacing,
            steps=self.prior_steps,
            label_steps=self.label_steps,
            precision="bf16" if self.label_steps else "32",
            resume=True,
        )

    def structures(self) -> Structures:
        """The scored structures, with the label maps' own values and those that map.tsv gives them."""
        mapping = read_value_map(self.maps / "map.tsv")
        groups = read_groups(self.data / "oasis" / "groups.tsv")
        return {
            name: (*values, *(value for value, to in mapping.items() if to in values and value not in values))
            for name, values in groups.items()
        }

    def segment(self, model: Model, scans: Path, folder: str, recipe: str, **options: Any) -> dict[Found, Path]:
        """Scan -> where its label map lies; a scan that failed has none. What is done is not done again.

        Args:
            scans: a folder. options: suffix and channels of `segment_scans`.
        """
        out = self.out / folder
        draws = 1 if recipe.startswith("location") else self.draws  # without a shape all draws say the same
        report = segment_scans([scans], model=model, out=out, recipe=recipe, draws=draws, progress=True, **options)
        for row in report.rows:
            print(f"{folder}: {Path(row['scan']).name} {row['status']}, {row['seconds']:.0f} s {row['message']}")
        channels = options.get("channels", ())
        found: dict[Found, Path] = {}
        for file in find_scans([scans], options.get("suffix"), channels):
            below, stem = output_location(file.path, scans, channels)
            found[file] = out / below / f"{stem}_dseg.nii.gz"
        return found


def dice_of(found: np.ndarray, truth: np.ndarray, structures: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Dice of each structure; NaN where it is in neither."""
    dice = {}
    for name, values in structures.items():
        one, other = np.isin(found, values), np.isin(truth, values)
        total = int(one.sum()) + int(other.sum())
        dice[name] = 2 * int((one & other).sum()) / total if total else float("nan")
    return dice
