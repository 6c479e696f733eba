"""Label marginals whose mean is the location prior: borders of all scans are moved equally far."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ppl_seg.inference.border_shift import borders_and_doubt, learn_shift, steepness
from tests.inference.balls import LABELS, population


def matched_to(log_location_prior: Tensor, marginals: Tensor, observed: Tensor, blur: float) -> Tensor:
    """Each of the scans' marginals, moved as all of them say."""
    shift = learn_shift(marginals, observed, log_location_prior, blur)
    return torch.stack([shift.move(r) for r in marginals])


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_that_lie_beside_the_prior_are_brought_back(shift: int) -> None:
    """Marginals all moved by a voxel: their mean agrees with the prior again, and most of the error is gone."""
    _, observed, truth, location = population(40)
    moved = truth.roll(shift, 3).clamp(min=1e-3)
    moved = moved / moved.sum(1, keepdim=True)
    matched = matched_to(location, moved, observed, 2.0)
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
    matched = matched_to((mean / mean.sum(0)).log(), truth, observed, 2.0)
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


def test_the_usual_steepness_is_that_of_the_scans() -> None:
    """Of scans alike each is about 1 steep, sharp or smeared."""
    for slope in (4.0, 0.8):
        found = borders([18.0, 20.0, 22.0], [slope] * 3)
        seen = torch.ones(3, 1, 40, 4, 3, dtype=torch.bool)
        shift = learn_shift(found, seen, found.mean(0).log(), blur=6.0)
        shift.shift.fill_(1.0)
        torch.testing.assert_close(shift(found[1])[0, 20, 2, 1], torch.tensor(1.0), rtol=0.3, atol=0.0)


def test_scans_without_a_border_say_nothing_of_those_with_one() -> None:
    flat = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1).expand(3, -1, 40, 4, 3)
    location = borders([20.0], [0.5])[0].log()
    shift = learn_shift(flat, torch.ones(3, 1, 40, 4, 3, dtype=torch.bool), location, blur=6.0)
    assert float(shift.usual) == 1.0
    assert float(shift(borders([20.0], [2.0])[0]).abs().max()) < 100.0


def test_matching_moves_sharp_and_smeared_borders_equally_far() -> None:
    places = [18.0, 20.0, 22.0] * 4
    slopes = [4.0, 4.0, 4.0, 0.8, 0.8, 0.8] * 2
    location = borders(places, [4.0] * 12).mean(0).clamp(min=1e-6).log().log_softmax(0)
    found = borders([place + 1.0 for place in places], slopes)
    matched = matched_to(location, found, torch.ones(12, 1, 40, 4, 3, dtype=torch.bool), 6.0)
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
    matched = matched_to(location.log(), sharp, observed, 2.0)
    assert float((matched - sharp).abs()[:, :, 7:].mean()) < 1e-4  # far from all
