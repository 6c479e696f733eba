"""The bytes of a file, front to back: decompressed where they are gzip, never more in memory than asked for.

Also the files that are none: links and pointers to content that is kept elsewhere (git-annex, Git LFS).
"""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ppl_seg.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
GZIP_RATIO = 1032  # deflate makes at most so many bytes of one
LONGEST_TAIL = 2**26  # bytes after the voxels, read for the checksum of gzip; more is no image
_PIECE = 2**20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ANNEX_POINTER = b"/annex/objects/"


class Content:
    """An open file. `limit` is the most bytes it can hold: its size, or what gzip could make of that."""

    def __init__(self, stream: BinaryIO, path: Path, size: int, compressed: bool) -> None:
        self._stream, self._path, self._compressed = stream, path, compressed
        self.limit = size * GZIP_RATIO if compressed else size

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end. InputError where gzip is damaged or the disk fails."""
        try:
            return self._stream.read(count)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self._path}: truncated or damaged gzip file ({error}); copy it again") from error
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror or error})") from error

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        while count > 0 and (piece := self.take(min(count, _PIECE))):
            count -= len(piece)

    def finish(self) -> None:
        """Read to the end, so that gzip compares its checksum. InputError for a very long tail."""
        if not self._compressed:
            return
        tail = 0
        while piece := self.take(_PIECE):
            tail += len(piece)
            if tail > LONGEST_TAIL:
                raise InputError(f"{self._path}: goes on long after its voxels, the header is damaged; copy it again")


@contextmanager
def opened(path: Path) -> Iterator[Content]:
    """Open an image file. InputError where it is missing, empty, a pointer or cannot be read."""
    check_present(path)
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    with raw:
        size = os.fstat(raw.fileno()).st_size
        start = raw.read(len(_LFS_POINTER))
        raw.seek(0)
        if not start:
            raise InputError(f"{path}: the file is empty (0 bytes); copy it again")
        if start == _LFS_POINTER:
            raise InputError(f"{path}: its content is not here (Git LFS pointer); get it with `git lfs pull`")
        if start.startswith(_ANNEX_POINTER):
            raise _annexed(path)
        compressed = start.startswith(GZIP_MAGIC)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
        yield Content(stream, path, size, compressed)


def check_present(path: Path) -> None:
    """Raises InputError where `path` is no file, or a link to content that is not on this disk."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            missing = isinstance(error, FileNotFoundError)
            raise InputError(f"{path}: {'no such file' if missing else error.strerror}") from error
        if is_annexed(path):
            raise _annexed(path) from error
        raise InputError(f"{path}: a link to {os.readlink(path)}, which does not exist") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a device or pipe; expected a file")


def is_annexed(path: Path) -> bool:
    """Whether `path` is a link into a git-annex: several of them may share one content."""
    return path.is_symlink() and ".git/annex/objects" in os.readlink(path)


def _annexed(path: Path) -> InputError:
    return InputError(f"{path}: its content is not here (git-annex); get it with `datalad get {path}`")
