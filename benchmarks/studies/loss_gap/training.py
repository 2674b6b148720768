"""One run of the loss study, with the notes' bugs as switches: seeded data, initialisation and order."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.loss_gap.settings import Setting
from benchmarks.training import endless
from eventkern.data import EventBatch, EventLoader, EventStore
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.modes import evaluating
from eventkern.nn import StackedLinear
from eventkern.train.config import TrainerConfig
from eventkern.train.device import autocast, float32_products, has_precision
from eventkern.train.optim import build_optimizer

WEIGHT_DECAY, MOMENTUM = 0.01, 0.9
"""Of AdamW as torch sets it, and of SGD as is usual; the notes name neither."""

FP16_WIDTH = 32
"""Widest model that is trained in fp16 on a CPU."""

TENTHS = 10
"""Parts of a run that are told by category; the last is the one that readings at the end are means over."""


@dataclass
class Run:
    """What a run found.

    Attributes:
        setting: what it depends on, besides the seed.
        readings: (num_steps,) the loss as the notes would print it, in the setting's reduction, before each step.
        nats: (num_steps,) the mean over the categories of the mean over the labels.
        grad_norms: (num_steps,) before clipping, of the gradients that the optimizer is given.
        skipped: steps that fp16's loss scale skipped.
        tenths: (10, H) nats of the training labels by category, means over each tenth of the steps.
        first: (H,) the same at the first step.
        validation: (H,) nats of all validation labels by category, after the last step.
        step_s: median seconds of a step, on a machine that may do other things meanwhile.
        threads: that torch was given.
    """

    setting: Setting
    seed: int
    readings: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    first: list[float] = field(default_factory=list)
    tenths: list[list[float]] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    step_s: float = 0.0
    threads: int = 0

    @property
    def reading(self) -> float:
        """The loss as the notes would print it at the end: the mean over the last tenth of the steps."""
        last = last_tenth(self.readings)
        return math.fsum(last) / len(last)

    @property
    def last(self) -> list[float]:
        """(H,) nats by category over the last tenth of the steps."""
        return self.tenths[-1]

    def to_dict(self) -> dict[str, Any]:
        """For a line of the file of runs."""
        return {**vars(self), "setting": self.setting.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        setting = {**values["setting"], "bugs": tuple(values["setting"]["bugs"])}
        return cls(**{**values, "setting": Setting(**setting)})


def last_tenth(values: list[float]) -> list[float]:
    """The values of the last tenth of the steps."""
    return values[len(values) * (TENTHS - 1) // TENTHS :]


def missing(setting: Setting) -> str | None:
    """Why a setting cannot be run on this machine; None where it can."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        return "not run: torch sees no CUDA device"
    if setting.bugs == ("transfer_in_forward",) and setting.device == "cpu":
        return "not run: on the CPU there is nothing to transfer"
    if setting.precision == "fp16" and setting.device == "cpu" and setting.d_model > FP16_WIDTH:
        return "not run: a CPU without fp16 products takes 30 times as long here; cpu_baseline's row has it"
    if not has_precision(setting.precision, torch.device(setting.device)):
        return f"not run: {setting.device} has no {setting.precision}"
    return None


class NotesModel(nn.Module):
    """The notes' way to call a model: one loss to minimise, with their bugs where they are asked for.

    Clean, forward gives the (H,) losses. A bug changes what is asked of the caller: `backward_in_forward` runs the
    backward of the reduced loss of this micro-batch, unweighted and unscaled, and gives what cannot be differentiated.
    """

    def __init__(self, model: EventTransformer, setting: Setting) -> None:
        super().__init__()
        self.model = model
        self.setting = setting

    def forward(self, batch: EventBatch) -> Any:
        bugs = self.setting.bugs
        if "transfer_in_forward" in bugs:
            device = self.model.heads.weight.device
            batch = EventBatch(*(part.to(device) for part in (batch.sources, batch.targets, batch.num_targets)))
        losses = self.model(batch)
        if "mean_of_stacked" in bugs:
            losses = torch.stack(list(losses)).mean()[None]
        if "backward_in_forward" in bugs:
            reduced(losses, self.setting.reduction, batch.num_targets).backward()
            losses = losses.detach()
        return [loss.item() for loss in losses] if "float_returns" in bugs else losses


