"""Files that appear whole or not at all: written to a temporary name beside the target, then renamed. Checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppl_seg.errors import InputError

TEMPORARY = ".tmp-"  # how temporary names begin; what a killed process left is found by it


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` (same ending); renamed to `path` at the end, removed on failure.

    The content is on the disk before the file gets its name. In an ExitStack files get their names in reverse
    order, and only when all are complete.

    Raises:
        InputError: the folder cannot be written (permission, full disk).
    """
    path = Path(path)
    # not the process's number: two containers that share a folder may have the same
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` by way of a temporary file."""
    write_bytes(path, text.encode())


def remove(path: str | Path) -> None:
    """Remove `path` where it is there. Raises InputError where it cannot be."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files that killed processes left in `folder`."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        if path.is_file():
            remove(path)


def make_folder(folder: str | Path) -> None:
    """Make `folder` and its parents where they are missing; InputError where that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """What the user is told of a file that cannot be written."""
    reason = error.strerror or str(error)  # h5netcdf's and netCDF4's errors carry no strerror
    return InputError(f"cannot write {path}: {reason}; make room there or choose another --out")


def is_full(error: InputError) -> bool:
    """Whether `error` says that there is no room left: whatever is written next fails too."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
