"""Recipes: what stage 2 is made of, by name. The default, the journal-club notes' own model, and two baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..errors import InputError
from ..guides.families import FAMILIES
from ..models.intensity import PseudoCounts
from .expectation import MapOptions
from .objectives import OBJECTIVES

USUAL_POWER = 0.05  # β, where nothing else is said
LOCAL_BLUR = 4.0  # mm, of brains' weights
SHARED_STEPS, AGAIN_STEPS = 16, 20  # of heads
STRENGTHS = (1.0, 0.5)  # of a warped atlas of brains or heads
FUSION_BLUR = 12.0  # mm, of what is said of a label map
OUTLIERS = 0.002  # of brains
FUSION_POWER_OF_A_CUBIC_MM = 0.00125  # 0.01 on a grid of 2 mm
POWER_OF_A_CUBIC_MM = 0.00625  # β of brains and heads, for each mm³ of a voxel: 0.05 on a grid of 2 mm


@dataclass(frozen=True)
class Recipe:
    """Options of `fit` and `segment`.

    Attributes:
        bias_field: whether N4 divides it out before all else; auto: see `corrects_bias_field`.
        objective: name in `objectives.OBJECTIVES`. guide: family of q(z).
        shape: `prior`, the learned decoder; `location`, scores 0, f = p_loc.
        intensity: θ `per-scan` by EM, or `shared` by gradient.
        classes: intensity classes from the label `table`, or a class for every one of the `labels`.
        background_components, fluid_components, components: Gaussians of the background's class, of cerebrospinal
            fluid's, and of every other class.
        maps: how background weight maps are learned; None for constant weights.
        pseudo: conjugate penalty of θ. likelihood_power: β; None leaves it to `recipe_for_field`, else USUAL_POWER.
        mask_background, mask_fluid: how often background, and the fluid around a brain where it has a label, lie within
            a brain mask, see `IntensityModel`; 1: a mask says nothing of them.
        outliers: how often a voxel's brightness says nothing of its label, see `IntensityModel`.
        local_blur: sd in mm of the Gaussian through which the weights of the structures' components follow the scan
            that is read out, see `expectation.localise`; 0 leaves them the same everywhere.
        partial_volume: whether fluid and tissue share voxels where a scan is read out, see `partial_volume`.
        shared_steps: EM steps by which θ is learned anew from the scan's own voxels, beside those that classes share,
            before it is read out.
        again_steps: gradient steps of z that follow with that θ, before it is learned once more; of a warped atlas.
        fusion_power, fusion_blur: power of the likelihood by which label maps are weighed, and sd in mm of the Gaussian
            around a place, see `label_fusion.map_weights`; power 0: the template is everyone's.
        readout_power: κ, of p(x|s) in the label marginals, for voxels of 1 mm; see `power_at`.
        readout: `marginals`, argmax of the label marginals; `decoder`, argmax of f.
        strengths: how far a warped atlas is deformed, relative to the label maps it learned from; the scan's own bound
            chooses one of them.
        em_iterations: EM steps of θ under the location prior, before z is inferred; 0 leaves θ at its start.
        sleep_steps, steps: training steps of q(z|x) on simulated and on real scans.
        batch_size, learning_rate: of both.
        refine_steps, refine_rate: gradient steps per scan that follow the encoder.
        per_scan_steps: gradient steps per scan where there is no encoder.
        label_guide: whether q(s|x) has its say where the model has one.
        label_share: w, of one learned asleep in the label marginals, r^(1 − w) u^w. awake_share: of one learned awake.
        label_rounds: how often q(s|x) is learned from what the program infers with it, after q(z|x); 0 for no q(s|x).
        label_steps, label_batch_size, label_rate: of each round.
        label_blur: sd in mm through which the mean of its targets is matched to the location prior; 0 leaves them.
    """

    name: str = "default"
    bias_field: Literal["auto", "n4", "none"] = "auto"
    objective: str = "marginal"
    guide: str = "mean-field"
    shape: Literal["prior", "location"] = "prior"
    intensity: Literal["per-scan", "shared"] = "per-scan"
    classes: Literal["table", "labels"] = "table"
    background_components: int = 4
    fluid_components: int = 4
    components: int = 2
    maps: MapOptions | None = field(default_factory=MapOptions)
    pseudo: PseudoCounts = PseudoCounts(sd=0.08, sd_share=3.0)
    likelihood_power: float | None = None
    mask_background: float = 1.0
    mask_fluid: float = 1.0
    outliers: float = 0.0
    local_blur: float = 0.0
    partial_volume: bool = False
    shared_steps: int = 0
    again_steps: int = 0
    fusion_power: float = 0.0
    fusion_blur: float = FUSION_BLUR
    readout_power: float = 1.0
    readout: Literal["marginals", "decoder"] = "marginals"
    strengths: tuple[float, ...] = (1.0,)
    em_iterations: int = 8
    sleep_steps: int = 200
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    refine_steps: int = 20
    refine_rate: float = 0.1
    per_scan_steps: int = 30
    label_guide: bool = True
    label_share: float = 0.3
    awake_share: float = 0.5
    label_rounds: int = 3
    label_steps: int = 600
    label_batch_size: int = 4
    label_rate: float = 2e-3
    label_blur: float = 6.0

    @property
    def beta(self) -> float:
        """β, as the program takes it."""
        return USUAL_POWER if self.likelihood_power is None else self.likelihood_power

    def corrects_bias_field(self, view: str) -> bool:
        """Whether N4 is due for a brain, a head or a crop: of itself for heads, which come as the scanner left them."""
        return self.bias_field == "n4" or (self.bias_field == "auto" and view == "head")

    def gaussians(self, num_classes: int, fluid: int | None) -> tuple[int, ...]:
        """How many each class has, (N,).

        Args:
            fluid: the label table's class of cerebrospinal fluid, where there is one.
        """
        of_class = {0: self.background_components}
        if fluid is not None and self.classes == "table":
            of_class[fluid] = self.fluid_components
        return tuple(of_class.get(n, self.components) for n in range(num_classes))

    def observed_rates(self, num_labels: int, outer_fluid: Sequence[int]) -> tuple[float, ...]:
        """How often each label lies within a brain mask, (M,); () where a mask says nothing.

        Args:
            outer_fluid: labels of the fluid around the brain.
        """
        if self.mask_background == self.mask_fluid == 1:
            return ()
        fluid = {label: self.mask_fluid for label in outer_fluid}
        return tuple({0: self.mask_background, **fluid}.get(label, 1.0) for label in range(num_labels))

    def power_at(self, voxel_volume: float) -> float:
        """κ for voxels of so many mm³.

        What the model leaves unexplained is alike over millimetres, so that larger voxels count more, by the square
        root of their side: half at 1 mm is 1 at 4 mm.
        """
        return 1.0 if self.readout_power == 1 else min(1.0, self.readout_power * voxel_volume ** (1 / 6))

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From config.json."""
        maps = None if values["maps"] is None else MapOptions(**values["maps"])
        parts = {"maps": maps, "pseudo": PseudoCounts(**values["pseudo"])}
        strengths = {"strengths": tuple(values["strengths"])} if "strengths" in values else {}
        older = {"fluid_components": values["components"]}  # of models from before it was an option
        return cls(**{**older, **values, **parts, **strengths})