def reduced(losses: Tensor, reduction: str, num_targets: Tensor) -> Tensor:
    """The number that a reduction makes of the (H,) means over num_targets labels."""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() * (num_targets if reduction == "sum" else 1)


def model_config(
    setting: Setting, names: tuple[str, ...], sizes: tuple[int, ...], num_streams: int
) -> EventTransformerConfig:
    """The model's sizes under a setting, for categories of the given names and sizes."""
    return EventTransformerConfig(
        category_names=names,
        category_sizes=sizes,
        num_streams=num_streams,
        src_seq_len=setting.src_seq_len,
        tgt_seq_len=setting.tgt_seq_len,
        d_model=setting.d_model,
        num_heads=setting.num_heads,
        encoder_layers=setting.encoder_layers,
        decoder_layers=setting.decoder_layers,
    )


def build_model(store: EventStore, setting: Setting, seed: int) -> EventTransformer:
    """The model of a setting, initialised from a seed."""
    torch.manual_seed(seed)
    sizes = store.sizes(setting.id_category_size)
    model = EventTransformer(model_config(setting, store.schema.category_names, sizes, len(store.schema.streams)))
    kind = setting.initialisation
    if kind.startswith("logits_"):
        nn.init.normal_(model.heads.weight, std=float(kind.removeprefix("logits_")) * setting.d_model**-0.5)
    elif kind.startswith("torch"):
        initialise_as_torch(model)
    elif kind != "eventkern":
        raise ValueError(f"initialisation is {kind!r}; want eventkern, torch, torch_without_norm or logits_NUMBER")
    if kind == "torch_without_norm":
        model.norm = nn.Identity()  # type: ignore[assignment]
    return model.to(setting.device)


def initialise_as_torch(model: EventTransformer) -> None:
    """What nn.Embedding (normal, sd 1) and nn.Linear (uniform within 1 / sqrt(inputs), biases too) would hold."""
    for module in model.modules():
        if isinstance(module, nn.Linear | StackedLinear):
            bound = module.weight.shape[-1] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.uniform_(module.bias, -bound, bound)
    bound = model.heads.weight.shape[1] ** -0.5
    for part in (model.heads.weight, model.heads.bias):
        if part is not None:
            nn.init.uniform_(part, -bound, bound)
    for table in (model.embedding.weight, model.source_positions.table, model.target_positions.table):
        nn.init.normal_(table)


def make_loader(store: EventStore, setting: Setting, split: Any, seed: int = 0) -> EventLoader:
    """Windows of a split in a setting's shapes."""
    return EventLoader(
        store,
        split,
        src_seq_len=setting.src_seq_len,
        tgt_seq_len=setting.tgt_seq_len,
        id_category_size=setting.id_category_size,
        batch_size=setting.batch_size,
        seed=seed,
        shuffle=setting.is_shuffled if split == "train" else False,
        device="cpu" if "transfer_in_forward" in setting.bugs else setting.device,
    )


def make_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=MOMENTUM)
    kind: Any = setting.optimizer
    decay = WEIGHT_DECAY if kind == "adamw" else 0.0
    return build_optimizer(model.parameters(), TrainerConfig(optimizer=kind, lr=setting.lr, weight_decay=decay))


