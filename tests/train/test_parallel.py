"""Compiled training: the steps of eager training, one graph for each kind of batch, and plain checkpoints."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eventkern.data.loader import EventBatch
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.train import Loaders, Trainer, TrainerConfig
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.config import ConfigError
from eventkern.train.failures import RunFailure
from eventkern.train.meter import Meter
from eventkern.train.parallel import blocks

BASE: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 6,
    "lr": 0.01,
    "schedule": "constant",
    "device": "cpu",
    "log_every": 1,
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as ever, but run by torch's own operators, which takes seconds less."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def make_trainer(tiny: Any, run_dir: Path, model: nn.Module, **keys: Any) -> Trainer:
    config = TrainerConfig(**{**BASE, **keys})
    return Trainer(model, config, Loaders(tiny.Loader(6), tiny.Loader(4, num_samples=9, seed=1)), run_dir=run_dir)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_inductor")
def test_nothing_is_compiled_after_the_first_epoch(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tiny, tmp_path, tiny.Plain(), compile="on", grad_accum=2)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    graphs: list[int] = []
    next_epoch = trainer._next_epoch

    def count() -> None:
        graphs.append(counters["unique_graphs"])
        next_epoch()

    left_out: list[float] = []
    trainer._meter.leave_out = left_out.append  # type: ignore[method-assign]
    trainer._next_epoch = count  # type: ignore[method-assign]
    assert trainer.fit().epochs_done == 4
    # batches of 6 and, at the end of an epoch, of 4
    assert graphs == [2, 2, 2, 2]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled in ")]
    assert [f"compiled in {seconds:.1f} s" for seconds in left_out] == told
    assert len(told) == 2
    assert min(left_out) > 0
    state = load_checkpoint(tmp_path / "checkpoints/last")
    assert state["model"].keys() == tiny.Plain().state_dict().keys()


@pytest.mark.usefixtures("without_inductor")
def test_a_warm_up_leaves_no_trace(tiny: Any, tmp_path: Path) -> None:
    """A compiled run has the steps of an eager one, dropout included: aot_eager draws from the same generator."""
    weights = []
    for compiled in ("on", "off"):
        model = tiny.Plain(dropout=0.3)
        make_trainer(tiny, tmp_path / compiled, model, compile=compiled).fit()
        weights.append(model.state_dict())
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=2e-6, msg=name)


def test_inductor_compiles_the_model_on_a_cpu(tiny: Any, tmp_path: Path) -> None:
    weights = []
    for compiled in ("on", "off"):
        model = tiny.Plain()
        make_trainer(tiny, tmp_path / compiled, model, compile=compiled, epochs=1, max_steps=3).fit()
        weights.append(model.state_dict())
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=2e-6, msg=name)


@pytest.mark.gpu
def test_inductor_compiles_the_model_on_a_gpu(tiny: Any, tmp_path: Path) -> None:
    config = TrainerConfig(**{**BASE, "device": "cuda", "compile": "auto"})
    loaders = [tiny.Loader(6, device="cuda"), tiny.Loader(4, num_samples=9, seed=1, device="cuda")]
    trainer = Trainer(tiny.Plain(), config, (loaders[0], loaders[1]), run_dir=tmp_path)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    trainer.fit()
    assert counters["unique_graphs"] == 2


def test_a_machine_without_a_compiler_is_told_the_way_out(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(RunFailure) as error:
        make_trainer(tiny, tmp_path / "run", tiny.Plain(dropout=0.125), compile="on").fit()
    assert str(error.value).startswith("torch.compile failed; --compile off trains without it (")
    assert "no-such-compiler" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_inductor")
def test_a_model_that_is_no_single_graph_is_told_the_way_out(tiny: Any, tmp_path: Path) -> None:
    class Broken(tiny.Plain):  # type: ignore[misc]
        def forward(self, batch: Any) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(batch)

    with pytest.raises(RunFailure, match=r"^torch.compile failed; --compile off trains without it \("):
        make_trainer(tiny, tmp_path, Broken(), compile="on").fit()


def test_auto_compiles_on_cuda_alone(tiny: Any, tmp_path: Path) -> None:
    assert make_trainer(tiny, tmp_path, tiny.Plain())._parallel.is_compiled is False
    assert make_trainer(tiny, tmp_path, tiny.Plain(), compile="on")._parallel.is_compiled is True


def test_seconds_of_a_compilation_are_in_no_step() -> None:
    meter = Meter()
    meter.count(torch.tensor(5))
    time.sleep(0.05)
    with_compilation = meter.read(5)["step_ms"]
    meter.leave_out(0.04)
    assert meter.read(5)["step_ms"] < with_compilation


def test_blocks_are_the_layers_of_encoders_and_decoder() -> None:
    config = EventTransformerConfig(
        ("a", "b"), (5, 7), 2, 4, 3, d_model=8, num_heads=2, encoder_layers=2, decoder_layers=3
    )
    model = EventTransformer(config)
    names = {id(module): name for name, module in model.named_modules()}
    wanted = [*(f"encoders.layers.{layer}" for layer in range(2)), *(f"decoder.{layer}" for layer in range(3))]
    assert [names[id(block)] for block in blocks(model)] == wanted


@pytest.mark.usefixtures("without_inductor")
def test_the_event_transformer_is_one_graph(tmp_path: Path) -> None:
    config = EventTransformerConfig(("a", "b"), (5, 7), 2, 4, 3, d_model=8, num_heads=2, dropout=0.1)
    model = EventTransformer(config)
    compiled = torch.compile(model, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for size in (6, 4, 5):
        sources = torch.randint(1, 5, (size, 2, 4, 2), generator=generator, dtype=torch.int32)
        targets = torch.randint(1, 5, (size, 4, 2), generator=generator, dtype=torch.int32)
        batch = EventBatch(sources, targets, torch.tensor(3 * size))
        losses = []
        for forward in (model, compiled):
            torch.manual_seed(0)
            losses.append(forward(batch))
        torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.usefixtures("without_inductor")
def test_a_filled_last_batch_compiles_nothing_and_has_the_losses_of_the_short_one() -> None:
    config = EventTransformerConfig(("a", "b"), (5, 7), 2, 4, 3, d_model=8, num_heads=2)
    model = EventTransformer(config)
    compiled = torch.compile(model, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(1, 5, (6, 2, 4, 2), generator=generator, dtype=torch.int32)
    targets = torch.randint(1, 5, (6, 4, 2), generator=generator, dtype=torch.int32)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for size in (6, 2, 6, 5):
        short = EventBatch(sources[:size], targets[:size], torch.tensor(3 * size))
        gradients = []
        for forward, batch in ((model, short), (compiled, short.padded(6))):
            model.zero_grad()
            losses = forward(batch)
            losses.sum().backward()
            gradients.append([losses.detach(), *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert counters["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_graphs_have_the_weights_of_eager_steps_on_a_gpu(grad_accum: int, tiny: Any, tmp_path: Path) -> None:
    weights = []
    for compiled in ("off", "reduce-overhead"):
        config = TrainerConfig(**{**BASE, "device": "cuda", "compile": compiled, "grad_accum": grad_accum})
        loaders = [tiny.Loader(6, device="cuda"), tiny.Loader(4, num_samples=9, seed=1, device="cuda")]
        model = tiny.Plain()
        Trainer(model, config, (loaders[0], loaders[1]), run_dir=tmp_path / compiled).fit()
        weights.append({name: weight.cpu() for name, weight in model.state_dict().items()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5, msg=name)


def test_graphs_want_one_process_on_cuda(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compile is 'reduce-overhead', but must be on or off for 1 rank on cpu"):
        make_trainer(tiny, tmp_path, tiny.Plain(), compile="reduce-overhead")
