"""FreeSurfer's structures: values, names, colours, and which of them share their intensities."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

# Structures that look alike in every contrast get one class, left and right always. The caudate, which lies along the
# ventricle, needs others to tell what it looks like: where ventricles are large, a class of its own learns fluid.
# Longest stem first, so that "inf-lat-vent" is not taken for something shorter; a name that starts with a stem
# counts too ("Hippocampus-CA1").
_CLASS_OF_STEM = {
    "cerebral-white-matter": "white-matter",
    "corpus-callosum": "white-matter",
    "wm-lh": "white-matter",
    "wm-rh": "white-matter",
    "cc": "white-matter",
    "cerebral-cortex": "grey-matter",
    "ctx": "grey-matter",
    "lateral-ventricle": "csf",
    "lateral-ventricles": "csf",
    "inf-lat-vent": "csf",
    "inferior-lateral-ventricle": "csf",
    "3rd-ventricle": "csf",
    "4th-ventricle": "csf",
    "5th-ventricle": "csf",
    "csf": "csf",
    "cerebellum-white-matter": "white-matter",
    "cerebellum-cortex": "grey-matter",
    "vermis": "grey-matter",
    "thalamus": "thalamus",
    "caudate": "grey-matter",
    "putamen": "putamen",
    "pallidum": "pallidum",
    "hippocampus": "hippocampus-amygdala",
    "amygdala": "hippocampus-amygdala",
    "accumbens": "grey-matter",
    "ventraldc": "ventral-dc",
    "ventral-dc": "ventral-dc",
    "brain-stem": "brain-stem",
    "brainstem": "brain-stem",
    "optic-chiasm": "white-matter",
    "choroid-plexus": "choroid-plexus",
    "vessel": "vessel",
    "wm-hypointensities": "wm-hypointensities",
    "non-wm-hypointensities": "non-wm-hypointensities",
}
# Parcels of the cortex and of the white matter below it (aparc+aseg, aparc.DKTatlas+aseg, aparc.a2009s+aseg,
# wmparc): ranges of values, and the value of aseg for what they are parts of.
_PARCELS = (
    (range(1000, 2000), 3),
    (range(2000, 3000), 42),
    (range(3000, 4000), 2),
    (range(4000, 5000), 41),
    (range(5001, 5002), 2),
    (range(5002, 5003), 41),
    (range(11100, 11200), 3),
    (range(12100, 12200), 42),
    (range(13100, 13200), 2),
    (range(14100, 14200), 41),
)
_STEMS = sorted(_CLASS_OF_STEM, key=len, reverse=True)
_SIDES = ("left-", "right-")


def class_of_name(name: str) -> str | None:
    """The built-in intensity class of a structure by its name, any case; None where the name is foreign."""
    plain = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    for side in _SIDES:
        plain = plain.removeprefix(side)
    for stem in _STEMS:
        if plain == stem or plain.startswith(stem + "-"):
            return _CLASS_OF_STEM[stem]
    return None


def whole_of_parcel(value: int) -> int | None:
    """aseg's value for the structure that a parcel of aparc+aseg or wmparc is part of; None for other values."""
    return next((whole for parcels, whole in _PARCELS if value in parcels), None)


@cache
def structures() -> dict[int, tuple[str, tuple[int, int, int]]]:
    """Name and colour of the values of `aseg`, from FreeSurfer's colour table."""
    text = files(__package__).joinpath("freesurfer.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {int(i): (name, (int(r), int(g), int(b))) for i, name, r, g, b, _ in rows}


@cache
def colors_by_name() -> dict[str, tuple[int, int, int]]:
    """Colour of a structure by its name in lower case."""
    return {name.lower(): color for name, color in structures().values()}
