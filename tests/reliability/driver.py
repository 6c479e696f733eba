"""Runs `ppl-seg` commands in forked children, which die where they are told to: python driver.py < requests.

A request is a line of JSON: `arguments` of the command and optionally `kill_at` (SIGKILL before the n-th operation on
files), `kill_after` (seconds), `file_size` (bytes that a file may have: a full disk), `plain` (root may do no more than
others), `together` (another request that runs at the same time). The answer is a line of JSON: for each child its exit
code (negative: the signal), stderr, the number of operations, seconds. With `here` nothing is forked: what the commands
import is then there for all children. Pictures of segmentations are empty: they would take most of the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
from typing import Any

from matplotlib.figure import Figure

import ppl_seg.api.fit as fit
from ppl_seg.cli import main
from ppl_seg.results import alignment_figure, figures

OPERATIONS = ("replace", "unlink", "mkdir", "rmdir", "fsync", "rename", "remove")


def obey_permissions() -> None:
    """Root without CAP_DAC_OVERRIDE: may write what the owner may (Linux)."""
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    effective, *others = struct.unpack("6I", data.raw)
    if libc.capset(header, struct.pack("6I", effective & ~0b110, *others)):
        raise OSError(ctypes.get_errno(), "capset")


def child(request: dict[str, Any], report: int) -> None:
    """Never returns."""
    count = 0

    def counted(operation: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == request.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **options)

    for name in OPERATIONS:
        setattr(os, name, functools.partial(counted, getattr(os, name)))
    if "kill_after" in request:
        timer = threading.Timer(request["kill_after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if "plain" in request:
        obey_permissions()
    sys.argv[:] = ["ppl-seg", *request["arguments"]]
    code = 1
    try:
        main(request["arguments"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.write(report, str(count).encode())
        sys.stderr.flush()
        os._exit(code)


def start(request: dict[str, Any]) -> tuple[int, int, Any, float]:
    errors = tempfile.TemporaryFile()
    read, write = os.pipe()
    began = time.monotonic()
    if (pid := os.fork()) == 0:
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        child(request, write)
    os.close(write)
    return pid, read, errors, began


def end(pid: int, read: int, errors: Any, began: float) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - began
    with os.fdopen(read) as stream:
        count = int(stream.read() or 0)
    errors.seek(0)
    return {"code": code, "stderr": errors.read().decode(), "operations": count, "seconds": seconds}


if __name__ == "__main__":
    empty = Figure(figsize=(1, 1))
    figures.qc_figure = alignment_figure.alignment_figure = lambda _, path: figures.save_figure(empty, path)
    fit.TrainingOptions = functools.partial(fit.TrainingOptions, checkpoint_every=2)  # type: ignore[misc, assignment]
    for line in sys.stdin:
        request = json.loads(line)
        if "here" in request:
            with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
                main(request["arguments"])
            print("[]", flush=True)
            continue
        running = [start(request), *([start(request["together"])] if "together" in request else [])]
        print(json.dumps([end(*one) for one in running]), flush=True)
