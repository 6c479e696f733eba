"""Label marginals whose mean is the location prior: borders of all scans are moved equally far."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ppl_seg.inference.border_shift import BorderShift, borders_and_doubt, match_location, steepness
from tests.inference.balls import GRID, LABELS, population


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_that_lie_beside_the_prior_are_brought_back(shift: int) -> None:
    """Marginals all moved by a voxel: their mean agrees with the prior again, and most of the error is gone."""
    _, observed, truth, location = population(40)
    moved = truth.roll(shift, 3).clamp(min=1e-3)
    moved = moved / moved.sum(1, keepdim=True)
    matched = moved.clone()
    match_location(matched, observed, location, blur=2.0)
    torch.testing.assert_close(matched.sum(1), torch.ones_like(matched[:, 0]))
    seen = observed[:, 0].any(0)

    def away(targets: Tensor) -> float:
        return float((targets.mean(0) - truth.mean(0))[:, seen].abs().mean())

    def error(targets: Tensor) -> float:
        return float((targets - truth).abs().mean(1)[observed[:, 0]].mean())

    assert away(matched) < 0.5 * away(moved)
    assert error(matched) < error(moved)


def test_targets_that_agree_with_the_prior_stay() -> None:
    _, observed, truth, _ = population(40)
    mean = truth.mean(0).clamp(min=1e-4)
    matched = truth.clone()
    match_location(matched, observed, (mean / mean.sum(0)).log(), blur=2.0)
    assert float((matched - truth).abs()[observed.expand_as(truth)].mean()) < 0.01


def borders(places: Sequence[float], slopes: Sequence[float]) -> Tensor:
    """One plane border a scan, (n, 2, 40, 4, 3), at x = place, log r changing by its slope a voxel."""
    x = torch.arange(40.0).view(1, 40, 1, 1)
    place, slope = (torch.tensor(values).view(-1, 1, 1, 1) for values in (places, slopes))
    inside = torch.sigmoid(slope * (place - 0.5 - x)).expand(-1, 40, 4, 3)
    return torch.stack([1 - inside, inside], 1)


def steepness_at(place: int, of: Tensor, blur: float) -> Tensor:
    """Of each scan, relative to the others."""
    found = [borders_and_doubt(r) for r in of]
    usual = sum(area.sum() for area, _ in found) / sum(doubt.sum() for _, doubt in found)
    return torch.stack([steepness(*parts, usual, blur)[0, place, 2, 1] for parts in found])


def test_steepness_is_the_slope_of_a_border() -> None:
    steep = steepness_at(20, borders([20, 20, 20], [3.0, 1.5, 0.75]), blur=6.0)
    torch.testing.assert_close(steep[0] / steep[1], torch.tensor(2.0), rtol=0.1, atol=0.0)
    torch.testing.assert_close(steep[1] / steep[2], torch.tensor(2.0), rtol=0.1, atol=0.0)
    far = steepness_at(2, borders([20, 20], [3.0, 0.75]), blur=1.0)
    torch.testing.assert_close(far, torch.ones(2), rtol=0.05, atol=0.0)  # no border: as all


def test_what_was_learned_moves_a_scan_as_it_moved_it_then() -> None:
    """The shift of one scan, by itself, gives the target that it had among all."""
    _, observed, truth, location = population(20)
    moved = truth.roll(1, 3).clamp(min=1e-3)
    matched = moved.clone()
    shift = match_location(matched, observed, location, blur=2.0)
    for r, t in zip(moved[:3], matched, strict=False):
        torch.testing.assert_close((r.log() + shift(r, 2.0)).softmax(0), t, rtol=1e-5, atol=1e-6)
    other = BorderShift(shift.shift.shape)
    other.load_state_dict(shift.state_dict())
    torch.testing.assert_close(other(moved[0], 2.0), shift(moved[0], 2.0))


def test_without_learning_nothing_moves() -> None:
    """A shift that was never learned is none."""
    _, _, truth, _ = population(1)
    assert not BorderShift((LABELS, *GRID))(truth[0], 2.0).any()


def test_matching_moves_sharp_and_smeared_borders_equally_far() -> None:
    places = [18.0, 20.0, 22.0] * 4
    slopes = [4.0, 4.0, 4.0, 0.8, 0.8, 0.8] * 2
    location = borders(places, [4.0] * 12).mean(0).clamp(min=1e-6).log().log_softmax(0)
    found = borders([place + 1.0 for place in places], slopes)
    matched = found.clone()
    match_location(matched, torch.ones(12, 1, 40, 4, 3, dtype=torch.bool), location, blur=6.0)
    moved = (found - matched)[:, 1].sum(1).mean((1, 2))  # voxels that a border went back, of 1
    sharp, smeared = moved[torch.tensor(slopes) == 4.0].mean(), moved[torch.tensor(slopes) == 0.8].mean()
    assert 0.6 < float(sharp) < 1.4 and 0.6 < float(smeared) < 1.4
    assert abs(float(sharp - smeared)) < 0.3


def test_matching_asks_for_nothing_that_so_few_scans_cannot_show() -> None:
    """A thousand label maps reach places that forty sharp scans do not: no structure is made up there."""
    _, observed, truth, _ = population(40)
    sharp = torch.nn.functional.one_hot(truth.argmax(1), LABELS).movedim(-1, 1).clamp(1e-9, 1.0)
    location = 0.99 * sharp.mean(0)
    location[1] += 0.01  # it has been seen everywhere
    matched = sharp.clone()
    match_location(matched, observed, location.log(), blur=2.0)
    assert float((matched - sharp).abs()[:, :, 7:].mean()) < 1e-4  # far from all