def default() -> Recipe:
    """Per-scan θ by EM, background weight maps, exact marginal."""
    return Recipe()


def notes() -> Recipe:
    """The notes' own model: shared θ, one Gaussian a label, constant weights, β = 1, Jensen, decoder argmax."""
    return Recipe(
        name="notes",
        objective="jensen",
        intensity="shared",
        classes="labels",
        background_components=1,
        components=1,
        maps=None,
        pseudo=PseudoCounts(),
        likelihood_power=1.0,
        readout="decoder",
        em_iterations=0,
        label_guide=False,
        label_rounds=0,
    )


def location() -> Recipe:
    """The location prior alone: argmax p_loc, the scan is not looked at."""
    return replace(
        Recipe(), name="location", shape="location", readout="decoder", maps=None, em_iterations=0, per_scan_steps=0
    )


def location_em() -> Recipe:
    """EM with the location prior as an atlas (Van Leemput et al., IEEE TMI 1999): no shape model, constant weights."""
    return replace(Recipe(), name="location-em", shape="location", maps=None, em_iterations=25, per_scan_steps=0)


RECIPES = {"default": default, "notes": notes, "location": location, "location-em": location_em}


def build_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with changes; None leaves a value as it is.

    Raises:
        InputError: unknown name, or a changed value that names nothing.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: unknown; choose one of {', '.join(sorted(RECIPES))}")
    return changed_recipe(RECIPES[name](), **changes)


