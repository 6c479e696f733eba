"""The recipe for a field of view."""

from __future__ import annotations

import pytest

from ppl_seg.errors import InputError
from ppl_seg.inference.recipes import POWER_OF_A_CUBIC_MM, RECIPES, Recipe, build_recipe, recipe_for_field


@pytest.mark.parametrize("name", RECIPES)
def test_crops_get_the_recipe_as_it_is(name: str) -> None:
    assert recipe_for_field(build_recipe(name), "crop", 1.0) == build_recipe(name)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"notes"}))
def test_heads_have_one_gaussian_a_class_as_wide_as_it_needs(name: str) -> None:
    recipe = recipe_for_field(build_recipe(name), "head", 8.0)
    assert recipe.components == 1 and recipe.maps is None and recipe.label_blur == 0
    assert 0 < recipe.pseudo.sd_share < build_recipe(name).pseudo.sd_share
    assert recipe.readout_power < 1 and recipe.beta == pytest.approx(8 * POWER_OF_A_CUBIC_MM)
    assert recipe_for_field(recipe, "head", 8.0) == recipe
    assert (recipe.shared_steps > 0) == (recipe.again_steps > 0) == (recipe.shape == "prior")


def test_brains_get_constant_background_weights() -> None:
    recipe = recipe_for_field(build_recipe("default"), "brain", 8.0)
    assert recipe.maps is None and recipe.components == 2 and recipe.pseudo.sd_share > 0
    assert recipe.local_blur > 0 == recipe_for_field(build_recipe("location-em"), "brain", 8.0).local_blur
    shared = {field: recipe_for_field(build_recipe("default"), field, 8.0) for field in ("brain", "head", "crop")}
    assert [field for field, of_field in shared.items() if of_field.partial_volume] == ["brain", "head"]
    assert [field for field, of_field in shared.items() if of_field.outliers] == ["brain"]
    assert not recipe_for_field(build_recipe("location-em"), "brain", 8.0).partial_volume
    assert not recipe_for_field(build_recipe("location-em"), "brain", 8.0).outliers
    assert recipe.readout_power < 1 and recipe.beta == pytest.approx(8 * POWER_OF_A_CUBIC_MM)
    assert recipe.observed_rates(4, (2,)) == ()
    warped = recipe_for_field(recipe, "brain", 8.0, warped=True)
    assert warped.observed_rates(4, (2,)) == (warped.mask_background, 1.0, warped.mask_fluid, 1.0)
    assert 0 < warped.mask_background < warped.mask_fluid < 1
    assert recipe.fusion_power == 0 < warped.fusion_power < warped.beta
    assert recipe_for_field(build_recipe("location-em"), "brain", 8.0, warped=True).fusion_power == 0
    assert recipe_for_field(recipe, "brain", 8.0) == recipe
    coarse = recipe_for_field(build_recipe("default"), "brain", 64.0)
    assert coarse.beta == pytest.approx(8 * recipe.beta)
    for asked in (0.3, 0.05):
        assert recipe_for_field(build_recipe("default", likelihood_power=asked), "brain", 8.0).beta == asked


@pytest.mark.parametrize("field", ["brain", "head"])
def test_the_bound_chooses_how_far_an_atlas_is_deformed(field: str) -> None:
    plain, warped = (recipe_for_field(build_recipe("default"), field, 8.0, warped) for warped in (False, True))
    assert plain.strengths == (1.0,) and warped.strengths == (1.0, 0.5)


def test_the_notes_model_stays_what_it_is() -> None:
    for field in ("brain", "head"):
        assert recipe_for_field(build_recipe("notes"), field, 8.0) == build_recipe("notes", label_blur=0.0)


def test_larger_voxels_are_believed_more_up_to_the_model_as_written() -> None:
    brain = recipe_for_field(build_recipe("default"), "brain", 8.0)
    powers = [brain.power_at(side**3) for side in (0.5, 1.0, 2.0, 4.0, 8.0)]
    assert powers == pytest.approx([0.5 * 0.5**0.5, 0.5, 0.5 * 2**0.5, 1.0, 1.0])
    assert build_recipe("default").power_at(0.001) == 1.0


def test_heads_alone_lose_their_bias_field_unless_asked() -> None:
    usual, always, never = (build_recipe("default", bias_field=choice) for choice in ("auto", "n4", "none"))
    assert [usual.corrects_bias_field(view) for view in ("head", "brain", "crop")] == [True, False, False]
    assert all(always.corrects_bias_field(view) and not never.corrects_bias_field(view) for view in ("head", "brain"))


@pytest.mark.parametrize("share", ["label_share", "awake_share"])
def test_a_share_is_a_share(share: str) -> None:
    for value in (0.0, 1.0):
        build_recipe("default", **{share: value})
    for value in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"{share} {value}: expected a number from 0 to 1"):
            build_recipe("default", **{share: value})


def test_a_recipe_from_before_an_awake_share_is_read() -> None:
    values = build_recipe("default").to_dict()
    del values["awake_share"]
    assert Recipe.from_dict(values) == build_recipe("default")
