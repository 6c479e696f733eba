"""What the folder of results as a whole holds: description, README, label table, volume tables, log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_seg.errors import InputError
from ppl_seg.results.atomic import write_text
from ppl_seg.results.tables import read_table, write_table
from ppl_seg.results.volumes import COLUMNS, wide_rows

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable

TABLE = "seg-ppl_dseg.tsv"
BIDS_VERSION = "1.10.0"
IGNORED = (
    "*_entropy.nii.gz", "*_draws.nii.gz", "*_posterior.nc", "*_qc.png", "*_align.png", "*_xfm.tfm",
    "volumes.tsv", "volumes_wide.tsv", "log.txt",
)  # fmt: skip
README = """\
Segmentations by ppl_seg, in the scans' own voxels.

*_dseg.nii.gz, .json     label map and where it comes from; index, name and colour in seg-ppl_dseg.tsv
*_entropy.nii.gz         entropy of the label marginals, nats: where the labels are uncertain
*_probseg.nii.gz, .json  label marginals (with --probabilities), in the order of LabelMap
*_draws.nii.gz           whole segmentations drawn from the posterior (with --save-draws), fourth axis
*_posterior.nc           draws of the latent shape and the volumes, for ArviZ
*_qc.png                 scan, segmentation and entropy side by side: look at it
volumes.tsv              mm3 for each scan and structure; q05, q50, q95 are quantiles of the draws.
                         The intensity parameters are point estimates: their share is missing there.
volumes_wide.tsv         one row a scan
log.txt                  what was run
"""


def write_dataset_files(out_dir: str | Path, sources: Sequence[str | Path], version: str) -> None:
    """Write dataset_description.json, README and .bidsignore; what is there of ours is kept and completed.

    Args:
        sources: root folders of the source datasets.
        version: of ppl_seg.

    Raises:
        InputError: the folder is another dataset's, or cannot be written.
    """
    out_dir = Path(out_dir)
    path = out_dir / "dataset_description.json"
    urls = list(dict.fromkeys([*_recorded_sources(path), *(Path(source).resolve().as_uri() for source in sources)]))
    description = {
        "Name": "ppl_seg segmentations",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "ppl_seg", "Version": version}],
        "SourceDatasets": [{"URL": url} for url in urls],
    }
    write_text(path, json.dumps(description, indent=2) + "\n")
    if not (out_dir / "README").exists():
        write_text(out_dir / "README", README)
    ignore = out_dir / ".bidsignore"
    there = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
    write_text(ignore, "\n".join(dict.fromkeys([*there, *IGNORED])) + "\n")


def write_label_table(out_dir: str | Path, table: LabelTable) -> None:
    """Write the folder's label table (index, name, color).

    Raises:
        InputError: the folder holds segmentations with another table.
    """
    path = Path(out_dir) / TABLE
    if not path.exists():
        write_text(path, table.to_tsv())
        return
    there = [(row["index"], row["name"]) for row in read_table(path, ("index", "name"))]
    if there != [(str(entry.index), entry.name) for entry in table.entries]:
        raise InputError(f"{path}: this folder holds segmentations with other labels; choose another --out")


def merge_volumes(out_dir: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put `rows` of `volume_rows` into volumes.tsv and volumes_wide.tsv, in place of the same scans' rows."""
    path = Path(out_dir) / "volumes.tsv"
    rows = list(rows)
    scans = {str(row["scan"]) for row in rows}
    there = read_table(path, COLUMNS) if path.exists() else []
    kept: list[Mapping[str, Any]] = [row for row in there if row["scan"] not in scans]
    merged = sorted([*kept, *rows], key=lambda row: str(row["scan"]))  # stable: structures keep their order
    write_table(path, merged, COLUMNS)
    write_table(path.with_name("volumes_wide.tsv"), wide_rows(merged))


def append_log(out_dir: str | Path, text: str) -> None:
    """Append `text` to log.txt, each line with the time (UTC)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = Path(out_dir) / "log.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{now} {line}\n" for line in text.splitlines())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def check_room(out_dir: str | Path, shape: Sequence[int], volumes: int) -> None:
    """Refuse before the work what would not fit: `volumes` (labels kept, draws kept) of a byte a voxel.

    Raises:
        InputError: less free than the uncompressed size.
    """
    needed = volumes
    for length in shape:
        needed *= int(length)
    folder = Path(out_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{out_dir}: {volumes} volumes of {tuple(shape)} voxels need up to {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; make room, or leave out --probabilities or --save-draws"
        )


def _recorded_sources(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
        makers = [maker.get("Name") for maker in description.get("GeneratedBy", [])]
        urls = [source["URL"] for source in description.get("SourceDatasets", []) if "URL" in source]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another --out") from error
    if "ppl_seg" not in makers:
        raise InputError(f"{path}: the folder is another dataset's, not one of ppl_seg's; choose another --out")
    return urls
