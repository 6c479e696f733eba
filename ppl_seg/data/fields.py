"""What lies in the field of view: a brain without its head, a whole head, or a crop around some structure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ppl_seg.data.freesurfer import class_of_name
from ppl_seg.data.grids import SMALL_FIELD_OF_VIEW
from ppl_seg.data.images import Image
from ppl_seg.data.labels import LabelTable
from ppl_seg.errors import InputError

FIELDS = ("brain", "head", "crop")
LARGEST_BRAIN = 2.6e6  # mm³, the skull's inside in MNI space, with a margin; heads have more
SMALLEST_BRAIN = 5e5  # mm³; less is a structure of it
_MOST_OF_A_FACE = 0.1  # of a side of the box that a brain cut off by it covers; necks and slabs cover more
_OUTSIDE_THE_BRAIN = 0.1  # share of the labelled voxels outside the brain from which labels are a head's
_ENOUGH_OF_A_BRAIN = 8  # structures that FreeSurfer knows: what else the table has lies around them
_WITHIN = re.compile(r"lesion|infarct|tumou?r|hypointens|hyperintens|wmh|\b[gw]m\b|gr[ae]y|white|cortex|ventric|nucle")
_AROUND = re.compile(
    r"extra.?(cerebral|cranial)|skull|bone|skin|scalp|fat\b|muscle|\beyes?\b|\bair\b|sinus|^head$|dura|soft.?tissue"
)


def brain_labels(table: LabelTable) -> np.ndarray:
    """(M,) bool: the structures that belong to the brain, by their names.

    Of a table that draws a brain as FreeSurfer does, what FreeSurfer knows, and lesions; of another (tissues, a few
    structures, numbers) all that has no name of what lies around a brain; all labels, where nothing else is left.
    """
    known = np.array([class_of_name(name) is not None for name in table.names])
    known[0] = False
    names = [name.lower().replace("_", " ") for name in table.names]
    if known.sum() >= _ENOUGH_OF_A_BRAIN:
        return known | np.array([bool(_WITHIN.search(name)) for name in names])
    found = known | np.array([not _AROUND.search(name) for name in names])
    found[0] = False
    return found if found.any() else np.arange(len(table)) > 0


def field_of_maps(table: LabelTable, counts: np.ndarray, voxel_volumes: Sequence[float], small: bool) -> str:
    """The field of a prior's label maps.

    Args:
        counts: (n, M) voxels of each label in each map. voxel_volumes: (n,) mm³. small: a short field of view.
    """
    if small:
        return "crop"
    labelled = counts[:, 1:].sum(1)
    outside = counts[:, ~brain_labels(table)].sum(1) - counts[:, 0]
    volume = float(np.median(labelled * np.asarray(voxel_volumes)))
    if np.median(outside / np.maximum(labelled, 1)) > _OUTSIDE_THE_BRAIN or volume > LARGEST_BRAIN:
        return "head"
    return "brain" if volume > SMALLEST_BRAIN else "crop"


def field_of_scan(image: Image, observed: np.ndarray) -> str:
    """The field of a scan by what of it is observed, (X, Y, Z) bool.

    A brain: surrounded by unobserved voxels (padding, or outside a mask), of a brain's volume, and hardly cut off by
    the box. Else a head, or a crop where the box is small.
    """
    volume = observed.sum() * image.voxel_volume
    faces = [np.take(observed, end, axis).mean() for axis in range(3) for end in (0, -1)]
    if SMALLEST_BRAIN < volume < LARGEST_BRAIN and max(faces) <= _MOST_OF_A_FACE:
        return "brain"
    return "crop" if is_small(image.shape, image.spacing) else "head"


def check_view(view: str | None) -> None:
    """Raises InputError for an unknown field of view; None is to be decided."""
    if view is not None and view not in FIELDS:
        raise InputError(f"field of view {view!r}: expected {', '.join(FIELDS)}")


def is_small(shape: Sequence[int], spacing: Sequence[float]) -> bool:
    """Whether the field of view is that of a crop."""
    return bool((np.multiply(shape, spacing) < SMALL_FIELD_OF_VIEW).any())
