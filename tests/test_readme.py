"""The README does what it says: its code is run, on tiny data made here; links, options and names exist."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer.main

import ppl_seg
from ppl_seg.api.prior import FEWEST_MAPS
from ppl_seg.api.shapes import CONTROL, LATENT_DIM
from ppl_seg.cli import app
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference.objectives import OBJECTIVES
from ppl_seg.inference.recipes import POWER_OF_A_CUBIC_MM, build_recipe
from tests.documents import NOT_RUN, ROOT, blocks, commands, run_command

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SHAPE = (16, 18, 12)

NOT_OURS = {  # options of other programs
    "--extra-index-url", "--build-arg", "--rm", "--gpus", "--cleanenv", "--bind", "--nv",
    "--no-csf", "--save",
}  # fmt: skip


def ellipsoids(random: np.random.Generator) -> np.ndarray:
    """Two neighbours, labels 1 and 2, that differ from map to map."""
    axes = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - (np.array(SHAPE) - 1) / 2
    distance = (((axes - random.normal(0, 0.5, 3)) / random.uniform(0.9, 1.1, 3) / (4.5, 5.5, 3.5)) ** 2).sum(-1)
    return np.where(distance < 1, np.where(axes[..., 1] > 0, 2, 1), 0).astype(np.uint8)


def make_files(folder: Path) -> None:
    """labels/, scans/, truth/ with the names of the README, and its label table."""
    random = np.random.default_rng(0)

    def save(name: str, data: np.ndarray) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.diag([-1.0, 1.0, 1.0, 1.0])), folder / name)

    for person in range(1, 6):
        save(f"labels/sub-{person + 50:02}_dseg.nii.gz", ellipsoids(random))
    for person in range(1, 4):
        truth = ellipsoids(random)
        save(f"truth/sub-{person:02}_dseg.nii.gz", truth)
        scan = np.array([60.0, 100.0, 100.0])[truth] + random.normal(0, 8, SHAPE)
        save(f"scans/sub-{person:02}_T1w.nii.gz", scan.astype(np.float32))
    (table,) = (block.text for block in blocks(README) if block.language == "tsv")
    (folder / "labels.tsv").write_text(table, encoding="utf-8")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All blocks in order: the commands' results are there for the Python that follows, in one namespace."""
    namespace: dict[str, Any] = {"folder": tmp_path_factory.mktemp("readme")}
    make_files(namespace["folder"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(namespace["folder"])
        patch.setattr(ppl_seg, "learn_prior", functools.partial(ppl_seg.learn_prior, steps=3, latent_dim=4))
        patch.setattr(ppl_seg, "fit_scans", functools.partial(ppl_seg.fit_scans, steps=3))
        for block in blocks(README):
            if block.language == "bash":
                for line in commands(block):
                    run_command(line, patch)
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, README, "exec"), namespace)
    return namespace


def test_the_code_runs(executed: dict[str, Any]) -> None:
    prior, result = executed["prior"], executed["result"]
    assert prior.table.class_of_label == (0, 1, 1)
    assert result.draws.shape == (200, *SHAPE) and result.entropy.shape == SHAPE
    assert [row["structure"] for row in result.volumes] == ["anterior-hippocampus", "posterior-hippocampus"]
    assert {"volume_mm3", "q05", "q50", "q95"} <= result.volumes[0].keys()
    assert {"dice", "dice_low", "dice_high"} <= executed["scores"][0].keys()
    assert executed["again"].scan_guide is not None
    assert np.isfinite(executed["losses"]).all()
    assert all(parameter.abs().max() > 0 for parameter in executed["guide"].parameters())  # it started at zero
    assert not any(parameter.requires_grad for parameter in prior.shape_prior.parameters())
    assert executed["labels"].shape == (8, *prior.shape_prior.grid)


def test_the_tables_name_the_files_that_come_out(executed: dict[str, Any]) -> None:
    out, stem = executed["folder"] / "results_more", "sub-01_seg-ppl_desc-T1w"
    section = README.read_text(encoding="utf-8").split("### What comes out")[1].split("\n## ")[0]
    first = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    there = {path.name.removeprefix(stem) for path in out.rglob("*") if path.is_file()}
    assert there - {"_probseg.json"} == named - {".json"}


def test_blocks_are_of_languages_that_are_tried() -> None:
    found = blocks(README)
    assert {block.language for block in found} <= {"bash", "python", "tsv", "math"}
    assert README.read_text(encoding="utf-8").count("```") == 2 * len(found)
    lines = {line for block in found if block.language == "bash" for line in commands(block)}
    assert NOT_RUN.keys() <= lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    for target in (target for target in targets if not target.startswith("https://")):
        path, _, anchor = target.partition("#")
        page = document.parent / path if path else document
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(document: Path) -> None:
    command = typer.main.get_command(app)
    ours = {option for one in command.commands.values() for p in one.params for option in p.opts}  # type: ignore[attr-defined]
    for script in (ROOT / "scripts").glob("*.py"):
        ours |= set(re.findall(r"--[a-z][a-z-]+", script.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text(encoding="utf-8")))
    assert named <= ours | NOT_OURS


def test_the_tables_name_what_is_registered() -> None:
    names = ["marginal", "jensen", "trace", "enum", "iwae", "sleep"]  # the order of the table
    assert set(names) == OBJECTIVES.keys()
    section = README.read_text(encoding="utf-8").split("## Which objective, which guide")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE) == [*names, *FAMILIES]


def test_the_defaults_are_those_of_the_code() -> None:
    text, recipe = README.read_text(encoding="utf-8"), build_recipe("default")
    assert f"the default for crops ({LATENT_DIM} numbers z)" in text
    assert f"noise on points {CONTROL:g} mm apart" in text
    assert f"by default {recipe.beta:g}; for brains and heads {POWER_OF_A_CUBIC_MM:g} for each mm³" in text
    assert f"EM, then {recipe.refine_steps} gradient steps (`--refine`)" in text
    assert f"EM, then {recipe.per_scan_steps} gradient steps |" in text
    assert f"needs at least {FEWEST_MAPS})" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_figure_is_left_open(document: Path) -> None:
    assert not re.findall(r"<!-- figure: ([\w-]+) -->", document.read_text(encoding="utf-8"))
