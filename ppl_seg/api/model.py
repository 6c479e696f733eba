"""A learned model that segments scans."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ppl_seg import __version__
from ppl_seg.api.learned_model import LearnedModel, corrects_bias_field
from ppl_seg.api.scan_inference import encode_label_map, infer_scan
from ppl_seg.api.trust import trust
from ppl_seg.data.alignment import check_alignment
from ppl_seg.data.fields import check_view
from ppl_seg.data.loading import OwnScan, load_scan, nearest_voxels
from ppl_seg.data.names import parse_name
from ppl_seg.data.resampling import inside as inside_of
from ppl_seg.errors import InputError
from ppl_seg.inference.partial_volume import OwnVoxels
from ppl_seg.inference.trainer import resolve_device
from ppl_seg.inference.training_options import derived_seed
from ppl_seg.results.provenance import Stopwatch
from ppl_seg.results.readout import read_out
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.volumes import border_flags, label_quality

_ONE_AT_A_TIME = threading.Lock()  # Pyro's handlers and torch's random numbers are the process', not a thread's


@dataclass
class Model(LearnedModel):
    """What `learn_prior` and `fit_scans` give."""

    def segment(
        self,
        scan: str | Path | tuple[Path, ...],
        *,
        draws: int = 200,
        refine: int | None = None,
        mask: str | Path = "auto",
        readout: str | None = None,
        objective: str | None = None,
        guide: str | None = None,
        likelihood_power: float | None = None,
        bias_field: str | None = None,
        align: str | None = None,
        channel_align: str = "rigid",
        view: str | None = None,
        recipe: str | None = None,
        shape_from: str | Path | None = None,
        keep_probabilities: bool = False,
        keep_draws: bool = False,
        share: float = 1.0,
        seed: int = 0,
        device: str = "auto",
    ) -> Segmentation:
        """Segment one scan, in its own voxels.

        Args:
            scan: a file, or a tuple of its channels' files.
            draws: S, draws of z and of whole segmentations.
            refine: gradient steps for this scan; None takes the recipe's, 0 leaves what the encoder says.
            mask: auto, none, or a mask's file.
            readout: `marginals` (argmax of the label marginals) or `decoder` (argmax of f).
            objective, guide, likelihood_power, bias_field, align, recipe: in place of the model's.
            channel_align: rigid or none, for channels after the first.
            view: brain or head, where the user knows what the scan shows; None decides.
            shape_from: a label map of this scan whose q(z|s) stands for the inference of z: a ceiling, no segmentation.
            keep_probabilities, keep_draws: keep the label marginals, all drawn segmentations.
            share: of the read-out's usual working memory; less takes longer.

        Raises:
            InputError: a file that can't be read, options that don't fit the model.
        """
        trust(guide, objective)
        watch = Stopwatch()
        paths = scan if isinstance(scan, tuple | list) else (Path(scan),)
        asked = self.checked_recipe(recipe, objective, guide, readout, likelihood_power, bias_field)
        check_alignment(align or self.align)
        check_view(view)
        if draws < 1 or (refine or 0) < 0:
            raise InputError(f"--draws {draws}, --refine {refine}: expected at least 1 draw and 0 steps")
        if len(paths) != self.channels and self.scan_guide is not None:
            raise InputError(
                f"{paths[0]}: the model was fitted to scans of {self.channels} channels; found {len(paths)}; "
                "see --channels"
            )
        where = resolve_device(device)
        own = load_scan(paths, mask, channel_align)
        watch.lap("read")
        fitting, shown = self.for_scan(own, view)
        if shown == "head" and fitting.field_of_view == "brain":
            said = f"{own.image.path}: a whole head, and the prior knows only brains; give --mask, or --brain"
            own = replace(own, image=replace(own.image, warnings=(*own.image.warnings, said)))
        chosen = fitting.adapted_recipe(asked)
        corrected = corrects_bias_field(chosen, own, shown)
        if not corrected:
            chosen = replace(chosen, bias_field="none")
        normalised, on_grid, observed, alignment = fitting.place(own, align, shown, chosen)
        watch.lap("align")
        forked = [torch.cuda.current_device()] if where.type == "cuda" else []
        with _ONE_AT_A_TIME, torch.enable_grad(), torch.random.fork_rng(devices=forked):
            torch.manual_seed(derived_seed(seed, 0, _fingerprint(own)))
            encoded = None if shape_from is None else encode_label_map(fitting, shape_from, own.image, alignment, where)
            shows = inside_of(alignment.matrix, own.image.shape, fitting.grid.shape)
            own_voxels = None
            if chosen.shared_steps:
                nearest = nearest_voxels(normalised, own.observed, alignment.matrix, fitting.grid.shape)
                own_voxels = OwnVoxels(*nearest)
            data = (on_grid.to(where), observed.to(where))
            found = infer_scan(fitting, chosen, *data, refine, encoded, inside=shows, own_voxels=own_voxels)
            z = found.posterior.sample(draws)[:, 0]
            watch.lap("infer")
            result = read_out(
                found.model,
                z,
                found.posterior.theta,
                normalised.to(where),
                own.observed.to(where),
                alignment.matrix,
                fitting.grid.spacing,
                chosen.readout,
                keep_draws,
                keep_probabilities,
                own.inside.to(where),
                share,
                found.log_u,
                chosen.power_at(own.image.voxel_volume),
                chosen.label_share if fitting.learned_asleep else chosen.awake_share,
            )
        positions = result.labels.cpu().numpy()
        quality = label_quality(positions, result.confidence.cpu().numpy(), len(self.table))
        label_map = self.table.from_positions(positions)
        reach = inside_of(np.linalg.inv(alignment.matrix), fitting.grid.shape, own.image.shape).numpy()
        watch.lap("readout")
        return Segmentation(
            image=own.image,
            table=self.table,
            label_map=label_map,
            entropy=result.entropy.cpu().numpy().astype(np.float32),
            probabilities=None if result.marginals is None else result.marginals.cpu().numpy(),
            draws=None if result.draws is None else self.table.from_positions(result.draws.cpu().numpy()),
            volume_draws=result.counts.cpu().numpy() * own.image.voxel_volume,
            touches_border=border_flags(label_map, self.table, reach),
            z_draws=z.cpu().numpy(),
            observed_scan=on_grid[0].numpy(),
            observed=observed[0].numpy(),
            alignment=alignment,
            sample_stats={"log_evidence": result.log_likelihood.cpu().numpy()},
            bound={"bound": found.bound, "kl": found.kl},
            provenance={
                "sources": [str(path) for path in paths],
                "scan": parse_name(paths[0]).stem,
                "version": __version__,
                "model_hash": self.hash,
                "seed": seed,
                "options": self.options(
                    asked,
                    draws=draws,
                    refine=refine,
                    mask=mask,
                    align=align,
                    channel_align=channel_align,
                    view=view,
                    seed=seed,
                ),
                "bias_field": "n4" if corrected else "none",
                "likelihood_power": chosen.beta,
                "deformation_strength": found.strength,
                "readout_power": chosen.power_at(own.image.voxel_volume),
                "seconds": watch.seconds,
                "device": str(where),
                "field": fitting.field_of_view,
                "quality": dict(zip(self.table.names, (float(q) for q in quality), strict=True)),
            },
        )


def _fingerprint(own: OwnScan) -> str:
    """Of a scan's content, in whatever unit and file: each scan has draws of its own."""
    seen = own.intensities[own.observed].double()
    low, high = seen.min(), seen.max()
    steps = (255 * (seen - low) / (high - low).clamp(min=torch.finfo(seen.dtype).tiny)).round().to(torch.uint8)
    return hashlib.sha256(steps.numpy().tobytes()).hexdigest()
