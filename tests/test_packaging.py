"""The sdist and the wheel hold the linked folders, and what is installed from them runs elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ppl_seg

ROOT = Path(__file__).parents[1]
SOURCES = ("ppl_seg", "models", "guides", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel made from that sdist), built from a copy of the sources without network."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:  # cp -a keeps the links; build leftovers of the checkout stay out
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def modules(folder: str) -> set[str]:
    return {f"ppl_seg/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}


def data_files() -> set[str]:
    kinds = (".tsv", ".txt", ".json", ".typed")
    return {
        str(p.relative_to(ROOT)) for p in (ROOT / "ppl_seg").rglob("*") if p.suffix in kinds or p.name == "py.typed"
    }


def test_links_are_links() -> None:
    for name in ("models", "guides"):
        assert (ROOT / "ppl_seg" / name).is_symlink()
        assert os.readlink(ROOT / "ppl_seg" / name) == f"../{name}"


def test_wheel_holds_the_linked_folders(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert modules("models") | modules("guides") | data_files() <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ppl_seg", f"ppl_seg-{ppl_seg.__version__}.dist-info"}


def test_sdist_holds_the_linked_folders_as_files(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    expected = modules("models") | modules("guides") | data_files() | {"LICENSE", "README.md"}
    assert expected <= members.keys()
    assert all(members[name].isfile() for name in expected)


def test_installed_command_runs_from_another_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(built[1])], check=True, capture_output=True)

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(target)}
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    where = "import ppl_seg.models, ppl_seg.guides; print(ppl_seg.models.__file__, ppl_seg.guides.__file__)"
    assert (
        run(sys.executable, "-c", where) == f"{target}/ppl_seg/models/__init__.py {target}/ppl_seg/guides/__init__.py"
    )
    assert ppl_seg.__version__ in run(sys.executable, "-m", "ppl_seg", "--version")
    assert ppl_seg.__version__ in run(sys.executable, str(target / "bin" / "ppl-seg"), "--version")
    assert "segment" in run(sys.executable, str(target / "bin" / "ppl-seg"), "--help")
