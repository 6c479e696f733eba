"""Files that are wrong in one way each, the commands that meet them, and what these must say."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

MODEL = Path(__file__).parent / "inference" / "format-1"  # fitted to crops of 8x8x6 voxels of 1 mm
SHAPE = (8, 8, 6)
Arguments = list[object]
Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Files:
    """Writes files below a test's folder."""

    root: Path

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.path(name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def image(
        self,
        name: str = "s/sub-1_T1w.nii",
        data: np.ndarray | None = None,
        affine: np.ndarray | None = None,
        edit: Callable[[Any], object] | None = None,
    ) -> Path:
        """A NIfTI image, by default a scan of two blobs."""
        image = nib.Nifti1Image(scan() if data is None else data, np.eye(4) if affine is None else affine)
        if edit is not None:
            edit(image)
        path = self.path(name)
        nib.save(image, path)
        return path

    def labels(self, name: str, data: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
        return self.image(name, label_map() if data is None else data, affine)

    def maps(self, count: int = 3) -> list[Path]:
        return [self.labels(f"m/sub-{n}_dseg.nii") for n in range(count)]

    def patched(self, offset: int, form: str, *values: float, name: str = "s/sub-1_T1w.nii") -> Path:
        """The default scan, integer, with bytes of its header replaced."""
        path = self.image(name, scan().astype(np.int16))
        content = bytearray(path.read_bytes())
        struct.pack_into("<" + form, content, offset, *values)
        return self.write(name, bytes(content))

    def model(self) -> Path:
        """A copy of MODEL, which a command may harm."""
        return Path(shutil.copytree(MODEL, self.root / "model", dirs_exist_ok=True))

    def unformed(self, name: str) -> Path:
        """A file of before, without form codes: its voxels' sizes alone say where they lie."""
        path = self.root / name
        content = bytearray(path.read_bytes())
        struct.pack_into("<2h", content, 252, 0, 0)
        return self.write(name, bytes(content))

    def link(self, name: str, target: str) -> Path:
        path = self.path(name)
        path.symlink_to(target)
        return path


def label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:4, 1:5], labels[2:6, 4:6, 1:5] = 1, 2
    return labels


def scan(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 3, SHAPE)
    return (np.array([60.0, 100.0, 110.0])[label_map()] + noise).astype(np.float32)


def segment(*arguments: object) -> Arguments:
    return ["segment", *arguments, "--model", MODEL, "--draws", 2, "--refine", 0]


def fit(*arguments: object) -> Arguments:
    return ["fit", *arguments, "--prior", MODEL, "--steps", 1]


def prior(*arguments: object) -> Arguments:
    return ["prior", *arguments, "--steps", 1, "--latent-dim", 2]


def edited(data: np.ndarray, value: float, where: Any = (0, 0, 0)) -> np.ndarray:
    changed = data.astype(np.float32)
    changed[where] = value
    return changed


def forms(sform: int, qform: int, shift: float = 0.0) -> Callable[[Any], None]:
    def edit(image: Any) -> None:
        image.set_sform(np.eye(4), code=sform)
        moved = np.eye(4)
        moved[0, 3] = shift
        image.set_qform(moved, code=qform)

    return edit


def packed(path: Path, length: int | None = None) -> bytes:
    return gzip.compress(path.read_bytes())[:length]


def table(files: Files, text: str) -> Arguments:
    return prior(*files.maps(), "--labels", files.write("labels.tsv", text))


def visits(files: Files, *names: str) -> Path:
    for number, name in enumerate(names):
        files.image(f"v/{name}.nii", scan(number))
    return files.root / "v"


Make = Callable[[Files], Arguments]


def check_refused(files: Files, run: Run, make: Make, words: str) -> None:
    """One line that holds `words`; nothing that was there is lost, and nothing is made."""
    arguments = make(files)
    if "--out" not in arguments:
        arguments += ["--out", files.root / "out"]
    before = snapshot(files.root)
    code, _, err = run(*arguments)
    complaints = [line for line in err.splitlines() if words in line]
    assert code in (1, 2) and len(complaints) == 1, (code, err)
    assert "Traceback" not in err and all(line.startswith("ppl-seg: ") for line in err.splitlines())
    after = snapshot(files.root)
    assert {name: after.get(name) for name in before} == before  # nothing that was there is lost
    assert not [name for name in after if name.endswith(("_dseg.nii.gz", "config.json")) and name not in before]


def snapshot(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
