"""The training loop. It sums the named losses a model returns, and that is all it knows of a model."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import nvtx
import torch
from torch import Tensor, nn

from eventkern.train.boards import require_board
from eventkern.train.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    CheckpointFolder,
    load_checkpoint,
    load_weights,
    random_state,
    set_random_state,
)
from eventkern.train.config import ConfigError, TrainerConfig, to_mapping
from eventkern.train.curves import plot_curves
from eventkern.train.device import autocast, seed_everything, select_device, select_precision
from eventkern.train.environment import environment
from eventkern.train.evaluation import evaluate
from eventkern.train.ledger import Ledger
from eventkern.train.logging import RunLog
from eventkern.train.meter import Meter
from eventkern.train.optim import Schedule, build_optimizer
from eventkern.train.protocols import BatchLoader, TrainableModel
from eventkern.train.run_folder import fresh_folder, locked

LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class Loaders:
    """The training data in random order, and the validation data, of which every pass sees all."""

    train: BatchLoader
    validation: BatchLoader


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: optimizer steps and epochs taken, best summed validation loss, whether a signal stopped it."""

    step: int
    epochs_done: int
    best_loss: float
    interrupted: bool


@dataclass(frozen=True)
class Outcome:
    """One optimizer step, still on the device: (H,) losses, the gradient norm before clipping, the learning rate."""

    losses: Tensor
    grad_norm: Tensor
    lr: float


