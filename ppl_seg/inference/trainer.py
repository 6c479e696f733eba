"""Training of any (model, guide, objective): one loop checkpoints, early stop, a log of named terms."""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from ppl_seg.errors import InputError
from ppl_seg.inference.checkpoint import (
    flatten,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    unflatten,
)
from ppl_seg.inference.parameters import Parameters
from ppl_seg.inference.progress import progress_bar
from ppl_seg.inference.task import Batch, Task
from ppl_seg.inference.training_log import LogWriter, TrainingLog
from ppl_seg.inference.training_options import TrainingOptions, derived_seed, resolve_device

__all__ = ["Batch", "Task", "TrainingError", "TrainingLog", "TrainingOptions", "fit", "resolve_device"]

Directory = str | os.PathLike[str]


class TrainingError(RuntimeError):
    """A training that can't go on: a bound or gradient that is not finite."""


def fit(
    model: nn.Module,
    guide: nn.Module,
    objective: Any,
    task: Task,
    options: TrainingOptions | None = None,
    *,
    directory: Directory | None = None,
    resume: bool = False,
    keep_checkpoint: bool = False,
    progress: bool = True,
) -> TrainingLog:
    """Maximise `objective`'s bound over the parameters of `model` and `guide` that require a gradient.

    `objective.differentiable_loss(model, guide, *batch.args)` is minus the bound, summed over the batch, and
    `objective.loss` its value for held-out batches; both are divided by B·J here. Every step is seeded from
    (seed, step): a training that was killed and resumed from the checkpoint in `directory` ends with the
    weights of an uninterrupted one, bit for bit on a CPU with the same number of threads. The caller's random
    state and Pyro's parameter store are afterwards as they were; modules keep their train and eval modes. The
    checkpoint is removed at the end, or with `keep_checkpoint` left at the last step until the caller has
    stored the model and calls `remove_checkpoint`.

    Raises: TrainingError at a bound or gradient that is not finite; InputError for a device that is absent
    and for a checkpoint of another model or other options; ValueError for parameters that Pyro would mix up.
    """
    options = options or TrainingOptions()
    device = resolve_device(options.device)
    forked = [torch.cuda.current_device()] if device.type == "cuda" else []
    with (
        pyro.get_param_store().scope(),
        pyro.settings.context(module_local_params=False),
        torch.random.fork_rng(devices=forked),
    ):
        run = _Run(model.to(device), guide.to(device), objective, task, options, device)
        start = 0
        if directory is not None:
            if resume:
                start = run.restore(directory)
            else:
                remove_checkpoint(directory)
        run.train(start, directory, progress)
        if directory is not None:
            if keep_checkpoint:
                run.save(directory, run.log.steps)
            else:
                remove_checkpoint(directory)
        run.take_best()
        return run.log


