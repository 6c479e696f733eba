from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ppl_seg.errors import InputError
from ppl_seg.inference.store import load_model_files, save_model

CONFIG = {"decoder": {"name": "convolutional", "width": 8}, "grid": [4, 5, 6], "spacing": 0.1}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    shared = torch.randn(3, 4)
    return {
        "a": shared,
        "b": shared,
        "transposed": shared.T,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "codes": torch.tensor([1, 2, 3]),
        "double": torch.randn(2, dtype=torch.float64),
    }


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_model(tmp_path / "deep" / "model", CONFIG, tensors, {"report.json": "{}", "draws.png": b"\x89PNG"})
    return tmp_path / "deep" / "model"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    config, loaded = load_model_files(model)
    assert config == CONFIG
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    names = {"config.json", "weights.safetensors", "report.json", "draws.png"}
    assert {path.name for path in model.iterdir()} == names  # no temporary file stays


def test_another_user_of_the_group_can_read_it(model: Path) -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in model.iterdir())


@pytest.mark.parametrize("name", ["weights.safetensors", "report.json", "draws.png", "config.json"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        load_model_files(model)


@pytest.mark.parametrize("name", ["weights.safetensors", "draws.png"])
def test_altered_file_is_named(model: Path, name: str) -> None:
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1
    (model / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: altered"):
        load_model_files(model)


def test_truncated_file_is_named(model: Path) -> None:
    weights = model / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="weights.safetensors: altered"):
        load_model_files(model)


def test_other_format_version(model: Path) -> None:
    edit(model / "config.json", format_version=4)
    with pytest.raises(InputError, match="config.json: format version 4 found, 3 expected"):
        load_model_files(model)


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_formats_but_for_low_rank_guides(model: Path, version: int) -> None:
    """Their numbers had another order."""
    edit(model / "config.json", format_version=version)
    load_model_files(model)
    edit(model / "config.json", label_guide={"family": "low-rank"})
    with pytest.raises(InputError, match=f"format version {version} found, 3 expected; use the ppl_seg that made"):
        load_model_files(model)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", '{"format_version": 1, "sha256": {}}'])
def test_foreign_config(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        load_model_files(model)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_model_files(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "a\n"])
def test_names_with_paths_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        save_model(tmp_path / "new", CONFIG, {}, {name: b""})
    assert not (tmp_path / "new").exists()
    hashes = json.loads((model / "config.json").read_text())["sha256"]
    edit(model / "config.json", sha256=hashes | {name: "0" * 64})
    with pytest.raises(InputError, match="not a plain file name"):
        load_model_files(model)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_own_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        save_model(tmp_path, CONFIG, {}, {name: b""})


def test_config_of_the_format_itself_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sha256"):
        save_model(tmp_path / "m", {"sha256": {}}, {})
    with pytest.raises(ValueError):
        save_model(tmp_path / "m", {"spacing": float("nan")}, {})
    assert not (tmp_path / "m").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --out"):
        save_model(tmp_path / "file" / "model", CONFIG, {})


def test_a_failed_save_leaves_the_old_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_model(model, CONFIG, {"a": torch.zeros(1)})
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