class Trainer:
    """Trains a model; leaves metrics.jsonl, ledger.json, curves.png, TensorBoard events and checkpoints/ in `run_dir`.

    One optimizer step draws `grad_accum` micro-batches and weights each by its num_targets, so that it equals the step
    on one large batch to float32 rounding. Unless a log, evaluation or checkpoint is due, no step waits for the device.

    A checkpoint holds: model (the plain state_dict), optimizer, schedule, random (generator states), loader (its
    position), step, epochs_done, best_loss, config, metadata, environment. Ctrl-C and SIGTERM finish the step (and the
    evaluation it is due), save, and end the run; a second Ctrl-C aborts it.

    Args:
        model: a TrainableModel; moved to the device of the configuration.
        config: the settings.
        loaders: training and validation batches on that device; a pair of loaders is taken in that order.
        run_dir: the run's folder, made if absent; None: runs/<time>, made at once so that no other run takes it.
        ledger: baselines to hold the validation losses against; None: no ledger.
        metadata: plain values to store in each checkpoint, such as the model's configuration.
        resume_command: the command that continues this run, printed when it is interrupted.

    Raises:
        ConfigError: a device that is not there, a log without its package, or a training loader without a batch.
    """

    def __init__(
        self,
        model: TrainableModel,
        config: TrainerConfig,
        loaders: Loaders | tuple[BatchLoader, BatchLoader],
        *,
        run_dir: str | Path | None = None,
        ledger: Ledger | None = None,
        metadata: Mapping[str, Any] | None = None,
        resume_command: str | None = None,
    ) -> None:
        loaders = loaders if isinstance(loaders, Loaders) else Loaders(*loaders)
        if len(loaders.train) == 0:
            raise ConfigError("the training loader has no batch: more data or a smaller batch_size is needed")
        require_board(config.log)
        self.config = config
        self.device = select_device(config.device)
        self.model = model
        model.to(self.device)  # type: ignore[attr-defined]  # overloaded in nn.Module, so no protocol matches it
        self.loaders = loaders
        if run_dir is None:
            run_dir = fresh_folder()
            run_dir.mkdir(parents=True)
        self.run_dir = Path(run_dir)
        self.ledger = ledger
        self.checkpoints = CheckpointFolder(self.run_dir / CHECKPOINTS, config.keep_checkpoints)
        steps_per_epoch = -(-len(loaders.train) // config.grad_accum)
        self.total_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
        self.optimizer = build_optimizer(model.parameters(), config)
        self.schedule = Schedule(self.optimizer, config, self.total_steps)
        self.step = 0
        self.epochs_done = 0
        self.best_loss = float("inf")
        self._metadata = dict(metadata or {})
        self._resume_command = resume_command
        self._precision = select_precision(config.precision, self.device)
        self._resumed = False
        self._stop_requested = False
        self._position: Any = None
        self._meter = Meter(model, self.device, self._precision)
        self._log: RunLog

    def resume(self, path: str | Path, state: Mapping[str, Any] | None = None) -> None:
        """Takes up a checkpoint; the run goes on as if it had never stopped, bitwise on the CPU under the same threads.

        Args:
            path: the checkpoint.
            state: what `load_checkpoint(path)` returned, where that was called already; None: it is read now.

        Raises:
            CheckpointError: a checkpoint that is missing, damaged, of another model or of other training data.
        """
        if state is None:
            state = load_checkpoint(Path(path))
        load_weights(self.model, state["model"], Path(path))
        try:
            self.loaders.train.load_state_dict(state["loader"])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: is of other training data: {error}; give the store it was trained on, or start a fresh run"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._position = state["loader"]
        self.step = state["step"]
        self.epochs_done = state["epochs_done"]
        self.best_loss = state["best_loss"]
        set_random_state(state["random"])
        self._resumed = True

    def fit(self) -> TrainResult:
        """Trains to the end of the last epoch or to max_steps, whichever comes first.

        Raises:
            ConfigError: another process has the run folder, or nothing may be written there.
            FloatingPointError: a loss or the gradient norm of a logged step is not finite; nothing of it is saved.
        """
        if not self._resumed:
            seed_everything(self.config.seed)
            self.loaders.train.set_epoch(0)
        with locked(self.run_dir), self._open_log() as self._log, self._signals():
            if self._finished():
                self._log.say(f"nothing left to do at step {self.step}: raise epochs or max_steps")
                return self._result()
            if self.ledger is not None and not (self.run_dir / LEDGER_FILE).exists():
                self.ledger.save(self.run_dir / LEDGER_FILE)
            self._meter.start()
            ended = False
            while not ended:
                ended = self._train_epoch()
            plot_curves(self.run_dir, self.ledger)
            if not self._finished():
                command = f"; to go on: {self._resume_command}" if self._resume_command else ""
                self._log.say(f"stopped after step {self.step}, saved in {self.checkpoints.path}{command}")
        return self._result()

    def _open_log(self) -> RunLog:
        settings = {**to_mapping(self.config), **self._metadata}
        steps = (self.total_steps, self.step)
        return RunLog(self.run_dir, self.model.head_names, *steps, log=self.config.log, settings=settings)

    def _finished(self) -> bool:
        reached = self.config.max_steps is not None and self.step >= self.config.max_steps
        return reached or self.epochs_done >= self.config.epochs

    def _result(self) -> TrainResult:
        return TrainResult(self.step, self.epochs_done, self.best_loss, interrupted=not self._finished())

    def _train_epoch(self) -> bool:
        """Trains to the end of the epoch, or of the run; returns whether the run has ended."""
        self.model.train()
        epoch = self.epochs_done
        batches = iter(self.loaders.train)
        upcoming = self._draw(batches, 1)
        if not upcoming:  # resumed where a larger batch size leaves nothing of the epoch
            self._next_epoch()
            return self._finished()
        ended = False
        while upcoming and not ended:
            outcome = self._train_step(upcoming + self._draw(batches, self.config.grad_accum - 1))
            # One batch ahead tells whether this step ends its epoch; the position to save is the one before it.
            self._position = self.loaders.train.state_dict()
            upcoming = self._draw(batches, 1)
            if not upcoming:
                self._next_epoch()
            ended = self._after_step(outcome, epoch)
        return ended

    def _next_epoch(self) -> None:
        self.epochs_done += 1
        self.loaders.train.set_epoch(self.epochs_done)
        self._position = self.loaders.train.state_dict()

    def _draw(self, batches: Iterator[Any], count: int) -> list[Any]:
        with _range("data"), self._meter.waiting():
            return list(islice(batches, count))

    def _train_step(self, batches: list[Any]) -> Outcome:
        """One optimizer step on micro-batches weighted by their labels."""
        num_targets = torch.stack([batch.num_targets for batch in batches]).sum()
        losses = torch.zeros(len(self.model.head_names), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            weight = batch.num_targets / num_targets.clamp(min=1)
            with _range("forward"), autocast(self._precision, self.device):
                weighted_losses = self.model(batch) * weight
            with _range("backward"):
                weighted_losses.sum().backward()
            losses += weighted_losses.detach()
        with _range("optimizer"):
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or float("inf"))
            lr = self.schedule.lr
            self.optimizer.step()
            if not self.config.histograms:  # which show them at an evaluation
                self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
        self.step += 1
        self._meter.count(num_targets, batches)
        return Outcome(losses, grad_norm, lr)

    def _after_step(self, outcome: Outcome, epoch: int) -> bool:
        """Logs, evaluates and saves where that is due; returns whether the run ends here."""
        config = self.config
        finished = self._finished()
        ended = finished or self._stop_requested  # read once, so that a run that ends has saved its last step
        epoch_ended = self.epochs_done > epoch
        evaluate_due = self.step % config.evaluate_every == 0 if config.evaluate_every else epoch_ended
        save_due = config.save_every is not None and self.step % config.save_every == 0
        self._log.advance(self.step)
        if not (evaluate_due or save_due or ended or self.step % config.log_every == 0):
            return False
        row, losses = self._measure(outcome, epoch)
        validation = self._evaluate() if evaluate_due or finished else None
        self._log.write(row, losses, validation)
        if validation is not None and config.histograms:
            self._log.write_histograms(self.step, self.model)
        is_best = False
        if validation is not None:
            total = math.fsum(validation["loss"])
            is_best = total < self.best_loss
            self.best_loss = min(total, self.best_loss)
            if evaluate_due:  # not where max_steps ends a run: a longer run would not evaluate there
                self.schedule.evaluated(total)
            self._show_ledger(validation, is_best)
        if save_due or ended or validation is not None:
            self._save(is_best)
        self._meter.start()
        return ended

    def _measure(self, outcome: Outcome, epoch: int) -> tuple[dict[str, float], list[float]]:
        """The step's numbers, in one transfer from the device."""
        numbers = torch.cat([outcome.losses, torch.stack([outcome.grad_norm, self._meter.num_targets]).float()])
        *losses, grad_norm, num_targets = numbers.tolist()
        if not math.isfinite(sum(losses) + grad_norm):
            named = zip(self.model.head_names, losses, strict=True)
            bad = [f"the loss of {name}" for name, loss in named if not math.isfinite(loss)] or ["the gradient norm"]
            raise FloatingPointError(f"step {self.step}: {', '.join(bad)} is not finite; nothing of it is saved")
        row: dict[str, float] = {
            "step": self.step,
            "epoch": epoch + 1,
            "loss_sum": sum(losses),
            "loss_mean": sum(losses) / len(losses),
            "lr": outcome.lr,
            "grad_norm": grad_norm,
            **self._meter.read(num_targets),
        }
        return row, losses

    def _evaluate(self) -> dict[str, list[float]]:
        with _range("evaluate"):
            means = evaluate(self.model, self.loaders.validation, precision=self._precision, device=self.device)
        return {name: values.tolist() for name, values in means.items()}

    def _show_ledger(self, validation: Mapping[str, Sequence[float]], is_best: bool) -> None:
        """Prints the ledger of every evaluation; ledger.json is that of checkpoints/best, the newest without a best."""
        if self.ledger is not None:
            self.ledger.update(self.step, validation["loss"], validation["top1"])
            self._log.show_ledger(self.ledger)
            if is_best or self.checkpoints.best is None:
                self.ledger.save(self.run_dir / LEDGER_FILE)

    def _save(self, is_best: bool) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_state(),
            "loader": self._position,
            "step": self.step,
            "epochs_done": self.epochs_done,
            "best_loss": self.best_loss,
            "config": to_mapping(self.config),
            "metadata": self._metadata,
            "environment": environment(),
        }
        self.checkpoints.save(state, self.step, is_best=is_best)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C is Python's own."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return

        def request_stop(number: int, frame: FrameType | None) -> None:
            self._stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _range(name: str) -> nvtx.annotate:
    return nvtx.annotate(name, domain="eventkern")
