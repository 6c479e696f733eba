"""Learn an anatomical prior p(z) p(s|z) from label maps, with plain Pyro.

    python scripts/train_prior.py labels/*_dseg.nii.gz --out prior.pt --guide low-rank --elbo trace

The labels are observed here, nothing has to be enumerated or bounded: the two ELBOs differ in their KL alone.
"""

import argparse

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from ppl_seg.data import augmentation, grids, tables
from ppl_seg.data.images import read_label_map
from ppl_seg.data.loading import labels_on_grid
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference import calibration, networks
from ppl_seg.inference.objectives import Marginal
from ppl_seg.models.decoders import DECODERS
from ppl_seg.models.shape_prior import ShapeModel, location_prior

ELBOS = {"marginal": Marginal, "trace": Trace_ELBO}  # analytic KL, sampled KL

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("label_maps", nargs="+")
parser.add_argument("--out", required=True)
parser.add_argument("--decoder", choices=DECODERS, default="convolutional")
parser.add_argument("--guide", choices=FAMILIES, default="mean-field")
parser.add_argument("--elbo", choices=ELBOS, default="marginal")
parser.add_argument("--latent", type=int, default=32, help="dimension of z")
parser.add_argument("--steps", type=int, default=900)
args = parser.parse_args()
pyro.set_rng_seed(0)
random = torch.Generator().manual_seed(0)

images = [read_label_map(path) for path in args.label_maps]
table, parcels, _ = tables.table_for(np.unique(np.concatenate([np.unique(image.data) for image in images])))
grid = grids.common_grid(images)
matrices = [grids.center_matrix(image.shape, image.affine, grid) for image in images]
placed = [labels_on_grid(image, table, parcels, m, grid.shape) for image, m in zip(images, matrices, strict=True)]
labels, observed = (torch.stack(part) for part in zip(*placed, strict=True))  # (n, *grid), (n, 1, *grid)

location = location_prior(labels, observed, len(table))
prior = networks.build_shape_prior(location, args.decoder, args.latent)
guide = networks.build_label_map_guide(args.guide, args.latent, len(table), grid.shape)
losses = []
with pyro.get_param_store().scope():  # the store is global: this training's parameters leave with the scope
    svi = SVI(ShapeModel(prior), guide, pyro.optim.Adam({"lr": 1e-3}), loss=ELBOS[args.elbo](max_plate_nesting=1))
    for step in range(args.steps):
        chosen = torch.randint(len(labels), (8,))  # tens of maps are few: each is deformed anew every time
        batch = augmentation.deform(labels[chosen], observed[chosen], random, grid.spacing[0])
        losses.append(svi.step(*batch) / batch[0].numel())
        print(f"step {step + 1} of {args.steps}: loss per voxel {losses[-1]:.4f}", flush=True)
calibration.calibrate_prior(prior, guide, labels, observed)  # lay N(0, I) over the maps, not their deformed copies
described = {"table": table.to_dict(), "grid": grid.to_dict(), "decoder": args.decoder, "latent": args.latent}
described |= {"prior": prior.state_dict(), "losses": losses}
torch.save(described, args.out)  # no objects: weights_only=True reads it
