"""The files of one segmentation. The JSON sidecar is written last: where it is, the rest is complete."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from ppl_seg.data.folders import DESCRIPTION
from ppl_seg.data.images import write_image, write_probabilities
from ppl_seg.data.names import parse_name
from ppl_seg.files import file_sha256, remove, replacing, write_text
from ppl_seg.results.dataset import merged_volumes, write_label_table
from ppl_seg.results.provenance import Stopwatch, command_line, machine
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.staging import locked, staging
from ppl_seg.results.volumes import head_size, mean_quality, volume_rows

Location = tuple[Path, str]  # folder below the output folder, and stem: ppl_seg.data.names.output_location


def write_segmentation(
    segmentation: Segmentation,
    out_dir: str | Path,
    location: Location,
    probabilities: bool = False,
    save_draws: bool = False,
) -> list[Path]:
    """Write STEM_dseg.nii.gz and .json, _entropy, _posterior.nc, _qc.png, the label table, rows of volumes.

    Where the segmentation says how the scan was aligned, also STEM_align.png and the transform.

    All files are complete, in a temporary folder, before the first one gets its name: until then an earlier
    result stays as it is. Several processes may write into one `out_dir`.

    Args:
        probabilities: also STEM_probseg.nii.gz and .json.
        save_draws: also STEM_draws.nii.gz.

    Returns:
        The files, the sidecar last.

    Raises:
        InputError: another label table in the folder, or a folder that cannot be written.
        ValueError: probabilities or draws asked for that the segmentation does not hold.
    """
    seg, folder, watch = segmentation, Path(out_dir) / location[0], Stopwatch()
    if save_draws and seg.draws is None:
        raise ValueError("draws asked for, but the segmentation holds none")
    if probabilities and seg.probabilities is None:
        raise ValueError("probabilities asked for, but the segmentation holds none")
    write_label_table(out_dir, seg.table)
    rows = volume_rows(seg, scan_name(location, seg.provenance.get("sources", [seg.image.path])))
    with staging(out_dir, folder) as stage:
        _write_files(seg, stage, location[1], probabilities, save_draws)
        names = sorted(path.name for path in stage.glob(f"{glob.escape(location[1])}_*"))
        with locked(out_dir), ExitStack() as stack:
            # what is left to write is written, then names are given: images, tables, the sidecar last
            earlier, sidecar = recorded(out_dir, location) or {}, sidecar_path(out_dir, location)
            last = stack.enter_context(replacing(sidecar))
            for name, text in merged_volumes(out_dir, rows, head_size(seg)).items():
                stack.enter_context(replacing(Path(out_dir) / name)).write_text(text, encoding="utf-8")
            watch.lap("write")
            last.write_text(json.dumps(_sidecar(seg, names, watch), indent=2, default=str) + "\n", encoding="utf-8")
            remove(sidecar)  # incomplete from here on
            for name in names:
                os.replace(stage / name, folder / name)
            for stale in set(earlier.get("Files", [])) - set(names):  # of an earlier run with other options
                remove(folder / Path(stale).name)
    return [*(folder / name for name in names), sidecar]


def _write_files(seg: Segmentation, folder: Path, stem: str, probabilities: bool, save_draws: bool) -> None:
    """All files of one scan but the sidecar."""
    from ppl_seg.data.registration import write_transform
    from ppl_seg.results.alignment_figure import alignment_figure
    from ppl_seg.results.figures import qc_figure
    from ppl_seg.results.inference_data import write_posterior

    start = folder / stem
    write_image(f"{start}_dseg.nii.gz", seg.label_map, like=seg.image)
    write_image(f"{start}_entropy.nii.gz", seg.entropy, like=seg.image)
    if save_draws and seg.draws is not None:
        write_image(f"{start}_draws.nii.gz", seg.draws, like=seg.image)
    if probabilities and seg.probabilities is not None:
        write_probabilities(f"{start}_probseg.nii.gz", seg.probabilities, like=seg.image)
        about = {"Description": "Label marginals", "SpatialReference": "orig", "LabelMap": list(seg.table.names)}
        write_text(f"{start}_probseg.json", json.dumps(about, indent=2) + "\n")
    write_posterior(seg, f"{start}_posterior.nc")
    qc_figure(seg, f"{start}_qc.png")
    if seg.alignment is not None:
        channel = parse_name(seg.image.path).suffix or "scan"
        write_transform(f"{start}_from-{channel}_to-prior_mode-image_xfm.tfm", seg.alignment.world)
        alignment_figure(seg, f"{start}_align.png")


def scan_name(location: Location, sources: Sequence[str | Path]) -> str:
    """What tables call a scan: its folder and file, of several channels all of their names."""
    return (location[0] / "+".join(Path(source).name for source in sources)).as_posix()


def recorded(out_dir: str | Path, location: Location) -> dict[str, Any] | None:
    """The sidecar of a finished segmentation; None where there is none (or no readable one)."""
    try:
        content = json.loads(sidecar_path(out_dir, location).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def earlier_result(
    out_dir: str | Path,
    location: Location,
    options: Mapping[str, Any],
    model_hash: str,
    sources: Sequence[str | Path],
    listed: Collection[str],
    endings: Sequence[str] = (),
) -> Literal["absent", "other", "partial", "complete"]:
    """What is there of the segmentation of `sources` with these options (the provenance's) and this model.

    other: of other files, options or model, or not ours. partial: the same, but files are missing, its rows are not
    `listed` (`listed_scans`), or one of `endings` (probseg.nii.gz) was not asked for then.
    """
    content = recorded(out_dir, location)
    if content is None:
        there = (Path(out_dir) / location[0] / f"{location[1]}_dseg.nii.gz").exists()
        ours = (Path(out_dir) / DESCRIPTION).exists()  # then a killed run left it
        return "other" if there and not ours else "absent"
    if content.get("Options") != _plain(options) or content.get("ModelHash") != model_hash:
        return "other"
    try:
        if content.get("SourceHashes") != [file_sha256(source) for source in sources]:
            return "other"
    except OSError:  # to be reported when it is read
        return "partial"
    names = [*map(str, content.get("Files", [])), *(f"{location[1]}_{ending}" for ending in endings)]
    there = all((Path(out_dir) / location[0] / name).is_file() for name in names)
    return "complete" if there and scan_name(location, sources) in listed else "partial"


def sidecar_path(out_dir: str | Path, location: Location) -> Path:
    """STEM_dseg.json."""
    return Path(out_dir) / location[0] / f"{location[1]}_dseg.json"


def _sidecar(seg: Segmentation, files: list[str], watch: Stopwatch) -> dict[str, Any]:
    origin = seg.provenance
    sources = origin.get("sources", [seg.image.path])
    seconds = {**origin.get("seconds", {}), **watch.seconds}
    return {
        "Description": "Most probable labels of the voxels",
        "SpatialReference": "orig",
        "Sources": [str(source) for source in sources],
        "SourceHashes": [file_sha256(source) for source in sources],
        "GeneratedBy": [{"Name": "ppl_seg", "Version": origin.get("version")}],
        "Command": command_line(),
        "Machine": machine(origin.get("device", "cpu")),
        "Seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "ModelHash": origin.get("model_hash"),
        "Seed": origin.get("seed"),
        "Options": _plain(origin.get("options", {})),
        "Quality": mean_quality(seg),
        "Bound": {name: float(value) for name, value in seg.bound.items()},
        "BiasFieldCorrection": origin.get("bias_field"),
        "DeformationStrength": origin.get("deformation_strength"),
        "Draws": len(seg.volume_draws),
        "Warnings": list(seg.image.warnings),
        "Files": files,
    }


def _plain(options: Mapping[str, Any]) -> Any:
    """Options as JSON gives them back: tuples are lists, paths are text."""
    return json.loads(json.dumps(dict(options), default=str))
