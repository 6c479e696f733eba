"""Several processes may write into one folder of results: locks, and a scan's files that appear together.

The locks are the kernel's (flock): they end with their process, however it dies. Where a file system has none,
processes go on without.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ppl_seg.files import TEMPORARY, cannot_write, make_folder, remove_temporaries

LOG = "log.txt"  # never replaced, only appended to: what the lock of a folder of results is held on
_GUARD = "lock"


@contextmanager
def locked(out_dir: str | Path) -> Iterator[None]:
    """While nobody else is here: for what belongs to the folder as a whole. Not to be nested.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(out_dir) / LOG
    make_folder(out_dir)
    try:
        stream = path.open("a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
    with stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def staging(out_dir: str | Path, folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder` for one scan's files until all are complete; removed at the end."""
    make_folder(folder)
    with locked(out_dir):  # so that `remove_stale` never sees it without its guard
        try:
            stage = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
            guard = (stage / _GUARD).open("w")
        except OSError as error:
            raise cannot_write(folder, error) from error
        _try_lock(guard)
    try:
        with guard:
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_stale(out_dir: str | Path, folders: Iterable[Path]) -> None:
    """Remove what killed processes left in the root and in `folders`; what a living one writes stays."""
    with locked(out_dir):
        for folder in {Path(out_dir), *folders}:
            remove_temporaries(folder)  # single files are written under the lock alone
            for guard_path in folder.glob(f"{TEMPORARY}*/{_GUARD}"):
                with guard_path.open() as guard:
                    if _try_lock(guard):
                        shutil.rmtree(guard_path.parent, ignore_errors=True)


def _try_lock(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