def changed_recipe(recipe: Recipe, name: str | None = None, **changes: Any) -> Recipe:
    """A recipe (or, with a name, that one) with changes; None leaves a value as it is. InputError as `build_recipe`."""
    if name is not None and name != recipe.name:
        return build_recipe(name, **changes)
    changed = replace(recipe, **{key: value for key, value in changes.items() if value is not None})
    for option, value, known in (
        ("--bias-field", changed.bias_field, {"auto", "n4", "none"}),
        ("--objective", changed.objective, set(OBJECTIVES) - {"sleep"}),
        ("--guide", changed.guide, set(FAMILIES)),
        ("--intensity", changed.intensity, {"per-scan", "shared"}),
    ):
        if value not in known:
            raise InputError(f"{option} {value}: unknown; choose one of {', '.join(sorted(known))}")
    for name_of, share in (("label_share", changed.label_share), ("awake_share", changed.awake_share)):
        if not 0 <= share <= 1:
            raise InputError(f"{name_of} {share:g}: expected a number from 0 to 1")
    if not changed.beta > 0:
        raise InputError(f"--likelihood-power {changed.beta:g}: expected a number above 0")
    return changed


def recipe_for_field(recipe: Recipe, field_of_view: str, voxel_volume: float, warped: bool = False) -> Recipe:
    """The recipe for label maps of a brain, a head or a crop.

    A crop's box says where its structures are, and its scans are of the label maps' kind: on average they agree with
    the location prior. Whole brains differ with age, and their label maps are often others'.
    Maps of the background, learned from one scan, take the fluid from the structures, around a brain and within a head.
    Two Gaussians a class, for nuclei and lesions, help brains and crops; fluid, that flows and lies in thin layers, has
    more. Of a brain the weights of the two depend on the place, and fluid and tissue share the voxels of their borders.
    Heads have many classes that look alike, and EM two optima then: a tenth of a millimetre in the registration decides
    between them. One Gaussian must be wide enough for fluid that is bright; when z is known, it is learned anew from
    the scan's own voxels without those that classes share with fluid, which a brain's second Gaussian takes.
    A template is of all label maps, and few are as a scan's own would be: around each place they count by what they
    explain of it.
    How far people differ from an atlas differs: old brains further than its label maps, most others less.
    What is left unexplained has a size in mm³, so that voxels count by theirs. What no class explains, lesions that are
    bright, says nothing of its label.

    Args:
        voxel_volume: of the prior's grid, mm³.
        warped: the prior is an atlas that is deformed, and would shrink from its mask.
    """
    if field_of_view == "crop":
        return recipe
    recipe = replace(recipe, label_blur=0.0)
    if recipe.classes == "labels":
        return recipe
    power = recipe.likelihood_power
    recipe = replace(
        recipe,
        maps=None,
        readout_power=0.5,
        likelihood_power=min(1.0, POWER_OF_A_CUBIC_MM * voxel_volume) if power is None else power,
        strengths=STRENGTHS if warped else recipe.strengths,
    )
    if field_of_view == "head":
        pseudo = replace(recipe.pseudo, sd_share=min(1.0, recipe.pseudo.sd_share))
        recipe = replace(recipe, components=1, fluid_components=1, pseudo=pseudo)
        if recipe.shape != "prior":
            return recipe
        return replace(recipe, partial_volume=True, shared_steps=SHARED_STEPS, again_steps=AGAIN_STEPS)
    recipe = replace(recipe, background_components=2)
    if recipe.shape == "prior":
        fusion = min(1.0, FUSION_POWER_OF_A_CUBIC_MM * voxel_volume) if warped else 0.0
        recipe = replace(recipe, outliers=OUTLIERS, local_blur=LOCAL_BLUR, partial_volume=True, fusion_power=fusion)
    return replace(recipe, mask_background=0.2, mask_fluid=0.4) if warped else recipe
