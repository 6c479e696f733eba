"""Many scans, one after another: outputs skipped where complete, bad scans reported, the others finished."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppl_seg import __version__
from ppl_seg.api.load import load_model
from ppl_seg.api.model import Model
from ppl_seg.api.output import LOGGER, say_device
from ppl_seg.api.resources import SHARES, available_memory, check_memory, is_out_of_memory, segment_memory
from ppl_seg.api.trust import trust
from ppl_seg.data.alignment import check_alignment
from ppl_seg.data.channels import check_channel_alignment
from ppl_seg.data.cohort import Found, Selection, check_channels, check_output_apart, find_scans
from ppl_seg.data.fields import check_view
from ppl_seg.data.masks import masks_of
from ppl_seg.data.names import output_location
from ppl_seg.data.nifti import open_image
from ppl_seg.errors import InputError
from ppl_seg.files import is_full
from ppl_seg.inference.trainer import resolve_device
from ppl_seg.results.provenance import command_line, machine
from ppl_seg.results.volumes import mean_quality

if TYPE_CHECKING:
    from ppl_seg.results.segmentation import Segmentation

WAY_OUT = "free some, use a larger machine, or leave out --probabilities and --save-draws"


@dataclass
class RunReport:
    """rows: scan, status (ok, skipped, failed), seconds, quality (0 to 1, None where failed), message."""

    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where a scan failed, else 0."""
        return int(any(row["status"] == "failed" for row in self.rows))

    @property
    def summary(self) -> str:
        """How many scans are done, skipped, failed, and where the results are."""
        counts = Counter(row["status"] for row in self.rows)
        return f"{', '.join(f'{count} {status}' for status, count in counts.items())}; results: {self.out}"


@dataclass(frozen=True)
class _Job:
    """One scan: its files, where its outputs go, its mask, and what must be recorded there to skip it."""

    paths: tuple[Path, ...]
    place: tuple[Path, str]
    mask: str | Path
    options: dict[str, Any]


def segment_scans(
    scans: str | Path | Sequence[str | Path],
    *,
    model: Model | str | Path,
    out: str | Path,
    suffix: str | None = None,
    mask: str | Path = "auto",
    channels: str | Sequence[str] = (),
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    draws: int = 200,
    refine: int | None = None,
    probabilities: bool = False,
    save_draws: bool = False,
    readout: str | None = None,
    objective: str | None = None,
    guide: str | None = None,
    likelihood_power: float | None = None,
    bias_field: str | None = None,
    align: str | None = None,
    channel_align: str = "rigid",
    view: str | None = None,
    recipe: str | None = None,
    seed: int = 0,
    device: str = "auto",
    trusted: Sequence[str] = (),
    force: bool = False,
    progress: bool = False,
) -> RunReport:
    """Segment scans into a folder; arguments as `Model.segment`, `trusted` as `load_model`.

    Outputs of the same inputs, model and options are skipped; different ones are an error without force. A scan that
    fails is reported and the others finish.

    Raises:
        InputError: nothing to do, options that don't fit, colliding outputs: before any work.
    """
    from ppl_seg.inference.progress import scan_bar
    from ppl_seg.results.dataset import append_log, check_room, listed_scans, write_dataset_files, write_label_table
    from ppl_seg.results.staging import remove_stale
    from ppl_seg.results.writer import earlier_result, recorded

    trust(guide, objective)
    loaded = model if isinstance(model, Model) else load_model(model, trusted)
    check_alignment(align or loaded.align)
    check_channel_alignment(channel_align)
    check_view(view)
    device_used = resolve_device(device)
    found = find_scans(scans, suffix, channels, Selection(tuple(participants), tuple(sessions)))
    if loaded.scan_guide is not None:
        check_channels(found, loaded.channels)
    out = Path(out)
    others = [given for given in (model, mask) if isinstance(given, str | Path) and given not in ("auto", "none")]
    places = output_places(found, out, others)
    fixed: dict[str, Any] = {"draws": draws, "refine": refine, "readout": readout, "objective": objective, "seed": seed}
    fixed |= {"guide": guide, "likelihood_power": likelihood_power, "bias_field": bias_field, "recipe": recipe}
    placing = {"align": align, "channel_align": channel_align, "view": view}
    fixed |= placing
    chosen = loaded.checked_recipe(recipe, objective, guide, readout, likelihood_power, bias_field)
    masks, model_hash = masks_of(found, mask), loaded.hash  # the hash reads all weights: once
    jobs = [
        _Job(
            file.paths,
            place,
            own,
            loaded.options(chosen, draws=draws, refine=refine, mask=own, seed=seed, **placing),
        )
        for file, place, own in zip(found, places, masks, strict=True)
    ]
    endings = ["probseg.nii.gz"] * probabilities + ["draws.nii.gz"] * save_draws
    listed = listed_scans(out)
    earlier = {j.place: earlier_result(out, j.place, j.options, model_hash, j.paths, listed, endings) for j in jobs}
    if "other" in earlier.values() and not force:
        folder, stem = next(place for place, found in earlier.items() if found == "other")
        raise InputError(
            f"{out / folder / stem}_dseg.nii.gz: made from another scan, mask, model or options, or not by ppl_seg; "
            "choose another --out, or --force"
        )
    pending = {job.place: job for job in jobs if force or earlier[job.place] != "complete"}
    sizes = {place: _voxels(job.paths[0]) for place, job in pending.items()}
    check_room(out, sum(sizes.values()), len(loaded.table) * probabilities + draws * save_draws)
    run = _Run(loaded, out, fixed, probabilities, save_draws, device_used)
    if pending:  # the largest scan decides, before any work
        run.share_of_memory(pending[max(sizes, key=lambda place: sizes[place])])
    write_dataset_files(out, sorted({str(file.base or file.path.parent) for file in found}), __version__)
    write_label_table(out, loaded.table)
    remove_stale(out, [out / folder for folder, _ in places])
    about = f"machine {machine(str(device_used))}, model {model_hash}, {len(found)} scans, options {jobs[0].options}"
    append_log(out, f"ppl_seg {__version__}: {command_line()}\n{about}")
    report = RunReport(out)
    for job in scan_bar(jobs, progress):
        began = time.monotonic()
        row: dict[str, Any] = {"scan": str(job.paths[0]), "status": "skipped", "seconds": 0.0}
        row |= run.finish(job) if job.place in pending else {"quality": (recorded(out, job.place) or {}).get("Quality")}
        row = {"quality": None, "message": "", **row, "seconds": time.monotonic() - began}
        append_log(out, log_line(row, recorded(out, job.place)))
        report.rows.append(row)
    append_log(out, report.summary)
    if any(row["status"] == "ok" for row in report.rows):
        say_device(device, device_used)
    return report


