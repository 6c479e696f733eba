"""Fit q(z|x), θ and the background's maps to unlabelled scans under a prior, with plain Pyro.

python scripts/fit_scans.py scans/*_T1w.nii.gz --prior prior.pt --out fitted.pt --elbo enum
"""

import argparse
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from ppl_seg.data import grids, labels, loading
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference import expectation, networks, posterior, recipes
from ppl_seg.inference.objectives import Jensen, Marginal
from ppl_seg.models.normalisation import normalise

ELBOS = {"marginal": (Marginal, "collapsed"), "jensen": (Jensen, "collapsed"), "trace": (Trace_ELBO, "collapsed")}
ELBOS |= {"enum": (TraceEnum_ELBO, "enumerated")}  # each with the form of the program: labels summed out, or a site

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scans", nargs="+", type=Path)
parser.add_argument("--prior", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--guide", choices=FAMILIES, default="mean-field")
parser.add_argument("--elbo", choices=ELBOS, default="marginal")
parser.add_argument("--epochs", type=int, default=100)
args = parser.parse_args()
pyro.set_rng_seed(0)
saved = torch.load(args.prior, weights_only=True)
table, grid = labels.LabelTable.from_dict(saved["table"]), grids.Grid.from_dict(saved["grid"])
prior = networks.build_shape_prior(saved["prior"]["log_location_prior"].exp(), saved["decoder"], saved["latent"])
prior.load_state_dict(saved["prior"])
recipe = recipes.build_recipe("default", guide=args.guide)
model = networks.build_segmentation_model(prior, table.class_of_label, 1, recipe)  # freezes the prior
guide = networks.build_scan_guide(prior, args.guide, 1)
elbo, model.form = ELBOS[args.elbo]
factor = getattr(elbo, "factor", "posterior")  # what θ is learned from, the bound's q(s|·): f of jensen, else r

placed = []
for own in (loading.load_scan([path]) for path in args.scans):
    normalised = normalise(own.intensities[None], own.observed[None])[0]
    matrix = grids.center_matrix(own.image.shape, own.image.affine, grid)
    placed.append(loading.scan_on_grid(normalised, own.observed, matrix, grid.shape))
scans, observed = (torch.stack(part) for part in zip(*placed, strict=True))  # (n, 1, *grid)

theta, losses = posterior.start_theta(model, scans, observed, recipe), []
with pyro.get_param_store().scope():  # the store is global: this training's parameters leave with the scope
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo(max_plate_nesting=model.max_plate_nesting))
    for epoch in range(args.epochs):  # gradient steps on q at the present θ, then an M-step at draws of q
        batches = torch.randperm(len(scans)).split(8)
        losses.append(sum(svi.step(scans[b], observed[b], theta.select(b)) for b in batches) / scans.numel())
        with torch.no_grad():
            z = torch.stack([guide(scans, observed) for _ in range(2)])
        theta, background = expectation.update_theta(model, z, scans, observed, theta, factor, recipe.pseudo)
        theta = theta.with_maps(expectation.weight_maps(background, grid.shape, recipe.maps))
        print(f"epoch {epoch + 1} of {args.epochs}: loss per voxel {losses[-1]:.4f}", flush=True)
fitted = {"guide": guide.state_dict(), "maps": theta.log_weight_maps, "recipe": recipe.to_dict(), "factor": factor}
torch.save(saved | fitted | {"losses": losses}, args.out)  # no objects: weights_only=True reads it
