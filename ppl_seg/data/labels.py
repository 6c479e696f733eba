"""The label table: which values a label map may hold, their names, colours and intensity classes."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ppl_seg.data.freesurfer import class_of_name, colors_by_name
from ppl_seg.errors import InputError

BACKGROUND_CLASS = "background"
FLUID = "csf"  # the class of cerebrospinal fluid, and FreeSurfer's name of what of it surrounds the brain
Color = tuple[int, int, int]
_OTHER = {"left": "right", "right": "left", "lh": "rh", "rh": "lh", "l": "r", "r": "l"}
_LEFT = ("left", "lh", "l")
_SIDE = re.compile(r"left|right|(?<![a-z])(?:lh|rh|l|r)(?![a-z])", re.IGNORECASE)
_SEPARATORS = "-_. "
# Twenty colours that are easy to tell apart, for structures that FreeSurfer does not know.
PALETTE: tuple[Color, ...] = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255),
    (170, 110, 40), (255, 250, 200), (128, 0, 0), (170, 255, 195), (128, 128, 0), (255, 215, 180),
    (0, 0, 128), (128, 128, 128),
)  # fmt: skip


@dataclass(frozen=True)
class LabelEntry:
    """A structure: its value in label maps, its name, the class it shares intensities with, its colour."""

    index: int
    name: str
    intensity_class: str
    color: Color


def make_entry(index: int, name: str, intensity_class: str = "", color: Color | None = None) -> LabelEntry:
    """An entry with what is missing filled in: FreeSurfer's class and colour for the name, else its own."""
    if index == 0:
        return LabelEntry(0, name, BACKGROUND_CLASS, color or (0, 0, 0))
    own = colors_by_name().get(name.lower(), PALETTE[(index - 1) % len(PALETTE)])
    return LabelEntry(index, name, intensity_class or class_of_name(name) or name, color or own)