class _Run:
    """One training's state: what a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        objective: Any,
        task: Task,
        options: TrainingOptions,
        device: torch.device,
    ) -> None:
        self.model, self.guide, self.objective, self.task = model, guide, objective, task
        self.options, self.device = options, device
        self.log = TrainingLog()
        self.best: dict[str, Tensor] = {}
        self.best_task: dict[str, Any] = {}
        self.worse = 0  # evaluations since the best one
        self.elapsed = 0.0
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            with torch.no_grad():  # Pyro's automatic guides have no parameters before their first call
                guide(*self._batch(1).args)
        self.parameters = Parameters(model, guide)
        self.optimizer = torch.optim.Adam(list(self.parameters.trainable.values()), lr=options.learning_rate)

    def train(self, start: int, directory: Directory | None, progress: bool) -> None:
        """The steps after `start`."""
        options = self.options
        writer = LogWriter(self.log, directory, start)
        began, saved = time.monotonic() - self.elapsed, time.monotonic()
        with contextlib.closing(writer), progress_bar(options.steps, start, progress) as show:
            for step in range(start + 1, options.steps + 1):
                if self.log.stopped_early:
                    break
                row = self._step(step)
                if options.eval_every and (step % options.eval_every == 0 or step == options.steps):
                    self._evaluate(step, row)
                self.elapsed = row["seconds"] = time.monotonic() - began
                writer.write(row)
                show(step, row)
                by_steps = options.checkpoint_every and step % options.checkpoint_every == 0
                if directory is not None and (by_steps or time.monotonic() - saved >= options.checkpoint_seconds):
                    self.save(directory, step)
                    saved = time.monotonic()

    def take_best(self) -> None:
        """Go back to the weights and the task's state of the best held-out bound."""
        if self.best:
            self.parameters.load(self.best, "best")
            self.task.load_state_dict(self.best_task)

    def save(self, directory: Directory, step: int) -> None:
        """Write a checkpoint after `step`."""
        tensors = self.parameters.tensors("now") | self.best
        state: dict[str, Any] = {"options": self.options.identity(), "step": step}
        state |= {"elapsed": self.elapsed, "worse": self.worse}
        state["log"] = [self.log.best_step, self.log.best_held_out, self.log.stopped_early]
        parts = {
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state_dict(),
            "best_task": self.best_task,
        }
        for name, part in parts.items():
            more, state[name] = flatten(part, name)
            tensors |= more
        save_checkpoint(directory, tensors, state)

    def restore(self, directory: Directory) -> int:
        """Go back to the directory's checkpoint; its step, 0 where the training died before the first one."""
        found = load_checkpoint(directory)
        if found is None:
            return 0
        tensors, state = found
        mine = self.options.identity()
        if changed := [name for name, value in mine.items() if state["options"].get(name) != value]:
            raise InputError(
                f"{os.fspath(directory)}: the checkpoint was made with another {', '.join(changed)}; give "
                "the same options, or train again without --resume"
            )
        self.parameters.load(tensors, "now")
        self.optimizer.load_state_dict(unflatten(state["optimizer"], tensors))
        for parameter, values in self.optimizer.state.items():
            for (
                name,
                value,
            ) in values.items():  # in the memory format in which the optimiser would have made it
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        self.task.load_state_dict(unflatten(state["task"], tensors))
        self.best = {name: t.to(self.device) for name, t in tensors.items() if name.startswith("best/")}
        self.best_task = unflatten(state["best_task"], tensors)
        self.elapsed, self.worse = state["elapsed"], state["worse"]
        self.log.best_step, self.log.best_held_out, self.log.stopped_early = state["log"]
        return int(state["step"])

    def _batch(self, step: int) -> Batch:
        torch.manual_seed(derived_seed(self.options.seed, step, "batch"))
        generator = torch.Generator().manual_seed(derived_seed(self.options.seed, step, "generator"))
        return self.task.batch(step, generator)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _step(self, step: int) -> dict[str, float]:
        batch = self._batch(step)
        rate = self.options.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        try:
            torch.manual_seed(derived_seed(self.options.seed, step, "loss"))
            with self._autocast():
                loss: Tensor = self.objective.differentiable_loss(self.model, self.guide, *batch.args)
        except ValueError as error:  # Pyro's own validation may meet the NaN first
            if self.parameters.first_not_finite() is None:
                raise
            raise self._stop(step, "bound") from error
        if not loss.requires_grad:
            raise ValueError("the loss depends on no trainable parameter of model or guide")
        loss = loss / batch.size
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 1:
            self.parameters.check_store()
        trained = list(self.parameters.trainable.values())
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise self._stop(step, "gradient" if math.isfinite(value) else "bound")
        nn.utils.clip_grads_with_norm_(trained, self.options.clip_norm, norm)
        row: dict[str, float] = {"step": step, "bound_per_voxel": -value}
        if step == 1 or step % self.options.terms_every == 0:  # before the step: the terms of this very bound
            row |= self._terms(batch, step)
        row["learning_rate"] = rate
        self.optimizer.step()
        self.task.after_step(step, batch)
        return row

    def _terms(self, batch: Batch, step: int) -> dict[str, float]:
        torch.manual_seed(derived_seed(self.options.seed, step, "loss"))
        with torch.no_grad(), self._autocast():
            terms = self.task.terms(self.model, self.guide, batch.args)
        return {name: float(value) / batch.size for name, value in terms.items()}

    def _evaluate(self, step: int, row: dict[str, float]) -> None:
        """The held-out bound per voxel, always from the same random numbers, and what follows from it."""
        total, size = 0.0, 0
        with torch.no_grad(), self.parameters.evaluation_mode(), self._autocast():
            for i, batch in enumerate(self.task.held_out()):
                torch.manual_seed(derived_seed(self.options.seed, i, "held out"))
                total -= float(self.objective.loss(self.model, self.guide, *batch.args))
                size += batch.size
        if size == 0:
            return
        row["held_out"] = bound = total / size
        if self.log.best_held_out is None or bound > self.log.best_held_out:
            self.log.best_held_out, self.log.best_step, self.worse = bound, step, 0
            if self.options.patience:
                self.best = _copies(self.parameters.tensors("best"))
                tensors, rest = flatten(self.task.state_dict(), "best_task")
                self.best_task = unflatten(rest, _copies(tensors))
        else:
            self.worse += 1
            self.log.stopped_early = 0 < self.options.patience <= self.worse

    def _stop(self, step: int, what: str) -> TrainingError:
        terms = ", ".join(f"{name} {value:.6g}" for name, value in self.log.last_terms().items()) or "none yet"
        where = self.parameters.first_not_finite() or "no parameter, so the batch or the objective is to blame"
        return TrainingError(
            f"step {step}: the {what} is not finite; last finite terms: {terms}; first not finite: {where}. "
            "A smaller learning rate may help; look for extreme intensities in the scans as well"
        )


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
