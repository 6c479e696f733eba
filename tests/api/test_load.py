"""Model directories from anywhere: of an older format, altered, hostile. One line that names the file, or a model."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch

from ppl_seg.api.load import load_model
from ppl_seg.api.trust import trust
from ppl_seg.errors import InputError
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference.objectives import OBJECTIVES
from ppl_seg.models.decoders import DECODERS

FORMAT_1 = Path(__file__).parents[1] / "inference" / "format-1"  # a fit of ppl_seg 0.1.0 to ellipsoids, 8x8x6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(FORMAT_1, tmp_path / "model")
    return tmp_path / "model"


def edit(model: Path, keys: str, value: Any) -> None:
    """Set the value at `a.b.c` of config.json."""
    config = json.loads((model / "config.json").read_text())
    *path, last = keys.split(".")
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    (model / "config.json").write_text(json.dumps(config))


def replace_weights(model: Path, content: bytes) -> None:
    """As somebody who knows the format would: with the right checksum."""
    (model / "weights.safetensors").write_bytes(content)
    config = json.loads((model / "config.json").read_text())
    config["sha256"]["weights.safetensors"] = hashlib.sha256(content).hexdigest()
    (model / "config.json").write_text(json.dumps(config))


def test_format_1_is_read_and_segments(tmp_path: Path) -> None:
    model = load_model(FORMAT_1)
    assert (model.align, model.field_of_view, model.channels) == ("center", "crop", 1)
    axes = np.stack(np.meshgrid(*map(np.arange, (8, 8, 6)), indexing="ij"), -1) - np.array([3.5, 3.5, 2.5])
    labels = np.where(((axes / 2.6) ** 2).sum(-1) < 1, np.where(axes[..., 1] > 0, 2, 1), 0)
    scan = np.array([60.0, 100.0, 110.0])[labels] + np.random.default_rng(0).normal(0, 3, labels.shape)
    nib.save(nib.Nifti1Image(scan.astype(np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    found = model.segment(tmp_path / "scan.nii.gz", draws=4).label_map
    assert ((found > 0) == (labels > 0)).mean() > 0.95
    model.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["format_version"] == 3
    assert load_model(tmp_path / "new").hash == model.hash


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("format_version", 4, "format version 4 found, 3 expected"),
        ("format_version", [], "format version"),
        ("shape_prior.decoder", "nothing", "unknown decoder 'nothing'"),
        ("shape_prior.decoder", "os:system", "code that is not ppl_seg's; if you trust it, give --trust os:system"),
        ("label_guide.family", "hostile:Guide", "its label guide is hostile:Guide"),
        ("recipe.guide", "hostile:Guide", "its guide is hostile:Guide"),
        ("recipe.objective", "hostile:Guide", "its objective is hostile:Guide"),
        ("recipe.objective", "nothing", "nothing: unknown"),
        ("recipe.classes", 5, "recipe.classes is 5"),
        ("recipe.refine_steps", 10**9, "recipe.refine_steps is 1000000000"),
        ("recipe.em_iterations", -1, "recipe.em_iterations is -1"),
        ("recipe.likelihood_power", float("nan"), "recipe.likelihood_power is nan"),
        ("recipe.maps", {"import": "os"}, "config.json"),
        ("recipe.more", 1, "config.json"),
        ("recipe.strengths", [], "recipe.strengths is (), expected a list"),
        ("recipe.strengths", ["x"], "recipe.strengths is 'x', expected a number"),
        ("shape_prior.latent_dim", 10**12, "config.json"),
        ("shape_prior.latent_dim", 3, "codes: shape (4, 3) expected"),
        ("shape_prior.latent_dim", "2", "config.json"),
        ("shape_prior.options.width", 4096, "shape"),
        ("shape_prior.options.levels", 10**9, "levels: expected a whole number up to"),
        ("shape_prior.options.more", 1, "config.json"),
        ("label_guide.options.hidden", 4096, "shape"),
        ("grid.shape", [10**6, 10**6, 10**6], "3 labels on a grid of (1000000, 1000000, 1000000)"),
        ("grid.shape", [8, 8], "config.json"),
        ("grid.affine", [[0, 0, 0, 0]] * 4, "the grid's affine"),
        ("grid.affine", [[float("nan")] * 4] * 4, "the grid's affine"),
        ("channels", 2, "shape"),
        ("channels", 10**15, "config.json"),
        ("align", "../x", "align '../x'"),
        ("kind", "other", "kind 'other'"),
        ("labels", [], "1 labels on a grid"),
        ("labels", 10**400, "config.json"),
        ("sha256.../outside", "0" * 64, "not a plain file name"),
    ],
)
def test_a_config_that_does_not_fit(model: Path, keys: str, value: Any, words: str) -> None:
    if keys.startswith("sha256."):
        hashes = json.loads((model / "config.json").read_text())["sha256"]
        edit(model, "sha256", {**hashes, keys.removeprefix("sha256."): value})
    else:
        edit(model, keys, value)
    with pytest.raises(InputError) as error:
        load_model(model)
    assert str(model / "config.json") in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "..", "a/b", ""])
def test_path_tricks_are_refused(model: Path, name: str) -> None:
    edit(model, "sha256", {"weights.safetensors": "0" * 64, name: "0" * 64})
    with pytest.raises(InputError, match="not a plain file name|altered"):
        load_model(model)


def test_names_for_the_screen_are_printable(model: Path) -> None:
    labels = json.loads((model / "config.json").read_text())["labels"]
    edit(model, "labels", [labels[0], {**labels[1], "name": "a\x1b[2J\tb"}, labels[2]])
    with pytest.raises(InputError, match="control characters"):
        load_model(model)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", "\0", "{}" * 3])
def test_a_config_that_is_none(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        load_model(model)


def test_a_huge_config_is_not_read(model: Path) -> None:
    with (model / "config.json").open("ab") as stream:
        stream.truncate(2**33)  # sparse
    with pytest.raises(InputError, match="8589934592 bytes"):
        load_model(model)


Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("codes"), "codes"),
        (lambda t: t.update(more=torch.zeros(1)), "more: shape None expected"),
        (lambda t: t.update(codes=torch.zeros(4, 7)), r"codes: shape \(4, 2\) expected"),
        (lambda t: t.update(codes=torch.zeros(0)), "codes"),
        (lambda t: t["codes"].fill_(float("nan")), "no finite numbers: codes"),
        (lambda t: t.update(codes=torch.zeros(4, 2, dtype=torch.int64)), "no finite numbers: codes"),
        (lambda t: t.update({"theta.mean": torch.zeros(1, 99, 1)}), "theta.mean"),
        (lambda t: t.pop("theta.background_log_weight"), "theta.background_log_weight"),
        (lambda t: t.pop("shape_prior.log_location_prior"), "log_location_prior"),
    ],
)
def test_weights_that_do_not_fit(model: Path, change: Change, words: str) -> None:
    tensors = safetensors.torch.load_file(model / "weights.safetensors")
    change(tensors)
    replace_weights(model, safetensors.torch.save(tensors))
    with pytest.raises(InputError, match=words):
        load_model(model)


class _Trap:
    def __reduce__(self) -> Any:
        return open, ("trap-was-sprung", "w")


def test_a_pickle_is_not_opened(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_weights(model, pickle.dumps(_Trap()))
    with pytest.raises(InputError, match="weights.safetensors: not a safetensors file"):
        load_model(model)
    assert not (tmp_path / "trap-was-sprung").exists()


MODULE = """
from pathlib import Path
Path("imported").touch()
from ppl_seg.guides.families import MeanField
class Guide(MeanField):
    pass
