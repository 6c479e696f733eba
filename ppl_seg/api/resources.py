"""How much memory a command takes and how much is free: estimates before the work, and what follows when they fail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ppl_seg.api.model import Model
from ppl_seg.api.output import LOGGER
from ppl_seg.errors import InputError
from ppl_seg.inference.networks import WARP
from ppl_seg.inference.recipes import Recipe
from ppl_seg.results.readout import SKETCHES, SLAB

SHARES = (1.0, 1 / 4, 1 / 16)  # of the read-out's usual working memory: what is tried in turn
# Measured peaks, rounded up (3 to 33 labels, grids of 8 k to 860 k voxels), in bytes.
_LIBRARIES = 0.6e9
_PER_LABEL_AND_GRID_VOXEL = 55  # inference of z
_PER_VOXEL = 80  # a scan in its own voxels with its masks, label map, entropy
_PER_CHANNEL_AND_VOXEL = 24
# A label and voxel of the grid, whatever the number of label maps; of a large grid a step takes a lattice.
_WARP_LEARNS, _DECODER_LEARNS, _DECODER_LEARNS_MORE, _LARGE = 55, 200, 62, 7e6
_IN_TRAINING = 28  # of each scan of a batch, label and voxel of the grid
_PER_SCAN_KEPT = 30  # of each scan, channel and voxel of the grid
_PER_TARGET = 4  # of each scan, label and voxel of the grid: float16, twice while they are joined
_PER_MAP_VOXEL = 36  # of label maps
_OF_LABEL_STEPS = 2e9  # a patch, its simulation and the network
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "bad_alloc", "out of memory")


def segment_memory(
    model: Model, voxels: int, channels: int, draws: int, probabilities: bool, save_draws: bool, share: float
) -> float:
    """Bytes that segmenting a scan of so many voxels takes, at a share of the read-out's usual working memory."""
    labels, grid = len(model.table), math.prod(model.grid.shape)
    infer = _PER_LABEL_AND_GRID_VOXEL * labels * grid
    slab = 4.0 * min(share * SLAB, labels * voxels)
    sketches = 12.0 * min(share * SKETCHES, draws * labels * grid)
    kept = voxels * (9.0 * labels * probabilities + 4.0 * draws * save_draws)
    own = voxels * (_PER_VOXEL + _PER_CHANNEL_AND_VOXEL * channels)
    return _LIBRARIES + own + max(infer, slab + sketches + kept)


def prior_memory(voxels: int, label_steps: int) -> float:
    """Bytes that reading label maps of so many voxels in all, and bringing them together, takes; or learning q(s|x)."""
    return _LIBRARIES + max(_PER_MAP_VOXEL * voxels, _OF_LABEL_STEPS if label_steps else 0)


def learning_memory(shape: str, labels: int, grid: Sequence[int]) -> float:
    """Bytes that learning a shape prior takes, a warped atlas or a decoder."""
    numbers = labels * math.prod(grid)
    if shape == WARP:
        return _LIBRARIES + _WARP_LEARNS * numbers
    return _LIBRARIES + _DECODER_LEARNS * min(numbers, _LARGE) + _DECODER_LEARNS_MORE * max(0, numbers - _LARGE)


def fit_memory(model: Model, recipe: Recipe, scans: int, channels: int) -> float:
    """Bytes that fitting to a number of scans takes."""
    labels, grid = len(model.table), math.prod(model.grid.shape)
    batch = min(scans, recipe.batch_size)
    targets = _PER_TARGET * scans * labels if recipe.label_rounds else 0
    return _LIBRARIES + grid * (_IN_TRAINING * batch * labels + _PER_SCAN_KEPT * scans * channels + targets)


def available_memory(device: torch.device) -> float:
    """Bytes that are free: of a GPU, else of the machine and this process' control group (Linux); inf: unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        below = Path("/sys/fs/cgroup") / group.lstrip("/")
        limits += [_left_in(folder) for folder in (below, *below.parents) if (folder / "memory.max").is_file()]
    except (OSError, StopIteration, ValueError, IndexError):
        pass  # another system, or one that does not tell
    return min(limits)


def _left_in(group: Path) -> float:
    """Bytes that a control group may still take; caches count as free."""
    most = (group / "memory.max").read_text().strip()
    if most == "max":
        return math.inf
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return float(int(most) - int((group / "memory.current").read_text()) + int(stat.get("inactive_file", 0)))


def check_memory(what: str, needed: float, free: float, way_out: str) -> None:
    """Say (with --verbose) what is needed.

    Raises:
        InputError: more than is free.
    """
    LOGGER.debug("%s: about %.1f GB of memory needed, %.1f GB free", what, needed / 1e9, free / 1e9)
    if needed > free:
        raise InputError(
            f"{what}: about {needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are free; {way_out}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the machine or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(what: str, needed: float, way_out: str) -> Iterator[None]:
    """An InputError with the number where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{what}: out of memory; about {needed / 1e9:.1f} GB are needed; {way_out}") from error
