from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_seg.errors import InputError
from ppl_seg.inference import checkpoint
from ppl_seg.inference.checkpoint import (
    flatten,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    unflatten,
)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), value)}


def test_round_trip_and_removal(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2):
        save_checkpoint(tmp_path, tensors(step), {"step": step, "best": float("-inf")})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found[0]["weight"], torch.full((3,), 2.0))
    assert found[1] == {"step": 2, "best": float("-inf")}
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "checkpoint.safetensors"]
    remove_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == [] and load_checkpoint(tmp_path) is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("load_between", [True, False])
def test_consistent_wherever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, load_between: bool
) -> None:
    """Each call that changes the disk is the process's last one once; no handler of ours runs then."""
    save_checkpoint(tmp_path, tensors(1), {"step": 1})
    calls = 0

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dying(os.replace))
        patch.setattr("os.fsync", dying(os.fsync))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            save_checkpoint(tmp_path, tensors(2), {"step": 2})
            died = False
        except Killed:
            died = True
    assert died == (after < 7)
    if load_between:
        found = load_checkpoint(tmp_path)
        assert found is not None
        assert float(found[0]["weight"][0]) == found[1]["step"]
    else:
        save_checkpoint(tmp_path, tensors(3), {"step": 3})
        found = load_checkpoint(tmp_path)
        assert found is not None and float(found[0]["weight"][0]) == found[1]["step"] == 3


def test_killed_in_the_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / checkpoint.NEXT).write_bytes(b"half")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, tensors(1), {"step": 1})
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1] == {"step": 1}


def test_altered_or_foreign_files_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tensors(1), {"step": 1})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="checkpoint.safetensors: missing or altered"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(InputError, match="checkpoint.json: not a checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["adam", "amsgrad", "sgd", "rmsprop"])
def test_optimiser_and_scheduler_states_survive(kind: str) -> None:
    layer = torch.nn.Linear(3, 2)
    optimisers = {
        "adam": lambda: torch.optim.Adam(layer.parameters(), lr=0.1),
        "amsgrad": lambda: torch.optim.AdamW(layer.parameters(), lr=0.1, amsgrad=True),
        "sgd": lambda: torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop(layer.parameters(), lr=0.1),
    }
    optimiser = optimisers[kind]()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10)
    for _ in range(3):
        layer(torch.randn(4, 3)).pow(2).sum().backward()
        optimiser.step()
        scheduler.step()
    state = {"optimiser": optimiser.state_dict(), "scheduler": scheduler.state_dict()}
    flat, rest = flatten(state, "now")
    back = unflatten(json.loads(json.dumps(rest)), flat)
    assert back["scheduler"] == state["scheduler"]
    assert back["optimiser"]["param_groups"] == state["optimiser"]["param_groups"]
    assert back["optimiser"]["state"].keys() == state["optimiser"]["state"].keys()  # integers stay integers
    for number, values in state["optimiser"]["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(back["optimiser"]["state"][number][name]), torch.as_tensor(value))
    optimisers[kind]().load_state_dict(back["optimiser"])


def test_nested_structures() -> None:
    nested = {
        "a": [1, 2.5, None, True, "x", (torch.ones(2), {})],
        3: {"tensor": torch.zeros(1)},
        "dict": {"list": []},
    }
    flat, rest = flatten(nested, "p")
    back = unflatten(json.loads(json.dumps(rest)), flat)
    assert back["dict"] == {"list": []} and back["a"][:5] == [1, 2.5, None, True, "x"]
    assert torch.equal(back["a"][5][0], torch.ones(2)) and back["a"][5][1] == {}
    assert torch.equal(back[3]["tensor"], torch.zeros(1))


def test_what_would_need_a_pickle_is_refused() -> None:
    with pytest.raises(ValueError, match="state/rate: function"):
        flatten({"rate": test_nested_structures}, "state")
