"""Documents as tests: their code blocks, and how a line of one is run at smoke size."""

from __future__ import annotations

import glob
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ppl_seg.cli import main

ROOT = Path(__file__).parents[1]

NOT_RUN = {  # a line of a bash block, and where it is tried instead
    "make demo": "builds an environment and runs for minutes; the demo has tests of its own",
    "make test": "what runs this very test",
    "pip install .": "tests/test_packaging.py installs the wheel",
}
SMALL = {  # options that cut a command's or a script's work
    "prior": ["--steps", "3"],  # what z is follows from the label maps, as it does for users
    "fit": ["--steps", "3", "--label-rounds", "1"],
    "segment": ["--draws", "8"],
    "train_prior.py": ["--steps", "2", "--latent", "4"],
    "fit_scans.py": ["--epochs", "1"],
}


class Block(NamedTuple):
    """A fenced block of code, and the line of the document where it begins."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in fences]


def commands(block: Block) -> list[str]:
    lines = [line.split("  #")[0].strip() for line in block.text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a bash block in this process, at smoke size."""
    words = shlex.split(line)
    if words[0] == "ppl-seg":
        with pytest.raises(SystemExit) as stop:
            main([*words[1:], *SMALL.get(words[1], [])])
        assert stop.value.code == 0, line
    elif words[0] == "python":
        arguments = [path for word in words[2:] for path in sorted(glob.glob(word)) or [word]]
        monkeypatch.setattr(sys, "argv", [words[1], *arguments, *SMALL.get(Path(words[1]).name, [])])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        assert line in NOT_RUN, f"{line!r} is neither run here nor listed in NOT_RUN"
