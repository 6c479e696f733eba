"""Stages of a benchmark: each runs once, in a folder of its own, and says with what words and how long."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_seg import __version__
from ppl_seg.errors import InputError
from ppl_seg.files import write_text


@dataclass
class Stages:
    """Runs each stage once, in OUT/<stage>.part, which becomes OUT/<stage> when it is done."""

    out: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, command: list[str], needs: Iterable[str], work: Callable[[Path], None]) -> Path:
        """The stage's folder, made by `work`; used again where `command`, the words for it, is the same."""
        folder, part = self.out / name, self.out / f"{name}.part"
        if folder.exists() and not self._fresh(folder, command, needs):
            shutil.rmtree(folder)
        if not folder.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            print(f"== {name}: {' '.join(command)[:300]}", flush=True)
            began, start = time.time(), time.perf_counter()
            work(part)
            record = {"seconds": time.perf_counter() - start, "began": began, "finished": time.time()}
            written = json.dumps({**record, "command": command, "version": __version__}, indent=1)
            write_text(part / "done.json", written)
            part.rename(folder)
        self.done[name] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        return folder

    def _fresh(self, folder: Path, command: list[str], needs: Iterable[str]) -> bool:
        """Whether a finished stage is younger than what it builds on."""
        marker = folder / "done.json"
        record = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
        if record.get("command") != command:
            raise InputError(f"{folder}: not made by these options; remove it, or choose another --out")
        return all(self.done[need]["finished"] <= record["began"] for need in needs)

    def command(self, name: str, words: Sequence[str | Path], needs: Iterable[str] = ()) -> Path:
        """`ppl-seg WORDS --out OUT/<name>/result`: the folder of results."""
        line = [str(word) for word in words]

        def work(part: Path) -> None:
            command = [sys.executable, "-m", "ppl_seg", *line, "--out", str(part / "result")]
            status = subprocess.run(command).returncode
            if status == 1 and line[0] == "segment":
                print(f"{name}: some scans failed; they count as Dice 0", file=sys.stderr)
            elif status:
                raise InputError(f"{name}: ppl-seg {line[0]} ended with status {status}, see above")

        return self.run(name, ["ppl-seg", *line], needs, work) / "result"