class Stepper:
    """Takes a setting's optimizer steps, one at a time; the same seed, device and threads give the same numbers.

    Args:
        store: of the setting's stream.
        setting: one that this machine can run.
        seed: of the initialisation and of the order.

    Raises:
        ValueError: a setting that this machine cannot run (`missing` tells why).
    """

    def __init__(self, store: EventStore, setting: Setting, seed: int) -> None:
        if reason := missing(setting):
            raise ValueError(reason)
        self.setting = setting
        self.model = build_model(store, setting, seed)
        self._noted = NotesModel(self.model, setting)
        self._optimizer = make_optimizer(self.model, setting)
        self._scaler = torch.amp.GradScaler(setting.device, enabled=setting.precision == "fp16")
        self._batches = endless(make_loader(store, setting, "train", seed))
        self.can_skip = self._scaler.is_enabled() and "backward_in_forward" not in setting.bugs

    def step(self) -> tuple[float, Tensor, float]:
        """The reading, the (H,) nats by category, and the norm of the gradients, not finite where fp16 skipped.

        Under `mean_of_stacked` one number stands for all categories.
        """
        setting = self.setting
        micro = [next(self._batches) for _ in range(setting.grad_accum)]
        num_targets = torch.stack([batch.num_targets for batch in micro]).sum()
        by_category = torch.zeros(len(self.model.head_names), dtype=torch.float64)
        reading = 0.0
        for batch in micro:
            losses = torch.as_tensor(self._backward(batch, num_targets), dtype=torch.float64).cpu()
            share = float(batch.num_targets / num_targets)
            by_category += share * losses
            told = float(reduced(losses, setting.reduction, batch.num_targets.cpu()))
            reading += told if setting.reduction == "sum" else share * told
        return reading, by_category, self._update()

    def _backward(self, batch: EventBatch, num_targets: Tensor) -> Any:
        """Forward and backward of a micro-batch of a step with num_targets labels; the losses that forward told."""
        setting = self.setting
        with autocast(setting.precision, torch.device(setting.device)):
            losses = self._noted(batch)
        if "backward_in_forward" in setting.bugs:
            return losses
        share = 1 if setting.reduction == "sum" else batch.num_targets / num_targets
        self._scaler.scale(reduced(losses, setting.reduction, batch.num_targets) * share).backward()
        return losses.detach()

    def _update(self) -> float:
        """An optimizer step; the norm of its gradients before clipping."""
        if self.can_skip:
            self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip or math.inf)
        if self.can_skip:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


def train(store: EventStore, setting: Setting, seed: int) -> Run:
    """Train a setting from a seed.

    Raises:
        ValueError: as `Stepper`.
    """
    stepper = Stepper(store, setting, seed)
    run = Run(setting, seed, threads=torch.get_num_threads())
    categories: list[Tensor] = []
    times_s = []
    with float32_products(setting.precision):
        for _ in range(setting.num_steps):
            start_s = time.perf_counter()
            reading, by_category, norm = stepper.step()
            times_s.append(time.perf_counter() - start_s)
            run.readings.append(reading)
            run.nats.append(float(by_category.mean()))
            run.grad_norms.append(norm)
            run.skipped += int(stepper.can_skip and not math.isfinite(norm))
            categories.append(by_category)
        run.first = categories[0].tolist()
        ends = [setting.num_steps * tenth // TENTHS for tenth in range(TENTHS + 1)]
        parts = [categories[start:end] or categories[-1:] for start, end in itertools.pairwise(ends)]
        run.tenths = [torch.stack(part).mean(0).tolist() for part in parts]
        run.validation = evaluate(stepper.model, make_loader(store, setting, "validation"), setting).tolist()
    run.step_s = statistics.median(times_s)
    return run


@torch.no_grad()
def evaluate(model: EventTransformer, loader: EventLoader, setting: Setting) -> Tensor:
    """(H,) float64 nats: the mean over all validation labels, in the setting's precision."""
    sums = torch.zeros(len(model.head_names), dtype=torch.float64)
    num_targets = 0
    with evaluating(model), autocast(setting.precision, torch.device(setting.device)):
        for batch in loader:
            batch = EventBatch(*(part.to(setting.device) for part in (batch.sources, batch.targets, batch.num_targets)))
            sums += model(batch).double().cpu() * int(batch.num_targets)
            num_targets += int(batch.num_targets)
    return sums / num_targets
