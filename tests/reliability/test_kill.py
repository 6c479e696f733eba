"""kill -9 at any moment, then the same command again: the files of an undisturbed run, never half a file."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

from .conftest import Ask, content, fit, is_temporary, segment

LAST_OPERATIONS = 12  # of a command: where names are given


@pytest.fixture(scope="module")
def undisturbed(ask: Ask, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For segment and fit: content of the output folder, operations on files, seconds."""
    found = {}
    for name, command in {"segment": segment, "fit": fit}.items():
        out = tmp_path_factory.mktemp(name) / "out"
        answer = ask(*command(scans, out))
        assert answer.code == 0, answer.stderr
        found[name] = (content(out), answer.operations, answer.seconds)
        assert not any(map(is_temporary, found[name][0]))
    return found


def check_whole(folder: Path, expected: dict[str, Any]) -> None:
    """Whatever has a final name is whole: images can be read, and files that never change are as they should be."""
    for name, there in content(folder).items() if folder.exists() else ():
        if is_temporary(name):
            continue
        if name.endswith(".nii.gz"):
            nib.load(folder / name).get_fdata()
        if name.endswith((".nii.gz", ".png", ".nc")) and name in expected:
            assert there == expected[name], name


def kill_and_repeat(ask: Ask, command: Any, scans: Path, out: Path, expected: dict[str, Any], **how: Any) -> bool:
    """Whether the kill came before the end."""
    first = ask(*command(scans, out), **how)
    assert first.code in (0, -signal.SIGKILL), first.stderr
    check_whole(out, expected)
    again = ("--resume",) if command is fit else ()
    second = ask(*command(scans, out, *again))
    assert second.code == 0, (how, second.stderr)
    found = content(out)
    assert found.keys() == expected.keys(), how
    assert [name for name in found if found[name] != expected[name]] == [], how
    return bool(first.code)


@pytest.mark.parametrize("command", [segment, fit])
def test_one_kill(ask: Ask, scans: Path, undisturbed: Any, tmp_path: Path, command: Any) -> None:
    expected, operations, _ = undisturbed[command.__name__]
    assert kill_and_repeat(ask, command, scans, tmp_path / "out", expected, kill_at=int(0.9 * operations))


@pytest.mark.slow
@pytest.mark.parametrize("command", [segment, fit])
def test_a_kill_at_any_operation_on_files(
    ask: Ask, scans: Path, undisturbed: Any, tmp_path: Path, command: Any
) -> None:
    expected, operations, _ = undisturbed[command.__name__]
    early = random.Random(0).sample(range(1, operations - LAST_OPERATIONS), 12)
    for at in [*sorted(early), *range(operations - LAST_OPERATIONS, operations + 1)]:
        assert kill_and_repeat(ask, command, scans, tmp_path / str(at), expected, kill_at=at)


@pytest.mark.slow
@pytest.mark.parametrize("command", [segment, fit])
def test_ten_kills_at_random_moments(ask: Ask, scans: Path, undisturbed: Any, tmp_path: Path, command: Any) -> None:
    expected, _, seconds = undisturbed[command.__name__]
    moments = [random.Random(n).uniform(0.02, 1.0) * seconds for n in range(10)]
    killed = [
        kill_and_repeat(ask, command, scans, tmp_path / str(n), expected, kill_after=moment)
        for n, moment in enumerate(moments)
    ]
    assert sum(killed) >= 7  # a run may end a little sooner than the undisturbed one
