"""Draw whole segmentations of a scan from the posterior: one z each from q(z|x), its labels from r given z.

    python scripts/sample_segmentations.py sub-01_T1w.nii.gz --fitted fitted.pt --out sub-01 --draws 200

Writes OUT_dseg.nii.gz (argmax of the label marginals) and OUT_draws.nii.gz (a draw a volume), prints volumes.
"""

import argparse
from pathlib import Path

import numpy as np
import pyro
import torch

from ppl_seg.data.grids import Grid, center_matrix
from ppl_seg.data.images import write_image
from ppl_seg.data.labels import LabelTable
from ppl_seg.data.loading import load_scan, scan_on_grid
from ppl_seg.inference.expectation import expectation_maximisation
from ppl_seg.inference.networks import build_scan_guide, build_segmentation_model, build_shape_prior
from ppl_seg.inference.posterior import start_theta
from ppl_seg.inference.recipes import Recipe
from ppl_seg.models.normalisation import normalise
from ppl_seg.results.readout import read_out

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scan", type=Path)
parser.add_argument("--fitted", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--draws", type=int, default=200)
args = parser.parse_args()
pyro.set_rng_seed(0)

saved = torch.load(args.fitted, weights_only=True)
table, grid = LabelTable.from_dict(saved["table"]), Grid.from_dict(saved["grid"])
recipe, factor = Recipe.from_dict(saved["recipe"]), saved["factor"]
prior = build_shape_prior(saved["prior"]["log_location_prior"].exp(), saved["decoder"], saved["latent"])
prior.load_state_dict(saved["prior"])
model = build_segmentation_model(prior, table.class_of_label, 1, recipe)
guide = build_scan_guide(prior, recipe.guide, 1)
guide.load_state_dict(saved["guide"])

own = load_scan([args.scan])
normalised = normalise(own.intensities[None], own.observed[None])[0]
matrix = center_matrix(own.image.shape, own.image.affine, grid)
scan, observed = scan_on_grid(normalised, own.observed, matrix, grid.shape)
scan, observed = scan[None], observed[None]
with torch.no_grad():
    z = torch.stack([guide(scan, observed) for _ in range(args.draws)])  # (S, 1, D)
theta = start_theta(model, scan, observed, recipe, saved["maps"])
theta = expectation_maximisation(model, scan, observed, theta, z[:8], 8, factor, recipe.pseudo)
result = read_out(model, z[:, 0], theta, normalised, own.observed, matrix, keep_draws=True, spacing=grid.spacing)

write_image(f"{args.out}_dseg.nii.gz", table.from_positions(np.asarray(result.labels)), like=own.image)
write_image(f"{args.out}_draws.nii.gz", table.from_positions(np.asarray(result.draws)), like=own.image)
volumes = np.quantile(result.counts * own.image.voxel_volume, [0.05, 0.5, 0.95], axis=0)  # (3, M) mm³
for name, (low, middle, high) in list(zip(table.names, volumes.T, strict=True))[1:]:
    print(f"{name}: {middle:.0f} mm³, 5-95 % of the draws {low:.0f} to {high:.0f}")
