"""What the folder of results as a whole holds: description, README, label table, volume tables, log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_seg.data.folders import DESCRIPTION
from ppl_seg.errors import InputError
from ppl_seg.files import cannot_write, make_folder, write_text
from ppl_seg.results.staging import LOG, locked
from ppl_seg.results.tables import read_table, table_text
from ppl_seg.results.volumes import COLUMNS, wide_rows

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable

TABLE = "seg-ppl_dseg.tsv"
LUT = "seg-ppl_dseg_lut.txt"
VOLUMES, WIDE = "volumes.tsv", "volumes_wide.tsv"
BIDS_VERSION = "1.10.0"
IGNORED = (
    "*_entropy.nii.gz", "*_draws.nii.gz", "*_posterior.nc", "*_qc.png", "*_align.png", "*_xfm.tfm",
    "volumes.tsv", "volumes_wide.tsv", "seg-ppl_dseg_lut.txt", "log.txt", ".tmp-*",
)  # fmt: skip
README = """\
Segmentations by ppl_seg, in the scans' own voxels.

*_dseg.nii.gz, .json     label map and where it comes from; index, name and colour in seg-ppl_dseg.tsv,
                         and for FreeView (FreeSurfer's form) in seg-ppl_dseg_lut.txt
*_entropy.nii.gz         entropy of the label marginals, nats: where the labels are uncertain
*_probseg.nii.gz, .json  label marginals (with --probabilities), in the order of LabelMap
*_draws.nii.gz           whole segmentations drawn from the posterior (with --save-draws), fourth axis
*_posterior.nc           draws of the latent shape and the volumes, for ArviZ
*_qc.png                 scan, segmentation and entropy side by side: look at it
*_align.png, *_xfm.tfm   how the scan was brought to the prior: picture, transform (SimpleITK reads it)
volumes.tsv              mm3 for each scan and structure; q05, q50, q95 are quantiles of the draws.
                         The intensity parameters are point estimates: their share is missing there.
volumes_wide.tsv         one row a scan, with brain volume and the size relative to the prior
log.txt                  what was run, on what, for how long
"""


def write_dataset_files(out_dir: str | Path, sources: Sequence[str | Path], version: str) -> None:
    """Write dataset_description.json, README and .bidsignore; what is there of ours is kept and completed.

    Args:
        sources: root folders of the source datasets.
        version: of ppl_seg.

    Raises:
        InputError: the folder is another dataset's, or cannot be written.
    """
    with locked(out_dir):
        _write_dataset_files(Path(out_dir), sources, version)


def _write_dataset_files(out_dir: Path, sources: Sequence[str | Path], version: str) -> None:
    path = out_dir / DESCRIPTION
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
    """Write the folder's label table (index, name, color), and the same as FreeSurfer's colour table for viewers.

    Raises:
        InputError: the folder holds segmentations with another table.
    """
    with locked(out_dir):
        path = Path(out_dir) / TABLE
        if path.exists():
            there = [(row["index"], row["name"]) for row in read_table(path, ("index", "name"))]
            if there != [(str(entry.index), entry.name) for entry in table.entries]:
                raise InputError(f"{path}: this folder holds segmentations with other labels; choose another --out")
        else:
            write_text(path, table.to_tsv())
        if not path.with_name(LUT).exists():
            write_text(path.with_name(LUT), lut_text(table))


def lut_text(table: LabelTable) -> str:
    """The table as FreeSurfer's colour table: number, name without blanks, red, green, blue, alpha."""
    lines = [f"{e.index:<6} {'-'.join(e.name.split()):<40} {' '.join(map(str, e.color))} 0" for e in table.entries]
    return "\n".join(["#No.   Label Name:                              R G B A", *lines]) + "\n"


def merged_volumes(out_dir: str | Path, rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, Any]) -> dict[str, str]:
    """Text of volumes.tsv and volumes_wide.tsv, the scans of `rows` (`volume_rows`) and their `head_size` anew."""
    path = Path(out_dir) / VOLUMES
    rows = list(rows)
    scans = {str(row["scan"]) for row in rows}
    there = read_table(path, COLUMNS) if path.exists() else []
    kept: list[Mapping[str, Any]] = [row for row in there if row["scan"] not in scans]
    merged = sorted([*kept, *rows], key=lambda row: str(row["scan"]))  # stable: structures keep their order
    wide = path.with_name(WIDE)
    known = {row["scan"]: row for row in (read_table(wide, ("scan",)) if wide.exists() else [])}
    known |= {scan: dict(sizes) for scan in scans}
    return {VOLUMES: table_text(merged, COLUMNS), WIDE: table_text(wide_rows(merged, known))}


def listed_scans(out_dir: str | Path) -> set[str]:
    """The scans of which both tables of volumes hold rows."""
    paths = [Path(out_dir) / VOLUMES, Path(out_dir) / WIDE]
    if not all(path.exists() for path in paths):
        return set()
    one, other = ({str(row["scan"]) for row in read_table(path, ("scan",))} for path in paths)
    return one & other


def append_log(out_dir: str | Path, text: str) -> None:
    """Append `text` to log.txt, each line with the time (UTC)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = Path(out_dir) / LOG
    try:
        make_folder(out_dir)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # paths may hold any bytes
            file.write("".join(f"{now} {line}\n" for line in text.splitlines()))
    except OSError as error:
        raise cannot_write(path, error) from error


def check_room(out_dir: str | Path, voxels: int, volumes: int) -> None:
    """Refuse before the work what would not fit: `volumes` (labels kept, draws kept) of a byte for each of `voxels`.

    Raises:
        InputError: less free than the uncompressed size.
    """
    needed = volumes * voxels
    folder = Path(out_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{out_dir}: {volumes} volumes of {voxels} voxels in all need up to {needed / 1e9:.1f} GB, "
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
