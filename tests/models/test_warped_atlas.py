"""The warped atlas: it starts as the location prior, deforms it without folding, and says the same thing everywhere."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from ppl_seg.models.warped_atlas import WarpedAtlas, corners_of

GRID = (10, 12, 9)


def atlas(grid: tuple[int, ...] = GRID, labels: int = 3, control: int = 3) -> WarpedAtlas:
    generator = torch.Generator().manual_seed(1)
    location = torch.rand(labels, *grid, generator=generator, dtype=torch.float64) + 0.1
    return WarpedAtlas(location / location.sum(0), control, spacing=4.0)


def draw(model: WarpedAtlas, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, model.latent_dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("grid", [GRID, (11, 8)])
def test_without_a_deformation_it_is_the_location_prior(grid: tuple[int, ...]) -> None:
    model = atlas(grid)
    z = torch.zeros(2, model.latent_dim, dtype=torch.float64)
    assert not model.displacement(z).any()
    torch.testing.assert_close(model.log_label_probs(z), model.log_location_prior.expand(2, -1, *grid))


@pytest.mark.parametrize("grid", [GRID, (11, 8)])
def test_leading_dimensions_and_parts_of_the_grid(grid: tuple[int, ...]) -> None:
    model = atlas(grid)
    z = draw(model, 2, 3)
    scores = model.label_scores(z)
    assert scores.shape == (2, 3, 3, *grid)
    torch.testing.assert_close(model.label_scores(z[1, 2]), scores[1, 2])
    lattice = tuple(slice(1, None, 2) for _ in grid)
    torch.testing.assert_close(model.label_scores(z, lattice), scores[(..., *lattice)])
    voxels = torch.tensor([3, 40, 17])
    torch.testing.assert_close(model.flat_scores(z, voxels), scores.flatten(3)[..., voxels])
    total = (scores + model.log_location_prior).exp().sum(2)
    torch.testing.assert_close(total, torch.ones_like(total))  # interpolated probabilities: no normalisation is due


def test_labels_are_found_where_the_deformation_leads() -> None:
    model = atlas()
    z = draw(model, 1)
    places = model.places(z, slice(None))[0].numpy()
    expected = [map_coordinates(p.exp().numpy(), places, order=1, mode="nearest") for p in model.log_location_prior]
    found = model.log_label_probs(z)[0].exp().flatten(1)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-10)


def test_one_label_a_voxel_as_the_whole_table_has_it() -> None:
    model = atlas()
    z = draw(model)
    voxels = torch.arange(0, 1000, 7)
    labels = voxels % 3
    expected = model.log_label_probs(z).flatten(1)[labels, voxels]
    torch.testing.assert_close(model.label_log_prob(z, labels, voxels), expected)


def test_gradients_against_finite_differences() -> None:
    model = atlas((5, 6, 4), labels=2, control=3)
    z = draw(model, scale=0.5).requires_grad_()
    voxels = torch.arange(0, 120, 11)
    assert torch.autograd.gradcheck(lambda z: model.label_log_prob(z, voxels % 2, voxels), z, atol=1e-6)
    assert torch.autograd.gradcheck(lambda z: model.flat_scores(z, voxels), z, atol=1e-6)


def test_coefficients_and_back() -> None:
    model = atlas()
    z = draw(model, 4)
    torch.testing.assert_close(model.z_of(model.coefficients(z)), z)
    white = model.coefficients(z) / model.velocity_sd  # the transform is orthonormal: p(z) stays N(0, I)
    torch.testing.assert_close(white.square().sum((1, 2, 3, 4)), z.square().sum(1))


def test_a_weaker_atlas_is_the_same_atlas_deformed_less() -> None:
    model = atlas()
    weaker, z = model.deformed_by(0.5), draw(model, 2)
    torch.testing.assert_close(weaker.coefficients(z), 0.5 * model.coefficients(z))
    torch.testing.assert_close(weaker.label_scores(2 * z), model.label_scores(z))
    assert weaker.log_location_prior is model.log_location_prior
    assert weaker.state_dict().keys() == model.state_dict().keys()


def test_deformations_drawn_from_the_prior_do_not_fold_and_can_be_undone() -> None:
    model = atlas((20, 24, 18), control=4)
    z = draw(model, 3, scale=0.7)
    there = model.displacement(z)
    assert there.norm(dim=1).max() > 1
    steps = [there.diff(dim=axis + 2).abs().amax() for axis in range(3)]
    assert max(steps) > 0.1
    jacobian = torch.stack(torch.gradient(there, dim=(2, 3, 4)), 2)  # (B, component, axis, *grid)
    determinant = torch.linalg.det(jacobian.movedim((1, 2), (-2, -1)) + torch.eye(3, dtype=torch.float64))
    assert determinant.min() > 0
    back = model.displacement(-z)
    inner = (slice(5, -5),) * 3
    for one, inverse in zip(there, back, strict=True):
        index = np.stack(np.meshgrid(*[np.arange(n) for n in model.grid], indexing="ij"))
        after = [map_coordinates(c.numpy(), index + one.numpy(), order=1, mode="nearest") for c in inverse]
        left = np.linalg.norm(one.numpy() + np.stack(after), axis=0)[inner]
        assert left.max() < 0.15 * np.linalg.norm(one.numpy(), axis=0).max()


def test_corners_weigh_as_multilinear_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(GRID, generator=generator, dtype=torch.float64)
    places = torch.rand(3, 200, generator=generator, dtype=torch.float64) * 14 - 2
    found = sum(volume.flatten()[index] * weight for index, weight in corners_of(places, GRID))
    expected = map_coordinates(volume.numpy(), places.numpy(), order=1, mode="nearest")
    np.testing.assert_allclose(torch.as_tensor(found).numpy(), expected)


def test_label_maps_are_carried_to_the_template() -> None:
    model = WarpedAtlas(atlas().log_location_prior.exp(), 3, spacing=4.0, label_maps=2)
    labels = torch.randint(0, 3, (2, *GRID), generator=torch.Generator().manual_seed(0))
    z = torch.cat([torch.zeros_like(draw(model))[None], draw(model, 1)])
    model.carry(labels, z)
    torch.testing.assert_close(model.label_maps[0].long(), labels[0])
    places = model.places(-z[1], slice(None)).numpy()
    expected = map_coordinates(labels[1].numpy(), places.clip(0), order=0, mode="nearest")
    assert (model.label_maps[1].flatten().numpy() == expected).mean() > 0.999  # of halves, either
    assert "label_maps" not in atlas().state_dict()  # models from before have none


def test_what_a_scan_shows_is_brought_to_the_template() -> None:
    model, z = atlas(), draw(atlas())
    volumes = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = model.places(-z, slice(None)).numpy()
    expected = [map_coordinates(v.numpy(), places, order=1, mode="nearest").reshape(GRID) for v in volumes]
    np.testing.assert_allclose(model.on_template(volumes, z).numpy(), np.stack(expected), rtol=1e-10)


def test_labels_can_be_made_background() -> None:
    model = WarpedAtlas(atlas().log_location_prior.exp(), 3, spacing=4.0, label_maps=1)
    labels = torch.randint(0, 3, (1, *GRID), generator=torch.Generator().manual_seed(0))
    model.carry(labels, torch.zeros(1, model.latent_dim, dtype=torch.float64))
    without = model.without(torch.tensor([False, True, False]))
    before, after = model.log_location_prior.exp(), without.log_location_prior.exp()
    torch.testing.assert_close(after[0], before[0] + before[1])
    torch.testing.assert_close(after[2], before[2])
    assert after[1].max() < 1e-30
    torch.testing.assert_close(without.label_maps[0].long(), torch.where(labels[0] == 1, 0, labels[0]))
    assert int((model.label_maps == 1).sum()) == int((labels == 1).sum())  # the model's own stays
