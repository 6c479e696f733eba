"""What all tests share: fixed seeds, a clean Pyro parameter store, real data where there is some."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pyro
import pytest
import torch

from ppl_seg.cli import main
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference.objectives import OBJECTIVES
from ppl_seg.models.decoders import DECODERS

hypothesis.settings.register_profile("ppl_seg", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("ppl_seg")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Each test starts from one seed and an empty parameter store, and leaves no default dtype behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def float64() -> Iterator[None]:
    """The test's default dtype is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def registries() -> Iterator[Callable[[], None]]:
    """Import paths that the test trusts are forgotten at its end, and when it calls this."""
    before = [(registry, dict(registry)) for registry in (FAMILIES, OBJECTIVES, DECODERS)]

    def forget() -> None:
        for registry, names in before:
            registry.clear()
            registry.update(names)

    yield forget
    forget()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: run(*arguments) gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, from the environment variable PPL_SEG_DATA; skips where there is none."""
    folder = os.environ.get("PPL_SEG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PPL_SEG_DATA names no folder with real data")
    return Path(folder)
