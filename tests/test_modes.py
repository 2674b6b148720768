"""Whatever evaluates or trains a model leaves every module of it in the mode it was found in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventkern.models import EventTransformer, EventTransformerConfig, generate
from eventkern.models.export import export_logits
from eventkern.modes import evaluating, training
from eventkern.train import Loaders, Trainer, TrainerConfig, evaluate


class Normed(nn.Module):
    """Two losses behind two batch norms and a dropout."""

    head_names = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.bn = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([nn.Dropout(0.5), nn.Linear(3, 2)])

    def forward(self, batch: Any) -> Tensor:
        hidden = self.frozen(batch.inputs) + self.bn(batch.inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean(0)

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        losses = self(batch)
        return {"loss": losses, "top1": torch.zeros_like(losses)}


@dataclass
class Numbers:
    inputs: Tensor
    num_targets: Tensor


class NumbersLoader:
    """Four batches of numbers far from 0, so that statistics move."""

    def __iter__(self) -> Iterator[Numbers]:
        for seed in range(4):
            yield Numbers(5 + torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)), torch.tensor(6))

    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def modes(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()]


def mixed() -> Normed:
    model = Normed().train()
    model.frozen.eval()
    model.layers[0].eval()
    return model


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model: Normed) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    lambda model: model,
    lambda model: torch.compile(model, backend="eager"),
    nn.parallel.DistributedDataParallel,
    sharded,
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_module_is_left_as_it_was(group: None, wrapper: Any) -> None:
    model = mixed()
    wrapped = wrapper(model)
    for way in (lambda: None, lambda: wrapped.eval(), lambda: model.bn.train()):
        way()
        before, before_inside = modes(wrapped), modes(model)
        with evaluating(wrapped):
            assert not any(mode for _, mode in modes(wrapped) + modes(model))
        assert modes(wrapped) == before
        assert modes(model) == before_inside
        with pytest.raises(ZeroDivisionError), evaluating(wrapped):
            1 / 0  # noqa: B018
        assert modes(wrapped) == before
        assert modes(model) == before_inside


def test_a_model_in_evaluation_mode_trains_inside_and_is_left_so() -> None:
    model = mixed()
    before = modes(model)
    with training(model):
        assert modes(model) == before  # what is frozen stays so
    model.training = False
    before = modes(model)
    with training(model):
        assert all(mode for _, mode in modes(model))
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), training(model):
        1 / 0  # noqa: B018
    assert modes(model) == before


def test_what_a_model_does_of_its_own_when_its_mode_changes_is_asked_for() -> None:
    class Merged(nn.Linear):
        told: list[bool]

        def train(self, mode: bool = True) -> Merged:
            self.told = [*getattr(self, "told", []), mode]
            return super().train(mode)

    model = Merged(2, 2)
    with evaluating(model):
        assert model.told == [False]
    assert model.told == [False, True]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_run_keeps_what_is_frozen(tmp_path: Path, is_training: bool) -> None:
    model = mixed() if is_training else Normed().eval()
    before = modes(model)
    config = TrainerConfig(device="cpu", epochs=2, evaluate_every=2, compile="off", precision="fp32")
    Trainer(model, config, Loaders(NumbersLoader(), NumbersLoader()), run_dir=tmp_path).fit()
    assert modes(model) == before
    assert model.bn.num_batches_tracked == 8  # neither evaluations nor anything else counts
    assert model.frozen.num_batches_tracked == (0 if is_training else 8)
    assert model.frozen.running_mean.eq(0).all() == is_training


def test_evaluating_leaves_modes_and_statistics() -> None:
    model = mixed()
    before, statistics = modes(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    evaluate(model, NumbersLoader())
    assert modes(model) == before
    assert all(buffer.equal(statistics[name]) for name, buffer in model.named_buffers())
    model.metrics = lambda batch: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        evaluate(model, NumbersLoader())
    assert modes(model) == before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's use of its own
@pytest.mark.parametrize("verb", ["generate", "export"])
def test_generating_and_exporting_keep_what_is_frozen(verb: str) -> None:
    config = EventTransformerConfig(("a", "b"), (9, 7), 2, 4, 3, d_model=16, num_heads=2, dropout=0.5)
    model = EventTransformer(config).train()
    model.decoder[0].eval()
    model.norm.eval()
    before = modes(model)

    class Past:
        anchors = torch.ones(2, 2, dtype=torch.int32)

        def sources(self, generated: Tensor) -> Tensor:
            return torch.ones(2, 2, 4, 2, dtype=torch.int32)

    if verb == "generate":
        generate(model, Past(), 2, temperature=0)
        model.heads.weight.data[0, 0] = torch.nan
        with pytest.raises(FloatingPointError):
            generate(model, Past(), 2, temperature=0)
    else:
        export_logits(model)
    assert modes(model) == before
