"""What a result came from besides its inputs: the command, the machine, the seconds of each stage."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ppl_seg import __version__


class Stopwatch:
    """Seconds of named stages, one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """The time since the last lap was `stage`'s."""
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def command_line() -> str:
    """The command as it was typed, or `Python API` where it was none of ours."""
    program = Path(sys.argv[0])
    if program.name == "ppl-seg" or program.parts[-2:] == ("ppl_seg", "__main__.py"):
        return shlex.join(["ppl-seg", *sys.argv[1:]])
    return "Python API"


def run_record(device: str) -> dict[str, Any]:
    """Version, command and machine, for a report."""
    return {"version": __version__, "command": command_line(), "machine": machine(device)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Platform, Python, torch, processors that may be used, threads, device. No names of machines or people."""
    import torch

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "Platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": platform.python_version(),
        "Torch": torch.__version__,
        "CPUs": processors,
        "Threads": torch.get_num_threads(),
        "Device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }
