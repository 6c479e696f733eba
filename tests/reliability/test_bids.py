"""What `segment` writes is accepted by the BIDS validator, where that is installed: pip install bids-validator-deno."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppl_seg.api import segment_scans

from .conftest import MODEL, write_scans

VALIDATOR = shutil.which("bids-validator-deno") or shutil.which(
    "bids-validator-deno", path=str(Path(sys.executable).parent)
)


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_validator_accepts_a_folder_of_results(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "scans", 4), tmp_path / "out"
    files = sorted(scans.iterdir())
    for file, name in zip(files[1:], ("sub-001_ses-1", "sub-001_ses-2", "sub-002_acq-mprage_desc-brain"), strict=True):
        file.rename(scans / f"{name}_T1w.nii.gz")
    options = {"draws": 3, "refine": 0, "probabilities": True, "save_draws": True}
    assert segment_scans([scans], model=MODEL, out=out, **options).exit_code == 0
    assert VALIDATOR is not None
    done = subprocess.run([VALIDATOR, "--json", str(out)], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert done.returncode == 0 and not errors, errors