@dataclass(frozen=True)
class _Run:
    """What all scans of a run share. options: of `Model.segment`."""

    model: Model
    out: Path
    options: dict[str, Any]
    probabilities: bool
    save_draws: bool
    device: torch.device

    def finish(self, job: _Job) -> dict[str, Any]:
        """Segment one scan and write its files: status, quality, message.

        Raises:
            InputError: there is no room for the files; whatever is wrong with the scan is a status.
        """
        from ppl_seg.results.writer import write_segmentation

        try:
            result = self._segment(job)
            write_segmentation(result, self.out, job.place, self.probabilities, self.save_draws)
        except InputError as error:
            if is_full(error):  # the other scans would be computed for nothing
                raise
            return {"status": "failed", "message": str(error)}
        except Exception as error:  # one bad scan must not end the run
            LOGGER.debug("%s", job.paths[0], exc_info=True)
            return {"status": "failed", "message": f"{type(error).__name__}: {error}"}
        return {"status": "ok", "quality": mean_quality(result), "message": "; ".join(result.image.warnings)}

    def share_of_memory(self, job: _Job) -> float:
        """The largest of SHARES at which a scan fits into what is free. InputError where none does."""
        free = available_memory(self.device)
        share = next((share for share in SHARES if self._memory(job, share) <= free), SHARES[-1])
        check_memory(str(job.paths[0]), self._memory(job, share), free, WAY_OUT)
        return share

    def _segment(self, job: _Job) -> Segmentation:
        """In smaller pieces where memory runs out."""
        first = self.share_of_memory(job)
        for share in SHARES[SHARES.index(first) :]:
            try:
                return self.model.segment(
                    job.paths,
                    **self.options,
                    mask=job.mask,
                    keep_probabilities=self.probabilities,
                    keep_draws=self.save_draws,
                    share=share,
                    device=self.device.type,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                LOGGER.debug("%s: out of memory with %g of the usual working memory", job.paths[0], share)
                torch.cuda.empty_cache()
        needed = self._memory(job, SHARES[-1]) / 1e9
        raise InputError(f"{job.paths[0]}: out of memory; about {needed:.1f} GB are needed; {WAY_OUT}")

    def _memory(self, job: _Job, share: float) -> float:
        voxels, draws = _voxels(job.paths[0]), self.options["draws"]
        return segment_memory(self.model, voxels, len(job.paths), draws, self.probabilities, self.save_draws, share)


def _voxels(path: Path) -> int:
    """The number of voxels that a scan's header states; 0 for a file that cannot be read, which is said in its turn."""
    try:
        return math.prod(open_image(path).shape)
    except InputError:
        return 0


def log_line(row: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """A scan's line of log.txt: status, scan, seconds in all and of each stage, quality, messages."""
    parts = [f"{row['status']} {row['scan']} {row['seconds']:.1f} s"]
    if row["status"] == "ok" and record is not None:
        stages = {name: seconds for name, seconds in record["Seconds"].items() if name != "total"}
        parts.append("(" + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()) + ")")
    if row["quality"] is not None:
        parts.append(f"quality {row['quality']:.3f}")
    return " ".join([*parts, " ".join(str(row["message"]).split())]).rstrip()


def output_places(found: Sequence[Found], out: Path, others: Sequence[str | Path] = ()) -> list[tuple[Path, str]]:
    """Folder and stem of each scan's outputs; InputError where two collide or an output would replace an input.

    others: inputs that are no scans.
    """
    check_output_apart(found, out, others)
    places = [output_location(file.path, file.base, file.contrasts) for file in found]
    seen: dict[tuple[Path, str], Path] = {}
    inputs = {path.resolve() for file in found for path in file.paths}
    for file, place in zip(found, places, strict=True):
        if place in seen:
            raise InputError(
                f"{file.path} and {seen[place]}: both would be written to {place[0] / place[1]}; give one at a time"
            )
        if (out / place[0] / f"{place[1]}_dseg.nii.gz").resolve() in inputs:
            raise InputError(f"{file.path}: the output would replace an input; choose another --out")
        seen[place] = file.path
    return places
