from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_seg.errors import InputError
from ppl_seg.inference.trainer import Batch, Task, TrainingError, TrainingOptions, fit, resolve_device
from tests.inference import toy
from tests.inference.toy import rows, weights


class Whole(Task):
    """All data in each batch."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        return Batch((self.data,), *self.data.shape)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1), TraceMeanField_ELBO()],
)
def test_reaches_the_known_posterior(objective: Any) -> None:
    data, guide = toy.Toy().data, toy.Guide()
    options = TrainingOptions(steps=300, learning_rate=0.05, clip_norm=100.0)
    log = fit(toy.Model(), guide, objective, Whole(data), options, progress=False)
    n = toy.VOXELS
    assert guide.encoder.weight.item() == pytest.approx(n / (n + 1), abs=0.02)
    assert guide.encoder.bias.item() == pytest.approx(0.0, abs=0.02)
    assert guide.log_scale.exp().item() == pytest.approx((n + 1) ** -0.5, abs=0.02)
    last = sum(row["bound_per_voxel"] for row in log.rows[-50:]) / 50
    assert last == pytest.approx(toy.log_evidence(data) / data.numel(), abs=0.01)


def test_autoguide_is_trained() -> None:
    data, model = toy.Toy().data[:3], toy.Model()
    guide = AutoNormal(model)
    fit(
        model,
        guide,
        Trace_ELBO(),
        Whole(data),
        TrainingOptions(steps=300, learning_rate=0.05),
        progress=False,
    )
    assert torch.allclose(guide.median()["z"], data.sum(1) / (toy.VOXELS + 1), atol=0.2)


def test_seed_decides_and_callers_random_state_stays() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = weights(toy.train(None, resume=False)[0])
    torch.manual_seed(3)
    guide = toy.Guide()
    before = torch.random.get_rng_state()
    fit(toy.Model(), guide, Trace_ELBO(), toy.Toy(), TrainingOptions(steps=2), progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    second = weights(toy.train(None, resume=False, seed=1)[0])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(state, before)


class Poisoned(toy.Toy):
    """Data that are NaN from step 13 on."""

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        batch = super().batch(step, generator)
        return batch if step < 13 else Batch((batch.args[0] * math.nan,), *batch.args[0].shape)


def test_nan_stops_with_step_terms_and_parameter() -> None:
    with pyro.validation_enabled(False), pytest.raises(TrainingError) as caught:
        toy.train(None, resume=False, task=Poisoned(held_out=16))
    message = str(caught.value)
    assert "step 13: the bound is not finite" in message
    assert "bound_per_voxel -" in message and "log_q" in message
    assert "first not finite: gradient of guide.log_scale" in message


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def test_bad_gradient_names_only_its_parameter() -> None:
    class Objective:
        def differentiable_loss(self, model: Any, guide: Any, x: Tensor) -> Tensor:
            return guide.encoder.weight.sum() + guide.log_scale + BadGradient.apply(guide.encoder.bias).sum()

    with pytest.raises(TrainingError, match="step 1: the gradient is not finite.*gradient of guide.encoder.bias"):
        fit(toy.Model(), toy.Guide(), Objective(), toy.Toy(), progress=False)


def test_nan_parameter_found_by_pyros_validation_is_named() -> None:
    guide = toy.Guide()
    with torch.no_grad():
        guide.encoder.bias.fill_(math.nan)
    with pyro.validation_enabled(True), pytest.raises(TrainingError, match="value of guide.encoder.bias"):
        fit(toy.Model(), guide, Trace_ELBO(), toy.Toy(), progress=False)


def test_early_stop_restores_the_best_weights_and_state() -> None:
    class Scripted(toy.Toy):
        """Held-out data at which the guide gets worse after the third evaluation."""

        def __init__(self) -> None:
            super().__init__()
            self.evaluations = 0
            self.seen: list[tuple[list[Tensor], Tensor]] = []

        def held_out(self) -> Iterable[Batch]:
            self.evaluations += 1
            self.seen.append((weights(guide), self.offset))
            shift = abs(self.evaluations - 3)
            return [Batch((self.data[:8] + 10.0 * shift,), 8, toy.VOXELS)]

    guide, task = toy.Guide(), Scripted()
    options = TrainingOptions(steps=100, learning_rate=0.05, eval_every=5, patience=4)
    log = fit(toy.Model(), guide, Trace_ELBO(), task, options, progress=False)
    assert log.stopped_early and log.best_step == 15 and log.steps == 35
    best, offset = task.seen[2]
    assert all(torch.equal(a, b) for a, b in zip(weights(guide), best, strict=True))
    assert torch.equal(task.offset, offset)
    assert log.column("held_out")[0] == [5, 10, 15, 20, 25, 30, 35]
    assert log.best_held_out == max(log.column("held_out")[1])


def test_held_out_evaluation_uses_one_set_of_random_numbers_and_eval_mode() -> None:
    modes = []

    class Watching(toy.Guide):
        def forward(self, x: Tensor) -> Tensor:
            modes.append((self.training, self.encoder.training))
            return super().forward(x)

    guide = Watching()
    guide.encoder.eval()
    options = TrainingOptions(steps=3, learning_rate=1e-12, eval_every=1)
    log = fit(toy.Model(), guide, Trace_ELBO(), toy.Toy(held_out=16), options, progress=False)
    values = log.column("held_out")[1]
    assert max(values) - min(values) < 1e-6
    assert set(modes) == {(True, False), (False, False)}
    assert guide.training and not guide.encoder.training


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1), TraceMeanField_ELBO()])
def test_held_out_bound_is_near_the_evidence(objective: Any) -> None:
    guide, task = toy.Guide(), toy.Toy(held_out=16)
    n = toy.VOXELS
    with torch.no_grad():  # the exact posterior, which the steps hardly leave
        guide.encoder.weight.fill_(n / (n + 1))
        guide.encoder.bias.zero_()
        guide.log_scale.fill_(-0.5 * math.log(n + 1))
    options = TrainingOptions(steps=2, learning_rate=1e-9, eval_every=2)
    log = fit(toy.Model(), guide, objective, task, options, progress=False)
    exact = toy.log_evidence(task.data[:16]) / (16 * n)
    noise = 0.1 if isinstance(objective, TraceMeanField_ELBO) else 1e-5  # only the sampled KL cancels the noise
    assert log.best_held_out == pytest.approx(exact, abs=noise)


def moved(before: list[Tensor], after: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("kind", ["fit", "svi", "torch"])
def test_every_parameter_moves_in_a_second_training_too(kind: str) -> None:
    data = toy.Toy().data
    for _ in range(2):
        model, guide = toy.Model(), toy.Guide()
        before = weights(guide)
        if kind == "fit":
            fit(model, guide, Trace_ELBO(), toy.Toy(), TrainingOptions(steps=2), progress=False)
        else:
            with pyro.get_param_store().scope():
                if kind == "svi":
                    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO()).step(data)
                else:
                    optimiser = torch.optim.Adam(guide.parameters(), lr=0.01)
                    Trace_ELBO()(model, guide)(data).backward()
                    optimiser.step()
        assert all(moved(before, weights(guide)))
        assert len(pyro.get_param_store()) == 0


def test_frozen_network_stays_and_trainable_part_of_the_model_moves() -> None:
    class Decoding(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.scale = nn.Linear(1, 1).requires_grad_(False).eval(), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("scans", len(x)):
                z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
                loc = self.scale(self.frozen(z[:, None]))
                pyro.sample("x", pyro.distributions.Normal(loc.expand(x.shape), 1.0).to_event(1), obs=x)

    model = Decoding()
    frozen, trained = weights(model.frozen), weights(model.scale)
    fit(model, toy.Guide(), Trace_ELBO(), toy.Toy(), TrainingOptions(steps=3), progress=False)
    assert not any(moved(frozen, weights(model.frozen)))
    assert all(moved(trained, weights(model.scale)))
    assert all(parameter.grad is None for parameter in model.frozen.parameters())


def test_pyros_traps_are_errors() -> None:
    class Frozen(toy.Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor) -> None:
            return super().forward(x * self.scale)

    with pytest.raises(ValueError, match="unfroze a frozen parameter"):
        fit(Frozen(), toy.Guide(), Trace_ELBO(), toy.Toy(), progress=False)

    class Functional(toy.Model):
        def forward(self, x: Tensor) -> None:
            return super().forward(x * pyro.param("loose", torch.ones(())))

    with pytest.raises(ValueError, match="loose was made by pyro.param"):
        fit(Functional(), toy.Guide(), Trace_ELBO(), toy.Toy(), progress=False)
    model = toy.Model()
    model.encoder = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="both have a parameter 'encoder.weight'"):
        fit(model, toy.Guide(), Trace_ELBO(), toy.Toy(), progress=False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(toy.Model(), toy.Guide().requires_grad_(False), Trace_ELBO(), toy.Toy(), progress=False)


def test_rows_and_terms(tmp_path: Path) -> None:
    _, log = toy.train(str(tmp_path), resume=False, steps=12, terms_every=5, warmup_steps=4, patience=0)
    found = rows(tmp_path / "training.csv")
    assert list(found[0]) == ["step", "bound_per_voxel", "log_q", "held_out", "learning_rate", "seconds"]
    assert [int(row["step"]) for row in found if row["log_q"]] == [1, 5, 10] == log.column("log_q")[0]
    assert [int(row["step"]) for row in found if row["held_out"]] == [4, 8, 12]
    rates = [float(row["learning_rate"]) for row in found]
    assert rates[:5] == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05])
    assert rates[-1] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert log.seconds == float(found[-1]["seconds"]) > 0
    assert log.last_terms() == {
        "bound_per_voxel": float(found[-1]["bound_per_voxel"]),
        "log_q": float(found[9]["log_q"]),
    }


def test_terms_are_of_the_very_bound() -> None:
    class Same(toy.Toy):
        def terms(self, model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, float]:
            return {"again": -Trace_ELBO().loss(model, guide, *args)}

    _, log = toy.train(None, resume=False, task=Same(), terms_every=1, eval_every=0)
    for row in log.rows:
        assert row["again"] == pytest.approx(row["bound_per_voxel"], rel=1e-5)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.Adam.step

    def watching(self: torch.optim.Adam, *args: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watching)
    toy.train(None, resume=False, clip_norm=1e-3)
    assert max(norms) <= 1e-3 * (1 + 1e-4)


def test_bf16_runs_the_networks_in_bf16() -> None:
    dtypes = []
    guide = toy.Guide()
    guide.encoder.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    fit(
        toy.Model(),
        guide,
        Trace_ELBO(),
        toy.Toy(),
        TrainingOptions(steps=2, precision="bf16"),
        progress=False,
    )
    assert set(dtypes) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in guide.parameters())


def test_options_and_devices() -> None:
    with pytest.raises(InputError, match="choose 32 or bf16"):
        TrainingOptions(precision="16")
    with pytest.raises(InputError, match="choose auto, cpu or cuda"):
        resolve_device("tpu")
    assert resolve_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    else:
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match="no CUDA GPU"):
            fit(
                toy.Model(),
                toy.Guide(),
                Trace_ELBO(),
                toy.Toy(),
                TrainingOptions(device="cuda"),
                progress=False,
            )


def test_progress_bar_shows_the_terms(capfd: pytest.CaptureFixture[str]) -> None:
    fit(toy.Model(), toy.Guide(), Trace_ELBO(), toy.Toy(), TrainingOptions(steps=3), progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and "3/3" in shown.err


@pytest.mark.cuda
def test_trains_on_a_gpu() -> None:
    class OnGpu(toy.Toy):
        def batch(self, step: int, generator: torch.Generator) -> Batch:
            batch = super().batch(step, generator)
            return Batch((batch.args[0].cuda(),), batch.num_scans, batch.num_voxels)

        def after_step(self, step: int, batch: Batch) -> None:
            pass

    guide = toy.Guide()
    log = fit(toy.Model(), guide, Trace_ELBO(), OnGpu(), TrainingOptions(steps=3, device="cuda"), progress=False)
    assert log.steps == 3 and guide.encoder.weight.is_cuda
