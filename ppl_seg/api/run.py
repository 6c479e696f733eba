"""Many scans, one after another: outputs skipped where complete, bad scans reported, the others finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_seg import __version__
from ppl_seg.api.model import Model, load_model
from ppl_seg.api.output import LOGGER, say
from ppl_seg.data.cohort import Found, find_scans
from ppl_seg.data.grids import check_alignment
from ppl_seg.data.images import read_scan
from ppl_seg.data.masks import masks_of
from ppl_seg.data.names import output_location
from ppl_seg.errors import InputError
from ppl_seg.inference.trainer import resolve_device


@dataclass
class RunReport:
    """rows: scan, status (ok, skipped, failed), seconds, message."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where a scan failed, else 0."""
        return int(any(row["status"] == "failed" for row in self.rows))


def segment_scans(
    scans: Sequence[str | Path],
    *,
    model: Model | str | Path,
    out: str | Path,
    suffix: str | None = None,
    mask: str | Path = "auto",
    channels: Sequence[str] = (),
    draws: int = 200,
    refine: int | None = None,
    probabilities: bool = False,
    save_draws: bool = False,
    readout: str | None = None,
    objective: str | None = None,
    guide: str | None = None,
    likelihood_power: float | None = None,
    align: str | None = None,
    recipe: str | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    progress: bool = False,
) -> RunReport:
    """Segment scans into a folder; arguments as `Model.segment`.

    Outputs of the same inputs, model and options are skipped; different ones are an error without force. A scan that
    fails is reported and the others finish.

    Raises:
        InputError: nothing to do, options that don't fit, colliding outputs: before any work.
    """
    from ppl_seg.inference.progress import scan_bar
    from ppl_seg.results.dataset import append_log, check_room, write_dataset_files
    from ppl_seg.results.writer import is_complete, recorded, write_segmentation

    loaded = model if isinstance(model, Model) else load_model(model)
    check_alignment(align or loaded.align)
    resolve_device(device)
    found = find_scans([str(given) for given in scans], suffix, channels)
    out = Path(out)
    places = output_places(found, out, channels)
    fixed: dict[str, Any] = {"draws": draws, "refine": refine, "mask": mask, "readout": readout, "objective": objective}
    fixed |= {"guide": guide, "likelihood_power": likelihood_power, "align": align, "recipe": recipe, "seed": seed}
    chosen = loaded.checked_recipe(recipe, objective, guide, readout, likelihood_power)
    expected = loaded.options(chosen, draws=draws, refine=refine, mask=mask, align=align, seed=seed)
    there = [place for place in places if recorded(out, place) is not None]
    done = {place for place in there if is_complete(out, place, expected, loaded.hash)}
    if len(done) < len(there) and not force:
        other = next(place for place in there if place not in done)
        raise InputError(
            f"{out / other[0] / other[1]}_dseg.nii.gz: made with another model or other options; "
            "choose another --out, or --force"
        )
    masks = masks_of([file.path for file in found], mask)
    if probabilities or save_draws:
        volumes = probabilities * len(loaded.table) + save_draws * draws
        check_room(out, read_scan(found[0].path).shape, volumes * len(found))
    write_dataset_files(out, sorted({str(file.base or file.path.parent) for file in found}), __version__)
    append_log(out, f"ppl_seg {__version__}: {len(found)} scans, options {expected}")
    report = RunReport()
    for file, place, own_mask in scan_bar(list(zip(found, places, masks, strict=True)), progress):
        began = time.monotonic()
        row: dict[str, Any] = {"scan": str(file.path), "status": "ok", "seconds": 0.0, "message": ""}
        if place in done and not force:
            row["status"] = "skipped"
        else:
            try:
                result = loaded.segment(
                    file.paths,
                    **{**fixed, "mask": own_mask},
                    keep_probabilities=probabilities,
                    keep_draws=save_draws,
                    device=device,
                )
                write_segmentation(result, out, place, probabilities, save_draws)
                row["message"] = "; ".join(result.image.warnings)
            except InputError as error:
                row |= {"status": "failed", "message": str(error)}
            except (RuntimeError, MemoryError, ArithmeticError) as error:  # one bad scan must not end the run
                LOGGER.debug("%s", file.path, exc_info=True)
                row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
        row["seconds"] = time.monotonic() - began
        append_log(out, f"{row['status']} {row['scan']} {row['seconds']:.1f} s {row['message']}".rstrip())
        report.rows.append(row)
    counts = Counter(row["status"] for row in report.rows)
    say([f"{', '.join(f'{count} {status}' for status, count in counts.items())}: {out}"])
    return report


def output_places(found: Sequence[Found], out: Path, channels: Sequence[str]) -> list[tuple[Path, str]]:
    """Folder and stem of each scan's outputs; InputError where two collide or an output would replace an input."""
    places = [output_location(file.path, file.base, channels if len(file.paths) > 1 else ()) for file in found]
    seen: dict[tuple[Path, str], Path] = {}
    inputs = {path.resolve() for file in found for path in file.paths}
    folders = {path.parent for path in inputs}
    if out.resolve() in folders:
        raise InputError(f"{out}: the output folder is a folder of inputs; choose another --out")
    for file, place in zip(found, places, strict=True):
        if place in seen:
            raise InputError(
                f"{file.path} and {seen[place]}: both would be written to {place[0] / place[1]}; give one at a time"
            )
        if (out / place[0] / f"{place[1]}_dseg.nii.gz").resolve() in inputs:
            raise InputError(f"{file.path}: the output would replace an input; choose another --out")
        seen[place] = file.path
    return places
