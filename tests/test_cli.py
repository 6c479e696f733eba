"""The command line by itself: options, exit codes, what goes to which stream. The API is a stand-in."""

from __future__ import annotations

import logging
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import typer.main

import ppl_seg
from ppl_seg.cli import app
from ppl_seg.cli_support import OUT_OF_MEMORY
from ppl_seg.errors import InputError

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
TRAINING = {"--seed", "--device", "--precision", "--threads", "--force", "--resume", "--verbose"}
SELECTION = {"--participant-label", "--session-label"}
SCANS = SELECTION | {"--suffix", "--mask", "--channels", "--objective", "--guide", "--likelihood-power", "--align"}
SCANS |= {"--bias-field", "--channel-align", "--brain", "--head"}
OPTIONS = {
    "prior": TRAINING
    | SELECTION
    | {"--out", "--labels", "--map", "--merge-sides", "--spacing", "--align", "--shape", "--latent-dim", "--guide"}
    | {"--objective", "--steps", "--label-steps"},
    "fit": TRAINING | SCANS | {"--trust", "--prior", "--out", "--recipe", "--intensity", "--steps", "--label-rounds"},
    "segment": (TRAINING - {"--precision", "--resume"})
    | SCANS
    | {"--trust", "--model", "--out", "--draws", "--refine", "--probabilities", "--save-draws", "--readout"},
    "evaluate": {"--labels", "--groups", "--out", "--force", "--verbose"},
    "demo": {"--out", "--seed", "--threads", "--verbose"},
}


