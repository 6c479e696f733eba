"""Other tools on the same scans and masks: rows of `benchmark_accuracy.py`.

They need packages that ppl_seg does not, best in an environment of the benchmark's own:
`pip install -e . antspyx dipy samseg`. Each gets the brain-extracted scan as it is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from ppl_seg.api.model import Model
from ppl_seg.data.images import read_scan
from ppl_seg.errors import InputError

PEERS = {
    "atropos": "ANTs Atropos with the location prior",
    "atropos-n4": "the same after N4",
    "samseg": "SAMSEG with its own atlas",
    "hmrf": "tissue classes, DIPY's HMRF",
}
TISSUES = {
    "grey matter": ("Cerebral-Cortex", "Cerebellum-Cortex", "Caudate", "Putamen", "Accumbens")
    + ("Hippocampus", "Amygdala"),
    "white matter": ("Cerebral-White-Matter", "Cerebellum-White-Matter"),
}  # fmt: skip
MIXED = ("Thalamus", "Pallidum", "VentralDC", "Brain-Stem")  # of both tissues: their voxels are not scored
GREY, WHITE = 3, 2  # labels that stand for a tissue: those of left cortex and white matter
PRIOR_WEIGHT, SMOOTHNESS, ITERATIONS = 0.25, "[0.2,1x1x1]", "[5,0]"  # of ANTsPy's example with priors
FEWEST = 50  # voxels where a label is the likeliest, or it is left out: ANTs fails where a label has none
Values = np.ndarray  # (X, Y, Z) integers, values of the label table


def segment_by_peer(peer: str, model: Model, scan: Path) -> Values:
    """A label map in the scan's own voxels.

    Args:
        model: whose location prior and registration the peers share that take a prior.

    Raises:
        InputError: the peer is not installed, or failed.
    """
    try:
        return _SEGMENT[peer](model, scan)
    except ImportError as error:
        package = {"samseg": "samseg", "hmrf": "dipy"}.get(peer, "antspyx")
        raise InputError(f"--rows {peer}: needs another package; pip install {package} ({error})") from error


def _atropos(model: Model, scan: Path) -> Values:
    return _by_ants(model, scan, corrected=False)


def _atropos_n4(model: Model, scan: Path) -> Values:
    return _by_ants(model, scan, corrected=True)


def _by_ants(model: Model, scan: Path, corrected: bool) -> Values:
    """One Gaussian a label, Markov random field, the location prior in our registration (Avants et al. 2011)."""
    import ants

    result = model.segment(scan, recipe="location", draws=1, keep_probabilities=True)
    assert result.probabilities is not None
    image = ants.image_read(str(scan))
    mask = ants.get_mask(image, low_thresh=np.finfo(np.float32).tiny, cleanup=0)
    if corrected:
        image = ants.n4_bias_field_correction(image, mask=mask)
    starts = np.bincount(result.probabilities.argmax(0)[mask.numpy() > 0], minlength=len(result.probabilities))
    kept = np.flatnonzero(starts >= FEWEST)
    priors = [image.new_image_like(result.probabilities[label].astype(np.float32)) for label in kept]
    options = {"priorweight": PRIOR_WEIGHT, "m": SMOOTHNESS, "c": ITERATIONS}
    found = ants.atropos(a=image, x=mask, i=priors, **options)["segmentation"].numpy()
    positions = np.maximum(np.rint(found).astype(np.int64) - 1, 0)  # from 1 within the mask, 0 around it
    return np.asarray(result.table.indices)[kept[positions]]


def _samseg(model: Model, scan: Path) -> Values:
    """Puonti et al., NeuroImage 2016, with its atlas of heads, on a scan without skull."""
    import samseg  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "run_samseg"), "--input", str(scan), "--output", folder]
        done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{scan}: SAMSEG ended with status {done.returncode}: {done.stderr[-500:]}")
        return np.asarray(nib.load(Path(folder) / "seg.mgz").dataobj).astype(np.int32)


def _hmrf(model: Model, scan: Path) -> Values:
    """Three classes and a Markov random field (Zhang et al., IEEE TMI 2001), dark to bright in T1w; GREY and WHITE."""
    from dipy.segment.tissue import TissueClassifierHMRF

    data = np.nan_to_num(read_scan(scan).data.astype(np.float64))
    _, tissues, _ = TissueClassifierHMRF().classify(data, 3, 0.1)
    if np.min(tissues) < 0:  # what it says where its variances vanish
        raise InputError(f"{scan}: DIPY's HMRF found no classes in it; leave --rows hmrf out")
    return np.select([np.asarray(tissues) == 2, np.asarray(tissues) == 3], [GREY, WHITE], 0).astype(np.int32)


_SEGMENT: dict[str, Callable[[Model, Path], Values]] = {
    "atropos": _atropos,
    "atropos-n4": _atropos_n4,
    "samseg": _samseg,
    "hmrf": _hmrf,
}
