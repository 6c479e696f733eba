"""The recipe for a field of view."""

from __future__ import annotations

import pytest

from ppl_seg.inference.recipes import RECIPES, build_recipe, recipe_for_field


@pytest.mark.parametrize("name", RECIPES)
def test_crops_get_the_recipe_as_it_is(name: str) -> None:
    assert recipe_for_field(build_recipe(name), "crop") == build_recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_heads_do_not_need_to_agree_with_the_prior_on_average(name: str) -> None:
    assert recipe_for_field(build_recipe(name), "head") == build_recipe(name, label_blur=0.0)


def test_brains_get_constant_background_weights_and_two_gaussians() -> None:
    recipe = recipe_for_field(build_recipe("default"), "brain")
    assert recipe.maps is None and recipe.components == 2
    assert recipe.mask_background < 1 and recipe.readout_power < 1 and recipe.likelihood_power < 0.05
    assert recipe_for_field(recipe, "brain") == recipe
    assert recipe_for_field(build_recipe("default", likelihood_power=0.3), "brain").likelihood_power == 0.3


def test_the_notes_model_stays_what_it_is() -> None:
    assert recipe_for_field(build_recipe("notes"), "brain") == build_recipe("notes", label_blur=0.0)
