from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray

from ppl_seg.results.inference_data import to_arviz, write_posterior


def from_dict_of_arviz_1(data: dict[str, Any], *, sample_dims: list[str], coords: Any, dims: Any) -> xarray.DataTree:
    """The part of ArviZ 1.x' from_dict that is used (arviz_base.io_dict), on xarray alone."""
    groups = {}
    for group, variables in data.items():
        leading = [] if "data" in group else sample_dims
        arrays = {name: ([*leading, *dims.get(name, [])], value) for name, value in variables.items()}
        used = {dim for names, _ in arrays.values() for dim in names}
        known = {name: values for name, values in coords.items() if name in used}
        groups[group] = xarray.Dataset(arrays, coords=known)
    return xarray.DataTree.from_dict(groups)


@pytest.fixture(params=["installed", "1.x"])
def arviz_version(request, monkeypatch) -> str:
    if request.param == "1.x":
        module = SimpleNamespace(__version__="1.0.0", from_dict=from_dict_of_arviz_1)
        monkeypatch.setitem(sys.modules, "arviz", module)
    return request.param


@pytest.mark.parametrize("channels", [1, 2])
def test_groups_dimensions_and_attributes(make_segmentation, arviz_version, channels: int):
    seg = make_segmentation(channels=channels)
    data = to_arviz(seg)
    z, volume = data["posterior"]["z"], data["posterior"]["volume"]
    assert z.dims == ("chain", "draw", "latent") and z.shape == (1, 5, 4)
    assert volume.dims == ("chain", "draw", "structure")
    assert volume.coords["structure"].values.tolist() == ["Left-Hippocampus", "Right-Hippocampus"]
    assert volume.sel(structure="Left-Hippocampus").values == pytest.approx(seg.volume_draws[None, :, 1])
    scan = data["observed_data"]["scan"]
    assert scan.dims == ("channel", "i", "j", "k") and scan.shape == (channels, 5, 6, 3)
    assert data["observed_data"]["observed"].dims[0] == ("channel" if channels == 1 else "mask")
    assert data["sample_stats"]["log_weight"].dims == ("chain", "draw")
    attributes = data["posterior"].attrs
    assert attributes["inference_library_version"] == "0.1.0" and attributes["model_hash"] == "abc"
    assert attributes["bound_kl"] == 0.5


def test_the_file_gives_back_the_draws(make_segmentation, arviz_version, tmp_path):
    seg = make_segmentation()
    path = tmp_path / "deep" / "er" / "x_posterior.nc"
    write_posterior(seg, path)
    assert [file.name for file in path.parent.iterdir()] == ["x_posterior.nc"]
    with xarray.open_dataset(path, group="posterior", engine="h5netcdf") as posterior:
        assert np.array_equal(posterior["z"].values[0], seg.z_draws)
        assert posterior.attrs["inference_library"] == "ppl_seg"
    with xarray.open_dataset(path, group="observed_data", engine="h5netcdf") as observed:
        assert np.array_equal(observed["scan"].values, seg.observed_scan)
        assert observed["observed"].dtype == bool


def test_two_dimensional_grid_without_statistics(make_segmentation, arviz_version):
    grid = {"observed_scan": np.zeros((1, 5, 6), np.float32), "observed": np.ones((1, 5, 6), bool)}
    data = make_segmentation(sample_stats={}, **grid).to_arviz()
    assert data["observed_data"]["scan"].dims == ("channel", "i", "j")
