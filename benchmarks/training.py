"""The training step that benchmarks and profiles run: a shipped configuration on random events of its shapes."""

import argparse
import itertools
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eventkern
from eventkern.data import EventBatch, EventLoader, Schema
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.models.event_transformer import EventBatchLike
from eventkern.train.config import ConfigError, did_you_mean
from profiling.roofline import Work

CONFIGS = Path(eventkern.__file__).parent / "configs"
SCHEMA = "notes17"
CLIP = 1.0


@dataclass(frozen=True)
class Shapes:
    """A configuration's model and micro-batch."""

    model: EventTransformerConfig
    batch_size: int

    @classmethod
    def load(cls, config: str | Path) -> "Shapes":
        """Read a configuration: the path of a TOML or JSON file, else a name in eventkern/configs.

        The schema is `notes17` whatever the configuration's store: 17 categories of id_category_size classes each.

        Raises:
            ConfigError: no such file or name, or a file that is no configuration; it names the file and the fault.
        """
        candidates = [Path(config), *(CONFIGS / f"{config}{suffix}" for suffix in ("", ".toml", ".json"))]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            names = sorted(path.stem for path in CONFIGS.iterdir())
            meant = did_you_mean(str(config), names)
            raise ConfigError(
                f"{config}: no such configuration file or name{meant or ';'} There are {', '.join(names)}"
            )
        try:
            text = path.read_text(encoding="utf-8")
            return cls.of(json.loads(text) if path.suffix == ".json" else tomllib.loads(text))
        except KeyError as error:
            raise ConfigError(f"{path}: key {error} is missing; add it") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is no configuration: {error}") from error

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Shapes":
        """The shapes that a configuration's keys and values give."""
        schema = Schema.load(SCHEMA)
        names = schema.category_names
        model = EventTransformerConfig(
            category_names=names,
            category_sizes=(values["id_category_size"],) * len(names),
            num_streams=len(schema.streams),
            src_seq_len=values["src_seq_len"],
            tgt_seq_len=values["tgt_seq_len"],
            dropout=values.get("dropout", 0.0),
            **values["model"],
        )
        return cls(model, values["batch_size"])

    @property
    def num_events(self) -> int:
        """Events a step predicts."""
        return self.batch_size * self.model.tgt_seq_len


def config_name(name: str) -> str:
    """For argparse: the name of a configuration that `Shapes.load` reads."""
    try:
        Shapes.load(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


@dataclass(frozen=True)
class RandomBatch:
    """Events drawn evenly over the classes, padding left out: every label counts."""

    sources: Tensor
    targets: Tensor
    num_targets: Tensor


def random_batch(shapes: Shapes, device: str | torch.device, *, seed: int = 0) -> RandomBatch:
    """A batch of the given shapes, int32 as the loader yields it."""
    model = shapes.model
    generator = torch.Generator().manual_seed(seed)

    def events(*leading: int) -> Tensor:
        columns = [torch.randint(1, size, leading, generator=generator) for size in model.category_sizes]
        return torch.stack(columns, dim=-1).to(torch.int32).to(device)

    return RandomBatch(
        events(shapes.batch_size, model.num_streams, model.src_seq_len),
        events(shapes.batch_size, model.tgt_seq_len + 1),
        torch.tensor(shapes.num_events, device=device),
    )


def endless(loader: EventLoader) -> Iterator[EventBatch]:
    """The batches of epoch after epoch, each in its own order."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


NameRange = Callable[[str], AbstractContextManager[object]]
"""Opens a range with a name: torch.profiler.record_function for a trace, torch.cuda.nvtx.range for Nsight Systems."""


def unnamed(name: str) -> AbstractContextManager[object]:
    """No range at all."""
    return nullcontext()


class TrainingStep:
    """Forward, backward, clipping and fused AdamW on one model, with a named range around each phase.

    Args:
        model: maps a batch to a vector of losses, whose sum is minimised.
        autocast: the dtype of autocast; torch.float32 for none.
        name_range: names the phases for a profiler.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype, *, name_range: NameRange = unnamed) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.name_range = name_range

    def __call__(self, batch: EventBatchLike) -> Tensor:
        """One step; the losses stay on the device."""
        is_mixed = self.autocast is not torch.float32
        with self.name_range("forward"), torch.autocast(self.device.type, self.autocast, enabled=is_mixed):
            losses = self.model(batch)
        with self.name_range("backward"):
            losses.sum().backward()
        with self.name_range("optimizer"):
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses.detach()


def least_operations(model: EventTransformer, batch: EventBatchLike) -> float:
    """Floating-point operations of a step's matrix products, without what the causal flag hides."""
    config, batch_size, events = model.config, len(batch.targets), batch.targets.shape[1] - 1
    hidden = config.decoder_layers * batch_size * 4 * config.d_model * events * (events - 1) / 2
    return model.flops(batch) - 3 * hidden


def step_work(model: EventTransformer, batch: RandomBatch) -> Work:
    """What a step needs: its operations; the batch read; weights and moments read and written."""
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    return Work(
        operations=least_operations(model, batch),
        bytes=2 * 3 * 4 * num_weights + batch.sources.nbytes + batch.targets.nbytes,
        events=int(batch.num_targets),
    )
