"""Variational EM of a warped atlas, on discs that lie in different places."""

import pyro
import torch

from ppl_seg.guides.deformations import DeformationGuide
from ppl_seg.guides.families import MeanField, kl_to_prior
from ppl_seg.inference.atlas import learn_atlas
from ppl_seg.inference.objectives import build_objective
from ppl_seg.models.shape_prior import ShapeModel, location_prior
from ppl_seg.models.warped_atlas import WarpedAtlas

GRID = (24, 24)


def discs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Label maps of a disc in a ring, moved by up to 4 voxels: positions (n, *grid), and that all is observed."""
    generator = torch.Generator().manual_seed(seed)
    centre = 11.5 + 8 * torch.rand(count, 2, generator=generator) - 4
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    radius = ((y - centre[:, :1, None]).square() + (x - centre[:, 1:, None]).square()).sqrt()
    labels = (radius < 6).long() + (radius < 3).long()
    return labels, torch.ones(count, 1, *GRID, dtype=torch.bool)


def learned(labels: torch.Tensor, observed: torch.Tensor) -> WarpedAtlas:
    torch.manual_seed(0)
    atlas = WarpedAtlas(location_prior(labels, observed, 3), control=3, spacing=2.0)
    log = learn_atlas(atlas, MeanField(atlas.latent_dim), labels, observed, steps=60)
    assert [row["step"] for row in log.rows] == [20, 40, 60]
    return atlas


def dice(found: torch.Tensor, truth: torch.Tensor) -> float:
    overlaps = [2 * ((found == m) & (truth == m)).sum() / ((found == m).sum() + (truth == m).sum()) for m in (1, 2)]
    return float(torch.stack(overlaps).mean())


def test_it_explains_left_out_label_maps_better_than_their_mean_place() -> None:
    atlas = learned(*discs(8, 1))
    labels, observed = discs(3, 2)
    guide = DeformationGuide(atlas, MeanField(atlas.latent_dim))
    posterior, _ = guide.infer(labels, observed)
    template = atlas.log_location_prior.argmax(0)
    still = torch.tensor([dice(template, truth) for truth in labels])
    moved = torch.tensor(
        [dice(atlas.label_logits(z).argmax(0), truth) for z, truth in zip(posterior.mean, labels, strict=True)]
    )
    assert bool((moved > still).all()) and moved.mean() > still.mean() + 0.1
    assert bool((atlas.velocity_sd > 0).all())


def test_the_template_is_sharper_than_the_location_prior() -> None:
    labels, observed = discs(8, 1)
    atlas = learned(labels, observed)
    blurred = location_prior(labels, observed, 3)

    def entropy(p: torch.Tensor) -> float:
        return float(-(p * p.log()).sum(0).mean())

    assert entropy(atlas.log_location_prior.exp()) < 0.85 * entropy(blurred)


def test_the_same_seed_gives_the_same_atlas() -> None:
    maps = discs(3, 1)
    first, second = learned(*maps), learned(*maps)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_unobserved_voxels_teach_nothing() -> None:
    labels, observed = discs(3, 1)
    observed[:, :, :6] = False
    other = torch.where(observed[:, 0], labels, 2)
    first, second = learned(labels, observed), learned(other, observed)
    assert torch.equal(first.log_location_prior, second.log_location_prior)


def test_what_the_guide_climbs_is_the_bound_of_the_stage_1_program() -> None:
    labels, observed = discs(4, 1)
    observed[:, :, :3] = False
    atlas = learned(labels, observed)
    guide = DeformationGuide(atlas, MeanField(atlas.latent_dim))
    posterior, _ = guide.infer(labels[:1], observed[:1])
    assert posterior.batch_shape == (1,) and posterior.event_shape == (atlas.latent_dim,)

    def fixed(*_: object) -> None:
        with pyro.plate("scans", 1, dim=-1):
            pyro.sample("z", posterior)

    pyro.set_rng_seed(1)
    found = -build_objective("marginal").loss(ShapeModel(atlas), fixed, labels[:1], observed[:1])
    pyro.set_rng_seed(1)
    z, voxels = posterior.rsample()[0], observed[0].flatten().nonzero()[:, 0]
    expected = atlas.label_log_prob(z, labels[0].flatten()[voxels], voxels).sum()
    expected = expected - kl_to_prior(posterior, atlas.prior()).sum()
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-3)
