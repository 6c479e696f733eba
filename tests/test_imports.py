"""Imports point one way, downwards, and the heavy ones wait until they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ppl_seg"

# What each part of the house may import of the others (itself, `errors` and the version: always).
ALLOWED = {
    "models": set(),
    "guides": {"models"},
    "data": set(),
    "inference": {"guides", "models"},
    "results": {"guides", "models", "data"},
    "api": {"inference", "results", "data", "guides", "models"},
    "demo": {"api", "inference", "results", "data", "guides", "models"},
    "cli": {"demo", "api", "inference", "results", "data"},
    "__main__": {"cli"},
    "__init__": {"api", "inference"},
    "errors": set(),
    "files": set(),
}
EVERYWHERE = {"errors", "files", "__init__"}
FOLDERS = ("models", "guides", "data", "inference", "results")
MODEL_LIBRARIES = {"torch", "pyro"}


def files() -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module of the package, through the links of models/ and guides/."""
    folders = [PACKAGE, *(PACKAGE / name for name in FOLDERS)]
    for folder in folders:
        for path in sorted(folder.rglob("*.py") if folder != PACKAGE else folder.glob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, inside functions too, but not for type checkers only."""
    package = name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{full}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    """The part of the house: ppl_seg.models.likelihood → models, ppl_seg.demo_template → demo."""
    parts = dotted.split(".")
    part = parts[1] if len(parts) > 1 else "__init__"
    if part in ALLOWED:
        return part
    if not (PACKAGE / part).is_dir() and not (PACKAGE / f"{part}.py").is_file():
        return "__init__"  # a name of the package itself, as in `from ppl_seg import __version__`
    return part.split("_")[0]  # api_cohort.py belongs to api, demo_template.py to demo


def test_every_file_has_a_room() -> None:
    unknown = {name for name, _ in files() if room(name) not in ALLOWED}
    assert not unknown, f"{unknown}: not in the house's plan; extend ALLOWED with what they may import"


def test_imports_point_downwards() -> None:
    wrong = []
    for name, path in files():
        mine = room(name)
        for imported in imports(name, path):
            if imported.split(".")[0] != "ppl_seg":
                continue
            other = room(imported)
            if other not in ALLOWED[mine] | EVERYWHERE | {mine}:
                wrong.append(f"{name} ({mine}) imports {imported} ({other})")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_folders_by_their_second_name() -> None:
    """`models` and `ppl_seg.models` would be two modules with two classes of each name."""
    scripts = [(f"scripts.{path.stem}", path) for path in sorted((ROOT / "scripts").glob("*.py"))]
    tests = [(f"tests.{path.stem}", path) for path in sorted((ROOT / "tests").rglob("*.py"))]
    wrong = [
        f"{name} imports {imported}"
        for name, path in [*files(), *scripts, *tests]
        for imported in imports(name, path)
        if imported.split(".")[0] in ("models", "guides")
    ]
    assert not wrong, "\n".join(wrong)


def test_models_and_guides_import_torch_and_pyro_only() -> None:
    wrong = []
    for name, path in files():
        if room(name) not in ("models", "guides"):
            continue
        for imported in imports(name, path):
            top = imported.split(".")[0]
            if top not in MODEL_LIBRARIES | sys.stdlib_module_names | {"ppl_seg"}:
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


@pytest.mark.parametrize("module", ["ppl_seg", "ppl_seg.cli", "ppl_seg.__main__"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    heavy = [
        "torch",
        "pyro",
        "numpy",
        "nibabel",
        "SimpleITK",
        "monai",
        "arviz",
        "xarray",
        "matplotlib",
        "nilearn",
    ]
    assert run(f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))") == "[]"


def test_lazy_names_of_the_api() -> None:
    import ppl_seg
    from ppl_seg import api
    from ppl_seg.inference import objectives

    assert ppl_seg.objectives is objectives
    for name in ("learn_prior", "fit_scans", "load_model", "evaluate"):
        assert getattr(ppl_seg, name) is getattr(api, name)
        assert name in dir(ppl_seg)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ppl_seg.nothing
