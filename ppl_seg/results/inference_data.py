"""The draws as an ArviZ object: posterior (z, volume), observed data, statistics of the draws.

ArviZ 0.2x gives an InferenceData, ArviZ 1.x an xarray DataTree; groups, names and attributes are the same.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppl_seg.files import write_bytes

if TYPE_CHECKING:
    from ppl_seg.results.segmentation import Segmentation

AXES = ("i", "j", "k")  # voxels of the prior's grid; "z" is the latent shape


def to_arviz(segmentation: Segmentation) -> Any:
    """ArviZ object with named dimensions and coordinates.

    posterior: z (chain 1, draw S, latent D), volume (chain, draw, structure), mm³, background excluded;
    observed_data: scan (channel, *grid) normalised on the prior's grid, observed (1 or C, *grid);
    sample_stats: one (chain, draw) variable for each of the segmentation's. The attributes of every group
    state the version, the model and the files. Intervals are not stored: state probability and kind where you
    compute one (the defaults of ArviZ 0.2x and 1.x differ).
    """
    seg = segmentation
    axes = AXES[: seg.observed_scan.ndim - 1]
    channels = [f"channel-{c + 1}" for c in range(len(seg.observed_scan))]
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {
            "z": np.asarray(seg.z_draws)[None],
            "volume": np.asarray(seg.volume_draws)[None, :, 1:],
        },
        "observed_data": {"scan": np.asarray(seg.observed_scan), "observed": np.asarray(seg.observed, bool)},
    }
    if seg.sample_stats:
        groups["sample_stats"] = {name: np.asarray(value)[None] for name, value in seg.sample_stats.items()}
    dims = {
        "z": ["latent"],
        "volume": ["structure"],
        "scan": ["channel", *axes],
        "observed": ["channel" if len(seg.observed) == len(channels) else "mask", *axes],
    }
    coords = {
        "latent": np.arange(seg.z_draws.shape[1]),
        "structure": list(seg.table.names[1:]),
        "channel": channels,
    }
    data = _from_dict(groups, dims, coords)
    for group in groups:
        data[group].attrs.pop("created_at", None)  # the same segmentation is the same file
        data[group].attrs.update(_attributes(seg))
    return data


def write_posterior(segmentation: Segmentation, path: str | Path) -> None:
    """Write `to_arviz(segmentation)` to the netCDF file `path`, whole or not at all."""
    import xarray

    data = to_arviz(segmentation)
    if not isinstance(data, xarray.DataTree):  # InferenceData
        data = xarray.DataTree.from_dict({name: data[name] for name in data.groups()})
    encoding = {f"/{name}": {key: {"zlib": True} for key in node.data_vars} for name, node in data.children.items()}
    content = data.to_netcdf(engine="h5netcdf", encoding=encoding)  # in memory: HDF5 crashes where the disk is full
    write_bytes(path, bytes(content))


def _attributes(seg: Segmentation) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "inference_library": "ppl_seg",
        "inference_library_version": str(seg.provenance.get("version", "")),
        "model_hash": str(seg.provenance.get("model_hash", "")),
        "sources": [str(source) for source in seg.provenance.get("sources", [])],
        "volume_unit": "mm3",
    }
    if (strength := seg.provenance.get("deformation_strength")) is not None:
        stated["deformation_strength"] = float(strength)  # what z is multiplied with, beside the prior
    return {**stated, **{f"bound_{name}": float(value) for name, value in seg.bound.items()}}


def _from_dict(groups: dict[str, dict[str, np.ndarray]], dims: dict[str, Any], coords: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its successor at every import
        import arviz
    if int(arviz.__version__.split(".")[0]) >= 1:
        # the sample dimensions are stated: the default is a setting that a user may have changed
        return arviz.from_dict(groups, dims=dims, coords=coords, sample_dims=["chain", "draw"])
    return arviz.from_dict(**groups, dims=dims, coords=coords)