@dataclass(frozen=True)
class LabelTable:
    """The M labels of a model; position 0 is the background, value 0 (added where the entries lack it)."""

    entries: tuple[LabelEntry, ...]

    def __post_init__(self) -> None:
        others = tuple(entry for entry in self.entries if entry.index != 0)
        background = [e for e in self.entries if e.index == 0] or [make_entry(0, "Background")]
        if len({entry.index for entry in others}) != len(others) or len(background) > 1:
            raise ValueError("a label table with two entries of one index")
        object.__setattr__(self, "entries", (background[0], *others))

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def indices(self) -> np.ndarray:
        """(M,) int64: the values in label maps."""
        return np.array([entry.index for entry in self.entries], dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """(M,)."""
        return tuple(entry.name for entry in self.entries)

    @property
    def fluid(self) -> int | None:
        """The class of cerebrospinal fluid, where there is one."""
        return self.class_names.index(FLUID) if FLUID in self.class_names else None

    @property
    def outer_fluid(self) -> tuple[int, ...]:
        """Positions of the fluid around the brain, which a brain mask leaves out in part."""
        return tuple(n for n, name in enumerate(self.names) if name.lower() == FLUID)

    @property
    def colors(self) -> tuple[Color, ...]:
        """(M,) red, green, blue, 0 to 255."""
        return tuple(entry.color for entry in self.entries)

    @property
    def class_names(self) -> tuple[str, ...]:
        """(N,) in order of first use, so the background's is 0."""
        return tuple(dict.fromkeys(entry.intensity_class for entry in self.entries))

    @property
    def class_of_label(self) -> tuple[int, ...]:
        """(M,) the class of each label, as a position in `class_names`."""
        position = {name: n for n, name in enumerate(self.class_names)}
        return tuple(position[entry.intensity_class] for entry in self.entries)

    def to_positions(self, data: np.ndarray, source: str | os.PathLike[str] = "the label map") -> np.ndarray:
        """Label values to positions 0..M-1 (int64, same shape). Raises InputError listing foreign values."""
        values, inverse = np.unique(data, return_inverse=True)
        position = {int(index): m for m, index in enumerate(self.indices)}
        foreign = [int(value) for value in values if int(value) not in position]
        if foreign:
            raise InputError(
                f"{source}: values {_listed(foreign)} are not in the label table "
                f"({_listed(self.indices.tolist())}); add them with --labels, or bring them to known ones "
                "(0 drops) with --map"
            )
        positions = np.array([position[int(value)] for value in values], dtype=np.int64)
        return positions[inverse].reshape(data.shape)

    def from_positions(self, positions: np.ndarray) -> np.ndarray:
        """Positions 0..M-1 to label values (same shape, the smallest integers that hold the table)."""
        return self.indices.astype(np.result_type(*map(np.min_scalar_type, self.indices)))[positions]

    def restricted_to(self, values: Sequence[int]) -> LabelTable:
        """The entries whose values occur, and the background."""
        wanted = set(values)
        return LabelTable(tuple(entry for entry in self.entries if entry.index in wanted or entry.index == 0))

    def check_names(self, source: object) -> LabelTable:
        """The table itself. Raises InputError where two labels have one name: results are told apart by it."""
        values: dict[str, int] = {}
        for entry in self.entries:
            if entry.name in values:
                raise InputError(
                    f"{source}: {entry.name} is the name of {values[entry.name]} and of {entry.index}; rename one, or "
                    "join them with --map"
                )
            values[entry.name] = entry.index
        return self

    def to_dict(self) -> list[dict[str, Any]]:
        """For JSON: one object per label."""
        return [
            {"index": e.index, "name": e.name, "class": e.intensity_class, "color": _hex(e.color)} for e in self.entries
        ]

    @classmethod
    def from_dict(cls, rows: Sequence[dict[str, Any]]) -> LabelTable:
        """The inverse of `to_dict`."""
        return cls(tuple(LabelEntry(int(r["index"]), r["name"], r["class"], parse_color(r["color"])) for r in rows))

    def to_tsv(self) -> str:
        """The BIDS label table (index, name, color) as text."""
        text = io.StringIO()
        text.write("index\tname\tcolor\n")
        for entry in self.entries:
            text.write(f"{entry.index}\t{entry.name}\t{_hex(entry.color)}\n")
        return text.getvalue()


def other_sides(table: LabelTable) -> list[int]:
    """(M,) the position of each label's namesake on the other side (left and right, lh and rh, l and r), or its own."""
    names = [name.lower() for name in table.names]
    swapped = [_SIDE.sub(lambda side: _OTHER[side[0].lower()], name) for name in names]
    return [names.index(other) if other in names else i for i, other in enumerate(swapped)]


def merge_sides(table: LabelTable) -> tuple[LabelTable, dict[int, int]]:
    """Joins pairs of sides (`other_sides`) under the left value: (joined table, {right value: left value}).

    A structure whose other side is not in the table keeps its value and name.
    """
    joined, mapping = {}, {}
    for left, right in enumerate(other_sides(table)):
        one, other = table.entries[left], table.entries[right]
        if left != right and _SIDE.search(one.name)[0].lower() in _LEFT:  # type: ignore[index]
            mapping[other.index] = one.index
            # a class named after one side alone (labels of an own class each) is named after both now
            own = one.intensity_class.lower() == one.name.lower()
            name = _without_side(one.name)
            joined[one.index] = replace(one, name=name, intensity_class=name if own else one.intensity_class)
    entries = tuple(joined.get(entry.index, entry) for entry in table.entries if entry.index not in mapping)
    return LabelTable(entries), dict(sorted(mapping.items()))


def apply_map(data: np.ndarray, mapping: dict[int, int]) -> np.ndarray:
    """`data` with the values that are keys of `mapping` replaced (0 drops them), all at once; same dtype."""
    values, inverse = np.unique(data, return_inverse=True)
    mapped = np.array([mapping.get(int(value), int(value)) for value in values], dtype=data.dtype)
    return mapped[inverse].reshape(data.shape)


def composed(first: Mapping[int, int], then: Mapping[int, int]) -> dict[int, int]:
    """The map that has the effect of `first`, then `then`."""
    return {value: then.get(to, to) for value, to in first.items()} | {
        value: to for value, to in then.items() if value not in first
    }


def parse_color(text: str) -> Color:
    """`#rrggbb` to (r, g, b). Raises ValueError for anything else."""
    if len(text) != 7 or not text.startswith("#"):
        raise ValueError(f"expected a colour as #rrggbb, found {text!r}")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _without_side(name: str) -> str:
    before, after = (part.strip(_SEPARATORS) for part in _SIDE.split(name, maxsplit=1))
    between = name[len(before) : len(before) + 1]  # what stood there, of two parts
    return f"{before}{between}{after}" if before and after else before or after


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _listed(values: Sequence[int], most: int = 12) -> str:
    text = ", ".join(map(str, values[:most]))
    return text + (f", ... ({len(values)} in all)" if len(values) > most else "")
