from __future__ import annotations

import pytest
import torch

from ppl_seg.data.augmentation import Deformation, _smooth_field, deform

STILL = Deformation(rotation=0, scale=0, shear=0, translation=0, elastic=0)


def ball(shape=(24, 20, 22), batch=3) -> tuple[torch.Tensor, torch.Tensor]:
    axes = torch.meshgrid(*[torch.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    radius = torch.stack(axes).square().sum(0).sqrt()
    labels = ((radius < 8).long() + (radius < 5).long()).expand(batch, *shape).contiguous()
    return labels, torch.ones(batch, 1, *shape, dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(24, 20, 22), (30, 26), (30, 26, 1)])
def test_deterministic_each_map_its_own_and_similar(shape):
    labels, observed = ball(shape)
    first, seen = deform(labels, observed, generator())
    again, _ = deform(labels, observed, generator())
    other, _ = deform(labels, observed, generator(1))
    assert first.shape == labels.shape and first.dtype == labels.dtype
    assert seen.shape == observed.shape and seen.dtype == torch.bool
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], labels[0])
    before, after = labels > 0, first > 0
    assert 2 * (before & after).sum() / (before.sum() + after.sum()) > 0.75
    assert set(first.unique().tolist()) == {0, 1, 2}
    assert (first[~seen[:, 0]] == 0).all()


def test_nothing_moves_without_strength():
    labels, observed = ball()
    labels[0, 3, 3, 3] = 11  # a label of the second chunk
    observed[1, 0, :5] = False
    moved, seen = deform(labels, observed, generator(), deformation=STILL)
    assert torch.equal(seen, observed)
    assert torch.equal(moved, torch.where(observed[:, 0], labels, 0))


def test_a_single_slice_is_the_2d_case():
    labels, observed = ball((30, 26))
    flat, seen = deform(labels, observed, generator())
    slab, seen_slab = deform(labels[..., None], observed[..., None], generator())
    assert torch.equal(slab[..., 0], flat) and torch.equal(seen_slab[..., 0], seen)
    with pytest.raises(ValueError, match="two or three axes"):
        deform(labels[:, :, :1, None], observed[:, :, :, :1, None], generator())


def test_what_comes_from_beyond_the_grid_is_unobserved():
    labels, observed = ball((20, 20, 20))
    labels[:] = 4
    moved, seen = deform(
        labels,
        observed,
        generator(),
        deformation=Deformation(rotation=0, scale=0, shear=0, translation=5, elastic=0),
    )
    assert 0.2 < seen.float().mean() < 1
    assert (moved[seen[:, 0]] == 4).all() and (moved[~seen[:, 0]] == 0).all()


def test_lengths_are_millimetres():
    labels, observed = ball()
    millimetres = Deformation(rotation=0, translation=5, elastic=1, elastic_spacing=12)
    voxels = Deformation(rotation=0, translation=2.5, elastic=0.5, elastic_spacing=6)
    coarse, _ = deform(labels, observed, generator(), 2.0, millimetres)
    fine, _ = deform(labels, observed, generator(), 1.0, voxels)
    assert torch.equal(coarse, fine) and not torch.equal(coarse, labels)


def test_elastic_field_is_smooth_and_of_the_asked_size():
    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    rng = generator()
    field = _smooth_field(200, (25, 30), normal, Deformation(elastic=2.0, elastic_spacing=8), [slice(None)] * 2)
    assert field.shape == (200, 25, 30, 2)
    assert field.std() == pytest.approx(2.0, rel=0.1)
    assert field.diff(dim=1).abs().mean() < 0.35 and field.diff(dim=1).diff(dim=1).abs().mean() < 0.15
