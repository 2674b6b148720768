"""A model and a loader of a few lines: all that the trainer may know of models and loaders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eventkern.train import Loaders, Trainer, TrainerConfig

NUM_CLASSES = (5, 7)
WIDTH = 6


@dataclass(frozen=True)
class TinyBatch:
    inputs: Tensor
    labels: Tensor
    num_targets: Tensor


class TinyModel(nn.Module):
    """Two heads on a linear layer with dropout; label 0 is padding. `before_forward` is told the number of the call."""

    head_names = ("kind", "place")

    def __init__(self, dropout: float = 0.0, before_forward: Callable[[int], None] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, classes) for classes in NUM_CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.before_forward = before_forward
        self.num_calls = 0
        self.dtypes: set[torch.dtype] = set()

    def logits(self, batch: TinyBatch) -> list[Tensor]:
        hidden = self.dropout(torch.tanh(self.hidden(batch.inputs)))
        self.dtypes.add(hidden.dtype)
        return [head(hidden).float() for head in self.heads]

    def losses(self, batch: TinyBatch) -> Tensor:
        flat = [logits.flatten(0, 1) for logits in self.logits(batch)]
        return torch.stack(
            [
                F.cross_entropy(logits, batch.labels[..., head].flatten(), ignore_index=0)
                for head, logits in enumerate(flat)
            ]
        )

    def forward(self, batch: TinyBatch) -> Tensor:
        self.num_calls += 1
        if self.before_forward is not None:
            self.before_forward(self.num_calls)
        return self.losses(batch)

    def metrics(self, batch: TinyBatch) -> dict[str, Tensor]:
        hits = [
            ((logits.argmax(-1) == batch.labels[..., head]) & (batch.labels[..., head] != 0)).sum()
            for head, logits in enumerate(self.logits(batch))
        ]
        return {"loss": self.losses(batch), "top1": torch.stack(hits) / batch.num_targets}


class PlainModel(TinyModel):
    """The same model without what watches it: one graph."""

    def logits(self, batch: TinyBatch) -> list[Tensor]:
        hidden = self.dropout(torch.tanh(self.hidden(batch.inputs)))
        return [head(hidden).float() for head in self.heads]

    def forward(self, batch: TinyBatch) -> Tensor:
        return self.losses(batch)


class ScriptedModel(TinyModel):
    """Validation losses by script, one for each evaluation."""

    def __init__(self, totals: Iterable[float], before_forward: Callable[[int], None] | None = None) -> None:
        super().__init__(before_forward=before_forward)
        self.totals = iter(totals)

    def train(self, mode: bool = True) -> ScriptedModel:
        if not mode:
            self.total = next(self.totals)
        return super().train(mode)

    def metrics(self, batch: TinyBatch) -> dict[str, Tensor]:
        return {"loss": torch.tensor([self.total - 1, 1.0]), "top1": torch.tensor([0.5, 0.25])}


@dataclass
class TinyLoader:
    """Windows of 1 to 5 labels, right-padded, in an order that (seed, epoch) alone decides, shared among ranks."""

    batch_size: int
    num_samples: int = 22
    seed: int = 0
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    position: int = 0
    resume_position: int = 0
    inputs: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(100 + self.seed)
        self.inputs = torch.randn(self.num_samples, 5, WIDTH, generator=generator)
        classes = [torch.randint(1, size, (self.num_samples, 5), generator=generator) for size in NUM_CLASSES]
        lengths = torch.randint(1, 6, (self.num_samples,), generator=generator)
        is_label = torch.arange(5) < lengths[:, None]
        self.labels = (torch.stack(classes, dim=-1) * is_label[..., None]).to(self.device)
        self.inputs = self.inputs.to(self.device)

    def __len__(self) -> int:
        whole, left = divmod(self.num_samples, self.batch_size * self.world_size)
        return whole + (left >= self.world_size)

    def batch(self, samples: Tensor | Sequence[int]) -> TinyBatch:
        labels = self.labels[samples]
        return TinyBatch(self.inputs[samples], labels, (labels[..., 0] != 0).sum())

    def __iter__(self) -> Iterator[TinyBatch]:
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        position, self.resume_position = self.resume_position, 0
        while len(among := order[position : position + self.batch_size * self.world_size]) >= self.world_size:
            share = len(among) // self.world_size
            position = self.position = position + len(among)
            yield self.batch(among[self.rank * share : (self.rank + 1) * share])
        self.position = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position, self.resume_position = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.position = self.resume_position = state["position"]


CONFIG = TrainerConfig(
    compile="off", epochs=3, batch_size=6, lr=0.01, schedule="constant", device="cpu", precision="fp32", log_every=1
)


def make_trainer(run_dir: Path, model: Any = None, *, loader: Any = None, **keys: Any) -> Trainer:
    """Of 22 samples, 4 steps of CONFIG an epoch; 9 other samples validate."""
    config = TrainerConfig(**{**vars(CONFIG), **keys})
    train = TinyLoader(config.batch_size, device=config.device) if loader is None else loader
    loaders = Loaders(train, TinyLoader(4, num_samples=9, seed=1, device=config.device))
    return Trainer(model or TinyModel(), config, loaders, run_dir=run_dir, resume_command="eventkern train on")


def read_rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny() -> Any:
    """What is above, for tests that cannot import a conftest."""

    class Tiny:
        Model = TinyModel
        Plain = PlainModel
        Scripted = ScriptedModel
        Loader = TinyLoader
        classes = NUM_CLASSES
        config = CONFIG
        trainer = staticmethod(make_trainer)
        rows_of = staticmethod(read_rows)

    return Tiny


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Judge two states of tensors and plain values: bitwise the same, or told where not."""

    def judge(one: Any, other: Any, where: str = "state") -> None:
        assert type(one) is type(other) or isinstance(one, dict), where
        if isinstance(one, dict):
            assert one.keys() == other.keys(), where
            for key in one:
                judge(one[key], other[key], f"{where}.{key}")
        elif isinstance(one, list | tuple):
            assert len(one) == len(other), where
            for place, pair in enumerate(zip(one, other, strict=True)):
                judge(*pair, f"{where}[{place}]")
        elif isinstance(one, Tensor):
            assert torch.equal(one, other), where
        else:
            assert one == other, where

    return judge
