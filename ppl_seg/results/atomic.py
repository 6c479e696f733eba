"""Files that appear whole or not at all: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppl_seg.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` (same ending); renamed to `path` at the end, removed on failure.

    Raises:
        InputError: the folder cannot be written (permission, full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # h5netcdf's and netCDF4's errors carry no strerror
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; make room there or choose another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove(path: str | Path) -> None:
    """Remove `path` where it is there. Raises InputError where it cannot be."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot replace {path}: {error.strerror}; choose another --out") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` by way of a temporary file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