class FakeApi:
    """Remembers the calls; `error` is raised by each, `rows` are the report's."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.rows = [{"scan": "sub-1[T1w].nii.gz", "status": "ok", "seconds": 1.234, "quality": 0.876, "message": ""}]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(files: Any, **options: Any) -> Any:
            self.calls.append((name, files, options))
            if self.error is not None:
                raise self.error
            failed = any(row["status"] == "failed" for row in self.rows)
            return SimpleNamespace(rows=self.rows, exit_code=int(failed), summary="results: O", scans_left_out=0)

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setitem(sys.modules, "ppl_seg.api", api)
    monkeypatch.setattr(ppl_seg, "api", api, raising=False)
    return api


def test_options_are_the_contracts() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == list(OPTIONS)
    for name, command in commands.items():
        options = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts) if opt.startswith("-")}
        assert options - {"-h", "--help"} == OPTIONS[name], name


def test_prior_passes_everything_on(run: Run, fake: FakeApi, tmp_path: Path) -> None:
    options = (
        "--labels l.tsv --map m.tsv --merge-sides --spacing 2 --align none --latent-dim 8 --guide low-rank "
        "--objective trace --steps 5 --label-steps 9 --seed 3 --device cpu --precision bf16 --resume --force "
        "--participant-label sub-01,02 --participant-label 3 --session-label ses-1 --shape convolutional"
    )
    code, out, err = run("prior", "a.nii.gz", "b.nii.gz", "--out", tmp_path / "p", *options.split())
    assert (code, out.strip(), err) == (0, str(tmp_path / "p"), "")
    assert fake.calls == [
        (
            "learn_prior",
            ["a.nii.gz", "b.nii.gz"],
            {
                "out": tmp_path / "p", "labels": Path("l.tsv"), "value_map": Path("m.tsv"),
                "merge_sides": True, "spacing": 2.0, "align": "none", "shape": "convolutional",
                "latent_dim": 8, "guide": "low-rank",
                "participants": ("sub-01", "02", "3"), "sessions": ("ses-1",), "objective": "trace", "steps": 5,
                "label_steps": 9, "seed": 3, "device": "cpu", "precision": "bf16",
                "resume": True, "force": True, "progress": False,
            },
        )
    ]  # fmt: skip


def test_fit_passes_everything_on(run: Run, fake: FakeApi) -> None:
    options = (
        "--prior P --out F --suffix T1w --mask none --channels T1w,FLAIR --recipe notes --objective jensen "
        "--guide low-rank --intensity per-scan --likelihood-power 0.5 --bias-field n4 --align center "
        "--channel-align none --brain --steps 7 --label-rounds 1 --trust a.b:C --trust d:E"
    )
    assert run("fit", "scans", *options.split())[:2] == (0, "F\n")
    assert fake.calls == [
        (
            "fit_scans",
            ["scans"],
            {
                "prior": Path("P"), "out": Path("F"), "suffix": "T1w", "mask": "none",
                "channels": ("T1w", "FLAIR"), "participants": (), "sessions": (), "recipe": "notes",
                "objective": "jensen", "guide": "low-rank", "intensity": "per-scan", "likelihood_power": 0.5,
                "bias_field": "n4",
                "align": "center", "channel_align": "none", "view": "brain", "steps": 7, "label_rounds": 1,
                "seed": 0, "device": "auto", "precision": "32", "trusted": ("a.b:C", "d:E"), "resume": False,
                "force": False, "progress": False,
            },
        )
    ]  # fmt: skip


def test_segment_passes_everything_on(run: Run, fake: FakeApi) -> None:
    options = (
        "--model M --out O --suffix T1w --mask m.nii.gz --draws 50 --refine 0 --probabilities --save-draws "
        "--readout decoder --objective jensen --guide low-rank --likelihood-power 1 --align none --force "
        "--session-label 1,2"
    )
    assert run("segment", "a", "b", *options.split())[0] == 0
    assert fake.calls == [
        (
            "segment_scans",
            ["a", "b"],
            {
                "model": Path("M"), "out": Path("O"), "suffix": "T1w", "mask": "m.nii.gz", "channels": (),
                "participants": (), "sessions": ("1", "2"),
                "draws": 50, "refine": 0, "probabilities": True, "save_draws": True, "readout": "decoder",
                "objective": "jensen", "guide": "low-rank", "likelihood_power": 1.0,
                "bias_field": None, "align": "none",
                "channel_align": "rigid", "view": None, "seed": 0, "device": "auto", "trusted": (),
                "force": True, "progress": False,
            },
        )
    ]  # fmt: skip


def test_segment_ends_with_one_table(run: Run, fake: FakeApi) -> None:
    long = "b.nii.gz: " + "every word of a long message must be on screen, " * 8
    fake.rows.append({"scan": "b.nii.gz", "status": "failed", "seconds": 0.5, "quality": None, "message": long})
    code, out, err = run("segment", "a", "--model", "M", "--out", "O")
    assert code == 1
    assert "sub-1[T1w].nii.gz" in out and "1.2" in out and "0.88" in out and "ok" in out
    assert " ".join(re.sub(r"[│┃]", " ", out).split()).count("must be on") == 8
    assert err == f"ppl-seg: {long.strip()}\nppl-seg: results: O\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.nii.gz: no such\n file; look"), 2, "a.nii.gz: no such file; look"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, f"out of memory; {OUT_OF_MEMORY}"),
        (
            RuntimeError("step 3:\nNaN [x]"),
            1,
            "RuntimeError: step 3: NaN [x]; use --verbose for the traceback",
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    run: Run, fake: FakeApi, error: BaseException, code: int, line: str
) -> None:
    fake.error = error
    assert run("prior", "a", "--out", "p") == (code, "", f"ppl-seg: {line}\n")


def test_verbose_shows_the_traceback(run: Run, fake: FakeApi) -> None:
    fake.error = RuntimeError("broken")
    code, out, err = run("prior", "a", "--out", "p", "--verbose")
    assert (code, out) == (1, "") and err.startswith("Traceback")
    assert err.endswith("\nppl-seg: RuntimeError: broken\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command; see ppl-seg --help"),
        (["pior"], "No such command 'pior'"),
        (["prior", "--out", "p"], "Missing argument 'LABEL_MAP'; see ppl-seg prior --help"),
        (["prior", "a"], "Missing option '--out'; see ppl-seg prior --help"),
        (["prior", "a", "--out", "p", "--device", "gpu"], "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["prior", "a", "--out", "p", "--precision", "16"], "'16' is not one of '32', 'bf16'"),
        (["prior", "a", "--out", "p", "--steps", "0"], "--steps"),
        (["prior", "a", "--out", "p", "--threads", "0"], "--threads"),
        (["segment", "a", "--model", "m", "--out", "o", "--draws", "0"], "--draws"),
        (["segment", "a", "--model", "m", "--out", "o", "--refine", "-1"], "--refine"),
        (["segment", "a", "--model", "m", "--out", "o", "--heads"], "No such option: --heads"),
        (["fit", "a", "--prior", "m", "--out", "o", "--channels", "T1w,"], "--channels T1w,: expected"),
        (["evaluate", "a"], "Missing argument"),
    ],
)
def test_bad_usage(run: Run, fake: FakeApi, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ppl-seg: ") and words in err
    assert fake.calls == []


def test_threads(run: Run, fake: FakeApi) -> None:
    before = torch.get_num_threads()
    try:
        assert run("prior", "a", "--out", "p", "--threads", before + 1)[0] == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_messages_are_lines_and_warnings_of_libraries_are_not(
    run: Run, fake: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn_prior(*_: Any, **__: Any) -> None:
        logging.getLogger("ppl_seg").info("names are assumed")
        warnings.warn("of a library")

    monkeypatch.setattr(fake, "learn_prior", learn_prior, raising=False)
    for _ in range(2):  # a handler that stays would say it twice
        assert run("prior", "a", "--out", "p") == (0, "p\n", "ppl-seg: names are assumed\n")
    assert "ppl-seg: of a library\n" in run("prior", "a", "--out", "p", "--verbose")[2]


def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Path, int]] = []
    demo = SimpleNamespace(run=lambda out, *, seed: calls.append((out, seed)))
    monkeypatch.setitem(sys.modules, "ppl_seg.demo", demo)
    monkeypatch.setattr(ppl_seg, "demo", demo, raising=False)
    assert run("demo", "--out", tmp_path, "--seed", "4") == (0, "", "")
    assert calls == [(tmp_path, 4)]


def test_evaluate(run: Run, tmp_path: Path) -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    for name in ("seg/sub-1_desc-T1w_dseg", "truth/sub-1_dseg", "truth/sub-2_dseg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    out = tmp_path / "scores.tsv"
    code, screen, err = run("evaluate", tmp_path / "seg", tmp_path / "truth", "--out", out)
    assert code == 1
    assert "label-1" in screen and "mean" in screen and "1.000" in screen and "[" not in screen  # of one person
    assert err.count("\n") == 2 and "no --labels" in err
    assert f"{tmp_path / 'truth' / 'sub-2_dseg.nii.gz'}: has no counterpart" in err
    assert out.read_text().startswith("scan\ttruth\tperson\tstructure\tdice")
    (tmp_path / "truth" / "sub-2_dseg.nii.gz").unlink()
    assert run("evaluate", tmp_path / "seg", tmp_path / "truth")[0] == 0
    code, screen, err = run("evaluate", tmp_path / "none", tmp_path / "truth")
    assert (code, screen, err.count("\n")) == (2, "", 1)


def processor_seconds(*command: str) -> float:
    """Of the quickest of three runs."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (done.returncode, done.stderr) == (0, "")
    return min(seconds)


def test_help_is_quick() -> None:
    """A third of what torch's import takes: seconds depend on the machine, and on what else runs on it."""
    most = processor_seconds("-c", "import torch") / 3
    for arguments in (["--help"], ["--version"], ["segment", "--help"]):
        assert processor_seconds("-m", "ppl_seg", *arguments) < most


def test_help_and_bad_usage_load_nothing_heavy() -> None:
    for arguments in (["segment", "--help"], ["prior"], ["--version"]):
        code = (
            "import sys\nfrom ppl_seg.cli import main\n"
            f"try: main({arguments})\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'pyro', 'numpy', 'nibabel', 'SimpleITK'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip().endswith("[]")


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "ppl_seg", "--version"], capture_output=True, text=True)
    assert done.stdout == f"ppl-seg {ppl_seg.__version__}\n"
