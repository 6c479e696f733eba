"""The files of one segmentation. The JSON sidecar is written last: where it is, the rest is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppl_seg.data.images import write_image, write_probabilities
from ppl_seg.results.atomic import remove, write_text
from ppl_seg.results.dataset import merge_volumes, write_label_table
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.volumes import volume_rows

Location = tuple[Path, str]  # folder below the output folder, and stem: ppl_seg.data.names.output_location


def write_segmentation(
    segmentation: Segmentation,
    out_dir: str | Path,
    location: Location,
    probabilities: bool = False,
    save_draws: bool = False,
) -> list[Path]:
    """Write STEM_dseg.nii.gz and .json, _entropy, _posterior.nc, _qc.png, the label table, rows of volumes.

    Args:
        probabilities: also STEM_probseg.nii.gz and .json.
        save_draws: also STEM_draws.nii.gz.

    Returns:
        The files, the sidecar last.

    Raises:
        InputError: another label table in the folder, or a folder that cannot be written.
        ValueError: probabilities or draws asked for that the segmentation does not hold.
    """
    from ppl_seg.results.figures import qc_figure
    from ppl_seg.results.inference_data import write_posterior

    seg, folder, stem = segmentation, Path(out_dir) / location[0], location[1]
    images = {"dseg": seg.label_map, "entropy": seg.entropy}
    if save_draws:
        if seg.draws is None:
            raise ValueError("draws asked for, but the segmentation holds none")
        images["draws"] = seg.draws
    if probabilities and seg.probabilities is None:
        raise ValueError("probabilities asked for, but the segmentation holds none")
    write_label_table(out_dir, seg.table)
    earlier = recorded(out_dir, location) or {}
    remove(sidecar_path(out_dir, location))  # incomplete from here on

    files = []
    for name, data in images.items():
        files.append(folder / f"{stem}_{name}.nii.gz")
        write_image(files[-1], data, like=seg.image)
    if seg.probabilities is not None and probabilities:
        files.append(folder / f"{stem}_probseg.nii.gz")
        write_probabilities(files[-1], seg.probabilities, like=seg.image)
        files.append(folder / f"{stem}_probseg.json")
        write_text(files[-1], json.dumps({"LabelMap": list(seg.table.names)}, indent=2) + "\n")
    files.append(folder / f"{stem}_posterior.nc")
    write_posterior(seg, files[-1])
    files.append(folder / f"{stem}_qc.png")
    qc_figure(seg, files[-1])
    names = [file.name for file in files]
    for stale in set(earlier.get("Files", [])) - set(names):  # of an earlier run with other options
        remove(folder / Path(stale).name)

    merge_volumes(out_dir, volume_rows(seg, (location[0] / Path(seg.image.path).name).as_posix()))
    files.append(sidecar_path(out_dir, location))
    write_text(files[-1], json.dumps(_sidecar(seg, names), indent=2, default=str) + "\n")
    return files


def recorded(out_dir: str | Path, location: Location) -> dict[str, Any] | None:
    """The sidecar of a finished segmentation; None where there is none (or no readable one)."""
    try:
        content = json.loads(sidecar_path(out_dir, location).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_complete(
    out_dir: str | Path, location: Location, options: Mapping[str, Any], model_hash: str | None = None
) -> bool:
    """Whether all files are there, from these options (the provenance's) and, where given, this model.

    `recorded(...)` is not None while this is False: results of other options, or with files missing.
    """
    content = recorded(out_dir, location)
    if content is None or content.get("Options") != _plain(options):
        return False
    if model_hash is not None and content.get("ModelHash") != model_hash:
        return False
    files = content.get("Files", [])
    return all((Path(out_dir) / location[0] / str(name)).is_file() for name in files)


def sidecar_path(out_dir: str | Path, location: Location) -> Path:
    """STEM_dseg.json."""
    return Path(out_dir) / location[0] / f"{location[1]}_dseg.json"


def _sidecar(seg: Segmentation, files: list[str]) -> dict[str, Any]:
    origin = seg.provenance
    return {
        "Sources": [str(source) for source in origin.get("sources", [seg.image.path])],
        "GeneratedBy": [{"Name": "ppl_seg", "Version": origin.get("version")}],
        "ModelHash": origin.get("model_hash"),
        "Seed": origin.get("seed"),
        "Options": _plain(origin.get("options", {})),
        "Seconds": origin.get("seconds"),
        "Bound": {name: float(value) for name, value in seg.bound.items()},
        "Draws": len(seg.volume_draws),
        "Warnings": list(seg.image.warnings),
        "Files": files,
    }


def _plain(options: Mapping[str, Any]) -> Any:
    """Options as JSON gives them back: tuples are lists, paths are text."""
    return json.loads(json.dumps(dict(options), default=str))