NUMBER = 5
"""


def test_code_is_imported_when_the_caller_names_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_guides.py").write_text(MODULE)
    edit(model, "recipe.guide", "my_guides:Guide")
    with pytest.raises(InputError, match="--trust my_guides:Guide"):
        load_model(model)
    assert not (tmp_path / "imported").exists() and "my_guides" not in sys.modules
    with pytest.raises(InputError, match="--trust my_guides:Guide"):
        load_model(model, trusted=["ppl_seg.guides.families:MeanField"])
    guide = load_model(model, trusted=["my_guides:Guide"]).scan_guide
    assert guide is not None and type(guide.family).__name__ == "Guide" and (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:Name", "no_such_module:Name: cannot be imported"),
        ("json:Nothing", "cannot be imported"),
        ("json:dumps", "neither a guide's family, an objective nor a decoder"),
        (":", "cannot be imported"),
    ],
)
def test_what_cannot_be_trusted(name: str, words: str, registries: Callable[[], None]) -> None:
    with pytest.raises(InputError, match=words):
        trust(name)


def test_every_kind_of_part(registries: Callable[[], None]) -> None:
    guide, objective = "ppl_seg.guides.families:LowRank", "ppl_seg.inference.objectives:Jensen"
    decoder = "ppl_seg.models.decoders:LocationDecoder"
    trust(guide, objective, decoder, None, "mean-field")
    assert guide in FAMILIES and objective in OBJECTIVES and decoder in DECODERS
