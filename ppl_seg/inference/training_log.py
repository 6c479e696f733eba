"""training.csv and its rows in memory: one row a step, cut back to the checkpoint on resume."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ppl_seg.files import cannot_write, make_folder, write_bytes

CSV = "training.csv"
_FIRST, _LAST = ("step", "bound_per_voxel"), ("held_out", "learning_rate", "seconds")


@dataclass
class TrainingLog:
    """What happened in a training.

    `rows`: one dict a step with step, bound_per_voxel, the objective's named terms (per voxel, at the steps
    where they were computed), held_out (per voxel, at evaluations), learning_rate, seconds since the start
    (time before a resume counts). `best_step`: the step whose weights the model has, None without held-out
    evaluations.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_held_out: float | None = None
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """The number of steps that were taken."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a column, at the steps that have a value."""
        have = [row for row in self.rows if name in row]
        return [int(row["step"]) for row in have], [row[name] for row in have]

    def last_terms(self) -> dict[str, float]:
        """The last row's bound and the named terms of the last row that has some."""
        skip = {"step", *_LAST}
        found: dict[str, float] = {}
        for row in reversed(self.rows[-100:]):
            for name, value in row.items():
                if name not in skip:
                    found.setdefault(name, value)
        return found


class LogWriter:
    """Appends rows to a TrainingLog and, where there is one, to a directory's training.csv, row by row."""

    def __init__(self, log: TrainingLog, directory: str | os.PathLike[str] | None, resume_at: int) -> None:
        """`resume_at` is the step of the checkpoint: later rows of the file are dropped; 0 starts anew."""
        self.log = log
        self._columns: list[str] = []
        self._stream: TextIO | None = None
        self._path = None if directory is None else Path(directory) / CSV
        if self._path is None:
            return
        make_folder(self._path.parent)
        if resume_at and self._path.is_file():
            self._cut_back(self._path, resume_at)
        else:
            self._path.unlink(missing_ok=True)

    def write(self, row: dict[str, float]) -> None:
        """Append `row`; a term that no row had before gets a column, and the file is written anew."""
        self.log.rows.append(row)
        if self._path is None:
            return
        try:
            self._append(row)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _append(self, row: dict[str, float]) -> None:
        assert self._path is not None
        if row.keys() - set(self._columns):
            terms = [name for name in dict.fromkeys([*self._columns, *row]) if name not in (*_FIRST, *_LAST)]
            self._columns = [*_FIRST, *terms, *_LAST]
            self.close()
            self._write_all()
            return
        if self._stream is None:
            self._stream = self._path.open("a", encoding="utf-8", newline="")
        self._stream.write(_line([_text(row.get(name)) for name in self._columns]))
        self._stream.flush()

    def _write_all(self) -> None:
        assert self._path is not None
        lines = [_line(self._columns)]
        lines += [_line([_text(row.get(name)) for name in self._columns]) for row in self.log.rows]
        write_bytes(self._path, "".join(lines).encode())

    def close(self) -> None:
        """Close training.csv."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _cut_back(self, path: Path, step: int) -> None:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            self._columns = list(reader.fieldnames or [])
            for values in reader:
                last = self.log.rows[-1]["step"] if self.log.rows else 0
                # what follows, perhaps half a line, is after the checkpoint
                if not values.get(_LAST[-1]) or not last < int(values["step"]) <= step:
                    break
                self.log.rows.append({name: float(value) for name, value in values.items() if value})
        for row in self.log.rows:
            row["step"] = int(row["step"])
        self._write_all()


def _text(value: float | None) -> str:
    return "" if value is None else repr(value)


def _line(values: list[Any]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(values)
    return stream.getvalue()
