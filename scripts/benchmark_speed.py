"""Time and memory of the voxel factor p(x | z), value and gradient: fused, and written by hand.

    python scripts/benchmark_speed.py --voxels 860160 --labels 32

Each method runs in a process of its own, so that its peak memory is its own; the table is markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch is imported by the measured processes alone: what a child inherits would count towards its peak
if TYPE_CHECKING:
    from torch import Tensor

Evaluate = Callable[[], "tuple[Tensor, Tensor]"]  # the value, and its gradient in the scores

METHODS = {
    "fused": "fused, exact",
    "fused-jensen": "fused, Jensen",
    "logsumexp": "hand-written logsumexp, exact",
    "jensen": "hand-written Jensen",
    "enum": "Pyro's TraceEnum_ELBO, exact",
}


def make_problem(voxels: int, labels: int) -> dict[str, Any]:
    """One scan of one channel; labels share classes in pairs, the background has three Gaussians."""
    import torch

    from ppl_seg.models.intensity import IntensityModel, IntensityParameters

    torch.manual_seed(0)
    class_of_label = [0, *(1 + m // 2 for m in range(labels - 1))]
    intensity = IntensityModel(class_of_label, [3] + [1] * (labels // 2))
    components = intensity.num_components
    log_weight = torch.zeros(1, components)
    log_weight[:, :3] = torch.randn(3).log_softmax(0)
    mean, sd = torch.rand(1, components, 1), 0.05 + 0.1 * torch.rand(1, components, 1)
    return {
        "scores": torch.randn(1, labels, voxels),
        "log_prior": torch.randn(labels, voxels).log_softmax(0),
        "scan": torch.rand(1, 1, voxels),
        "observed": torch.rand(1, 1, voxels) > 0.1,
        "theta": IntensityParameters(mean, sd, log_weight),
        "intensity": intensity,
    }


def by_function(problem: dict[str, Any], method: str) -> Evaluate:
    """The fused functions, and the expressions one would write without them."""
    import torch

    from ppl_seg.models.likelihood import label_mixture_expected_log_prob, label_mixture_log_prob

    log_prior, scan, observed, theta, intensity = (
        problem[key] for key in ("log_prior", "scan", "observed", "theta", "intensity")
    )
    scores = problem["scores"].requires_grad_()

    def evaluate() -> tuple[Tensor, Tensor]:
        if method in ("fused", "fused-jensen"):
            fused = label_mixture_log_prob if method == "fused" else label_mixture_expected_log_prob
            value = fused(scores, log_prior, scan, observed, theta, intensity).sum()
        else:
            a = scores + log_prior
            log_likelihood = intensity.label_log_prob(scan, observed, theta)
            if method == "logsumexp":
                factor = (a + log_likelihood).logsumexp(-2) - a.logsumexp(-2)
            else:
                factor = (a.softmax(-2) * log_likelihood).sum(-2)
            value = (factor * observed[:, 0]).sum()
        return value.detach(), torch.autograd.grad(value, scores)[0]

    return evaluate


def by_enumeration(problem: dict[str, Any]) -> Evaluate:
    """Pyro's TraceEnum_ELBO on the enumerated program; q(z) = p(z), so that only the factor remains."""
    import pyro
    import torch
    from pyro.infer import TraceEnum_ELBO
    from torch import nn

    from ppl_seg.models.segmentation import SegmentationModel
    from ppl_seg.models.shape_prior import ShapePrior

    class Scores(nn.Module):
        """A decoder whose output is its parameter, whatever z."""

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(problem["scores"])

        def forward(self, z: Tensor) -> Tensor:
            return self.scores

    decoder = Scores()
    shape_prior = ShapePrior(problem["log_prior"].exp(), decoder, latent_dim=1)
    model = SegmentationModel(shape_prior, problem["intensity"], form="enumerated")
    elbo = TraceEnum_ELBO(max_plate_nesting=model.max_plate_nesting)

    def guide(*_: Any) -> None:
        with pyro.plate("scans", 1, dim=-1):
            pyro.sample("z", shape_prior.prior())

    def evaluate() -> tuple[Tensor, Tensor]:
        loss = elbo.differentiable_loss(model, guide, problem["scan"], problem["observed"], problem["theta"])
        return -loss.detach(), -torch.autograd.grad(loss, decoder.scores)[0]

    return evaluate


def measure(method: str, voxels: int, labels: int, repeats: int, threads: int | None) -> dict[str, Any]:
    """The quickest of `repeats` calls after one to warm up; memory of the whole process, GB."""
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())
    problem = make_problem(voxels, labels)
    evaluate = by_enumeration(problem) if method == "enum" else by_function(problem, method)
    value, gradient = evaluate()
    norm = gradient.norm()
    del gradient
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        evaluate()
        seconds.append(time.perf_counter() - start)
    found = {"seconds": min(seconds), "peak_gb": peak_memory_gb(), "threads": torch.get_num_threads()}
    return {"method": method, "value": float(value), "gradient_norm": float(norm), **found}


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, GB (1e9 bytes)."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_a_fresh_process(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure`, by this script in another process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", method]
    for name in ("voxels", "labels", "repeats", "threads"):
        value = getattr(arguments, name)
        command += [f"--{name}", str(value)] if value is not None else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{METHODS[method]}: the process ended with status {done.returncode} (out of memory?)")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a method, its time against the fused exact factor's."""
    base = next((row["seconds"] for row in rows if row["method"] == "fused"), float("nan"))
    lines = ["| value and gradient | seconds | × fused | peak GB | value |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = (row["seconds"], row["seconds"] / base, row["peak_gb"], row["value"])
        cells = [format(n, f) for n, f in zip(numbers, (".3g", ".1f", ".2f", ".6g"), strict=True)]
        lines.append(f"| {' | '.join([METHODS[row['method']], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--voxels", type=int, default=80 * 96 * 112, help="J (default: 80·96·112)")
    parser.add_argument("--labels", type=int, default=32, help="M (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: its own choice)")
    parser.add_argument("--only", choices=METHODS, help="measure one method in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.voxels < 1 or arguments.labels < 2 or arguments.repeats < 1:
        parser.error("expected at least 1 voxel, 2 labels and 1 repeat")
    if arguments.only:
        sizes = (arguments.voxels, arguments.labels, arguments.repeats, arguments.threads)
        print(json.dumps(measure(arguments.only, *sizes)))
        return
    rows = [in_a_fresh_process(method, arguments) for method in METHODS]
    sizes_text = f"{arguments.voxels} voxels, {arguments.labels} labels, {rows[0]['threads']} thread(s)"
    print(f"{sizes_text}; peak memory of the whole process, libraries (0.25 GB) included\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
