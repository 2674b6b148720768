"""The training loop. It sums the named losses a model returns, and that is all it knows of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from eventkern.modes import training
from eventkern.train.boards import require_board
from eventkern.train.checkpoint import (
    CHECKPOINTS,
    CheckpointFolder,
    load_checkpoint,
)
from eventkern.train.config import ConfigError, TrainerConfig, to_mapping
from eventkern.train.curves import plot_curves
from eventkern.train.device import float32_products, seed_everything, select_device, select_precision
from eventkern.train.distributed import Ranks
from eventkern.train.evaluation import evaluate
from eventkern.train.failures import OtherRankError, explained, smaller_step
from eventkern.train.ledger import Ledger
from eventkern.train.logging import RunLog
from eventkern.train.meter import Meter
from eventkern.train.optim import EarlyStopping, Schedule, build_optimizer
from eventkern.train.parallel import Parallel, compile_clock, refuse_graphs
from eventkern.train.protocols import BatchLoader, TrainableModel
from eventkern.train.run_folder import locked, make_fresh_folder
from eventkern.train.snapshot import Snapshot
from eventkern.train.step import OptimizerStep, Outcome, marked
from eventkern.train.termination import StopRequest, stop_request

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


class Trainer:
    """Trains a model; leaves metrics.jsonl, ledger.json, curves.png, TensorBoard events and checkpoints/ in `run_dir`.

    One optimizer step draws `grad_accum` micro-batches and weights each by its num_targets, so that it equals the step
    on one large batch to float32 rounding, over all ranks. Unless a log, evaluation or checkpoint is due, no step waits
    for the device. A step with a loss or a gradient that is not finite is skipped and counted; while steps are being
    skipped no checkpoint is written, and `max_skipped_steps` in a row end the run.

    A checkpoint holds: model (the plain state_dict), optimizer, trained (names of its parameters), schedule,
    early_stopping, scaler (the loss scale), random (generator states), loader (its position), step, epochs_done,
    best_loss, skipped_steps, config, metadata, environment. The first thing a run does is to write one that nothing
    keeps, so that what cannot be saved ends it before its first step. Ctrl-C and SIGTERM, on any rank, finish the step
    (and the evaluation it is due), save, and end the run; a second Ctrl-C aborts it.

    Args:
        model: a TrainableModel; moved to the device of the configuration.
        config: the settings.
        loaders: training and validation batches on that device, this rank's share of the training batches and all
            validation batches; a pair of loaders is taken in that order.
        run_dir: the run's folder, made if absent; None: runs/<time>, made at once so that no other run takes it.
        ledger: baselines to hold the validation losses against; None: no ledger.
        metadata: plain values to store in each checkpoint, such as the model's configuration.
        resume_command: the command that continues this run, printed when it is interrupted.
        ranks: what `eventkern.train.distributed.join` gave; None: this process alone.

    Raises:
        ConfigError: a device or a precision that is not there, a log without its package, histograms of shards, or a
            training loader without a batch.
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
        ranks: Ranks | None = None,
    ) -> None:
        loaders = loaders if isinstance(loaders, Loaders) else Loaders(*loaders)
        self.config = config
        self.ranks = ranks or Ranks(select_device(config.device))
        self.device = self.ranks.device
        with self.ranks.together():
            if len(loaders.train) == 0:
                raise ConfigError("the training loader has no batch: more data or a smaller batch_size is needed")
            self._precision = select_precision(config.precision, self.device)
            require_board(config.logger)
            refuse_graphs(config, self.ranks)
        self.model = model
        model.to(self.device)  # type: ignore[attr-defined]  # overloaded in nn.Module, so no protocol matches it
        self._parallel = Parallel(model, self.ranks, config)
        if config.histograms and self._parallel.is_sharded:
            raise ConfigError(
                "histograms is True, but must be False with sharding 'fully_shard': gradients are in parts"
            )
        self.loaders = loaders
        if run_dir is None:
            run_dir = self.ranks.gather(make_fresh_folder() if self.ranks.is_main else Path())[0]
        self.run_dir = Path(run_dir)
        self.ledger = ledger
        self.checkpoints = CheckpointFolder(self.run_dir / CHECKPOINTS, config.keep_checkpoints)
        steps_per_epoch = -(-len(loaders.train) // config.grad_accum)
        self.total_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
        self.optimizer = build_optimizer(model.parameters(), config)
        self.schedule = Schedule(self.optimizer, config, self.total_steps)
        self.early_stopping = EarlyStopping(config.early_stopping)
        self._optimizer_step = OptimizerStep(self._parallel, self.optimizer, config, self.ranks, self._precision)
        self._snapshot = Snapshot(
            self._parallel,
            self.optimizer,
            self._optimizer_step,
            self.schedule,
            self.early_stopping,
            loaders.train,
            config,
            self.ranks,
        )
        self.step = self.epochs_done = 0
        self.best_loss = float("inf")
        self._metadata = dict(metadata or {})
        self._resume_command = resume_command
        self._resumed = self._is_save_put_off = False
        self._stop = StopRequest()
        self._position: Any = None
        self._meter = Meter(model, self.device, self._precision, self.ranks.world_size)
        self._log: RunLog | None = None

    def resume(self, path: str | Path, state: Mapping[str, Any] | None = None) -> None:
        """Takes up a checkpoint; the run goes on as if it had never stopped, bitwise on the CPU under the same threads.

        Args:
            path: the checkpoint.
            state: what `load_checkpoint(path)` returned, where that was called already; None: it is read now.

        Raises:
            CheckpointError: a checkpoint that is missing or damaged, or of another model, of other parameters that are
                trained, of another optimizer or of other training data; it names what differs.
        """
        with self.ranks.together():
            state = load_checkpoint(Path(path)) if state is None else state
            self._snapshot.take_up(Path(path), state)
        self._position = state["loader"]
        self.step, self.epochs_done, self.best_loss = state["step"], state["epochs_done"], state["best_loss"]
        self._resumed = True

    def fit(self) -> TrainResult:
        """Trains to the end of the last epoch, to max_steps or to an early stop, whichever comes first.

        A model in training mode trains as it is, with modules inside of it that are in evaluation mode (`bn.eval()`);
        of another one all modules train, and each is left in the mode it was found in.

        Raises:
            ConfigError: another process has the run folder, or nothing may be written there.
            CheckpointError: before the first step: a value that no checkpoint could hold.
            OSError: before the first step: no space for a checkpoint; later: a checkpoint could not be written.
            FloatingPointError: max_skipped_steps in a row were not finite.
            RunFailure: no memory left, a model that does not compile, or a rank that is gone.
            OtherRankError: as a FloatingPointError, on all ranks but the main one.
        """
        if not self._resumed:
            seed_everything(self.config.seed, self.ranks.rank)
            self.loaders.train.set_epoch(0)
        with ExitStack() as stack:
            stack.enter_context(explained(smaller_step(self.config), is_alone=self.ranks.is_alone))
            with self.ranks.together():
                if self.ranks.is_main:
                    stack.enter_context(locked(self.run_dir))
                    self._log = stack.enter_context(self._open_log())
            self._stop = stack.enter_context(stop_request())
            stack.enter_context(float32_products(self._precision))
            stack.enter_context(training(self.model))
            self._compile_clock = stack.enter_context(compile_clock(self._parallel.is_compiled))
            self._run()
        return self._result()

    def _open_log(self) -> RunLog:
        options: Any = {"logger": self.config.logger, "settings": {**to_mapping(self.config), **self._metadata}}
        return RunLog(self.run_dir, self.model.head_names, self.total_steps, self.step, **options)

    def _run(self) -> None:
        if self._finished():
            key = "early_stopping" if self.early_stopping.is_due else "epochs or max_steps"
            return self._say(f"nothing left to do at step {self.step}: raise {key}")
        if self.ledger is not None and self.ranks.is_main and not (self.run_dir / LEDGER_FILE).exists():
            self.ledger.save(self.run_dir / LEDGER_FILE)
        self._rehearse()
        self._meter.start()
        ended = False
        while not ended:
            ended = self._train_epoch()
        if self.ranks.is_main:
            plot_curves(self.run_dir, self.ledger)
        if self.early_stopping.is_due:
            self._say(f"ended early at step {self.step}: {self.early_stopping.story()}")
        if not self._finished():
            command = f"; to go on: {self._resume_command}" if self._resume_command else ""
            self._say(f"stopped after step {self.step}, saved in {self.checkpoints.path}{command}")

    def _say(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)

    def _finished(self) -> bool:
        reached = self.config.max_steps is not None and self.step >= self.config.max_steps
        return reached or self.epochs_done >= self.config.epochs or self.early_stopping.is_due

    def _result(self) -> TrainResult:
        return TrainResult(self.step, self.epochs_done, self.best_loss, interrupted=not self._finished())

    def _train_epoch(self) -> bool:
        """Trains to the end of the epoch, or of the run; returns whether the run has ended."""
        epoch = self.epochs_done
        batches = iter(self.loaders.train)
        upcoming = self._draw(batches, 1)
        if not upcoming:  # resumed where a larger batch size leaves nothing of the epoch
            self._next_epoch()
            return self._finished()
        if self._parallel.is_cold:
            self._optimizer_step.warm_up(upcoming[0])
            self._tell_compilation()
            self._meter.start()
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
        with marked("data"), self._meter.waiting():
            return list(islice(batches, count))

    def _train_step(self, batches: list[Any]) -> Outcome:
        """One optimizer step, and its learning rate's."""
        self._lr = self.schedule.lr
        outcome = self._optimizer_step(batches, self.step + 1, self._stop.is_made)
        self.schedule.step()
        self.step += 1
        self._meter.count(outcome.num_targets, batches)
        return outcome

    def _after_step(self, outcome: Outcome, epoch: int) -> bool:
        """Logs, evaluates and saves where that is due; returns whether the run ends here."""
        config = self.config
        self._tell_compilation()
        num_stops, in_a_row = self._optimizer_step.notice.read()
        self._end_among_skipped(in_a_row)
        finished = self._finished()
        # Read once, so that a run that ends has saved its last step.
        is_stopped = self._stop.is_made if self.ranks.is_alone else num_stops > 0
        ended = finished or is_stopped
        epoch_ended = self.epochs_done > epoch
        evaluate_due = self.step % config.evaluate_every == 0 if config.evaluate_every else epoch_ended
        save_due = config.save_every is not None and self.step % config.save_every == 0
        save_due = save_due or (self._is_save_put_off and in_a_row == 0)
        if self._log is not None:
            self._log.advance(self.step)
        if not (evaluate_due or save_due or ended or self.step % config.log_every == 0):
            return False
        row, losses, in_a_row = self._measure(outcome, epoch)
        self._end_among_skipped(in_a_row)
        if is_stopped and not finished and in_a_row:  # a stop waits for a step that counts
            ended = False
        is_healthy = in_a_row == 0 or finished  # a few skipped steps at the end have left the weights as they were
        validation = self._evaluate() if evaluate_due or finished else None
        if self._log is not None:
            self._log.write(row, losses, validation)
            if validation is not None and config.histograms:
                self._log.write_histograms(self.step, self.model)
        is_best = False
        if validation is not None:
            total = math.fsum(validation["loss"])
            is_best = is_healthy and total < self.best_loss  # best is what is saved, and nothing is among skipped steps
            self.best_loss = total if is_best else self.best_loss
            if evaluate_due:  # not where max_steps ends a run: a longer run would not evaluate there
                self.schedule.evaluated(total)
                self.early_stopping.evaluated(total)
                ended = ended or (is_healthy and self.early_stopping.is_due)
            self._show_ledger(validation, is_best)
        if save_due or ended or validation is not None:
            self._is_save_put_off = not is_healthy
            if is_healthy:
                self._save(is_best)
        self._tell_compilation()  # an evaluation may compile, too
        self._meter.start()
        return ended

    def _measure(self, outcome: Outcome, epoch: int) -> tuple[dict[str, float], list[float], int]:
        """The step's numbers, in one transfer from the device: a row, the losses, and the steps skipped in a row."""
        guard = self._optimizer_step.guard
        counts = torch.stack([self._meter.num_targets, guard.skipped, guard.in_a_row])
        numbers = torch.cat([outcome.losses, outcome.grad_norm[None], counts.float()])
        *losses, grad_norm, num_targets, skipped, in_a_row = numbers.tolist()
        row: dict[str, float] = {
            "step": self.step,
            "epoch": epoch + 1,
            "loss_sum": sum(losses),
            "loss_mean": sum(losses) / len(losses),
            "lr": self._lr,
            "grad_norm": grad_norm,
            "skipped_steps": int(skipped),
            **self._meter.read(num_targets),
        }
        return row, losses, int(in_a_row)

    def _end_among_skipped(self, in_a_row: int) -> None:
        """Fails where too many steps in a row were skipped; all ranks agree on that."""
        if in_a_row < self.config.max_skipped_steps:
            return
        if not self.ranks.is_main:
            raise OtherRankError("the main rank tells which numbers are not finite")
        kept = f"the last checkpoint is {last}" if (last := self.checkpoints.last) else "there is no checkpoint yet"
        told = f"{in_a_row} steps in a row were skipped; {self._optimizer_step.guard.story()}; {kept}"
        raise FloatingPointError(f"step {self.step}: {told}; lower lr, or find what is wrong with the data")

    def _tell_compilation(self) -> None:
        if seconds := self._compile_clock.take():
            self._say(f"compiled in {seconds:.1f} s")
            self._meter.leave_out(seconds)

    def _evaluate(self) -> dict[str, list[float]]:
        batches = self.loaders.validation
        with marked("evaluate"):
            means = evaluate(self.model, batches, precision=self._precision, device=self.device, ranks=self.ranks)
        return {name: values.tolist() for name, values in means.items()}

    def _show_ledger(self, validation: Mapping[str, Sequence[float]], is_best: bool) -> None:
        """Prints the ledger of every evaluation; ledger.json is that of checkpoints/best, the newest without a best."""
        if self.ledger is not None and self._log is not None:
            self.ledger.update(self.step, validation["loss"], validation["top1"])
            self._log.show_ledger(self.ledger)
            if is_best or self.checkpoints.best is None:
                self.ledger.save(self.run_dir / LEDGER_FILE)

    def _save(self, is_best: bool) -> None:
        """Writes a checkpoint, on the main rank; all take part."""
        state = self._state()
        if state is not None:
            self.checkpoints.save(state, self.step, is_best=is_best)

    def _rehearse(self) -> None:
        """Writes a checkpoint that nothing keeps: what would cost the first one is told before there is any."""
        state, moment_bytes = self._state(), self._snapshot.moment_bytes()
        with self.ranks.together():
            for remark in self.checkpoints.rehearse(state, moment_bytes) if state is not None else ():
                self._say(remark)

    def _state(self) -> dict[str, Any] | None:
        position = self.loaders.train.state_dict() if self._position is None else self._position
        progress = {"step": self.step, "epochs_done": self.epochs_done, "best_loss": self.best_loss}
        return self._snapshot.state({"loader": position, "metadata": self._metadata, **progress})
