"""The loop: equal to a large batch, bitwise on resume, silent between logs, and stoppable."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eventkern.train import ConfigError, Ledger, Loaders, Trainer
from eventkern.train.checkpoint import load_checkpoint


def step_gradients(trainer: Trainer, batches: list[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The gradients that the optimizer is given, and the losses that are logged."""
    found: dict[str, torch.Tensor] = {}

    def record(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})  # type: ignore[attr-defined]

    trainer.optimizer.register_step_pre_hook(record)
    return found, trainer._train_step(batches).losses


@pytest.mark.parametrize("parts", [(3, 3), (1, 2, 3), (1, 1, 1, 1, 1, 1), (5, 1)])
def test_accumulation_equals_one_large_batch(tiny: Any, tmp_path: Path, parts: tuple[int, ...]) -> None:
    loader = tiny.Loader(6)
    large = loader.batch(list(range(6)))
    ends = np.cumsum(parts)
    small = [loader.batch(list(range(end - size, end))) for end, size in zip(ends, parts, strict=True)]
    label_counts = [int(batch.num_targets) for batch in small]
    assert len({count / size for count, size in zip(label_counts, parts, strict=True)}) > 1  # unequal, else no test

    one, loss_of_one = step_gradients(tiny.trainer(tmp_path, clip=0.0), [large])
    many, loss_of_many = step_gradients(tiny.trainer(tmp_path, clip=0.0), small)
    for name, gradient in one.items():
        # each element sums about 20 labels: a few roundings of the largest addend
        torch.testing.assert_close(
            many[name], gradient, rtol=0, atol=8 * 2**-24 * gradient.abs().max().item(), msg=name
        )
    torch.testing.assert_close(loss_of_many, loss_of_one, rtol=4 * 2**-24, atol=0)


def test_clipping_bounds_the_step_and_logs_the_norm_before(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, clip=0.25, max_steps=1)
    clipped, _ = step_gradients(trainer, [trainer.loaders.train.batch([0, 1, 2])])  # type: ignore[attr-defined]
    free, _ = step_gradients(tiny.trainer(tmp_path, clip=0.0), [tiny.Loader(6).batch([0, 1, 2])])
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    norm_before = torch.stack([gradient.norm() for gradient in free.values()]).norm()
    assert norm_before > 0.5
    assert norm.item() == pytest.approx(0.25, rel=1e-4)


def test_a_step_does_not_wait_for_the_device(tiny: Any, tmp_path: Path) -> None:
    class Syncs(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
                self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    trainer = tiny.trainer(tmp_path, grad_accum=2, warmup_steps=2)
    batches = list(trainer.loaders.train)
    with Syncs() as syncs:
        for step in range(2):
            trainer._train_step(batches[2 * step : 2 * step + 2])
        assert syncs.seen == []
        torch.ones(()).item()
        assert syncs.seen  # the watch works


def test_best_is_the_lowest_validation_loss_and_the_ledger_is_its(tiny: Any, tmp_path: Path) -> None:
    ledger = Ledger(("kind", "place"), (5, 7), [1.5, 1.8], [1.4, 1.7])
    trainer = tiny.trainer(tmp_path, tiny.Scripted([4.0, 3.0, 3.5, 3.25]), evaluate_every=3, keep_checkpoints=1)
    trainer.ledger = ledger
    result = trainer.fit()
    assert result.best_loss == 3.0
    assert result.step == 12
    folder = tmp_path / "checkpoints"
    assert os.readlink(folder / "best") == "step-00000006.pt"
    assert os.readlink(folder / "last") == "step-00000012.pt"
    assert sorted(path.name for path in folder.glob("*.pt")) == ["step-00000006.pt", "step-00000012.pt"]
    saved = json.loads((tmp_path / "ledger.json").read_text())
    assert (saved["step"], saved["sum"]["model"]) == (6, 3.0)
    evaluated = {
        row["step"]: row["validation_loss_sum"] for row in tiny.rows_of(tmp_path) if "validation_loss_sum" in row
    }
    assert evaluated == {3: 4.0, 6: 3.0, 9: 3.5, 12: 3.25}


def test_the_plateau_schedule_sees_every_due_evaluation(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Scripted([3.0] * 12)
    trainer = tiny.trainer(tmp_path, model, schedule="plateau", evaluate_every=1)
    trainer.fit()
    rates = [row["lr"] for row in tiny.rows_of(tmp_path)]
    # the first evaluation is the best; more than 3 worse ones in a row halve the rate of the step after
    assert rates == [0.01] * 5 + [0.005] * 4 + [0.0025] * 3


def test_the_rate_that_is_logged_is_the_rate_of_the_step(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, schedule="linear", warmup_steps=4)
    used: list[float] = []  # every step another
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(float(optimizer.param_groups[0]["lr"])))
    trainer.fit()
    assert [row["lr"] for row in tiny.rows_of(tmp_path)] == used
    assert len(set(used)) == len(used) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_never_waits_for_it(tiny: Any, tmp_path: Path, precision: str) -> None:
    keys = {"device": "cuda", "precision": precision, "grad_accum": 2, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = tiny.trainer(tmp_path, **keys)
    batches = list(trainer.loaders.train)
    trainer._train_step(batches[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = trainer._train_step(batches[2:])
        with pytest.raises(RuntimeError, match="synchroniz"):
            outcome.losses.tolist()  # the watch works
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.losses.isfinite().all()


def test_the_run_folder_and_its_rows(tiny: Any, tmp_path: Path) -> None:
    result = tiny.trainer(tmp_path, log_every=3).fit()
    assert (result.step, result.epochs_done) == (12, 3)
    rows = tiny.rows_of(tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12]  # every third, and the end of every epoch
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2, 3, 3]
    for row in rows:
        assert row["loss_mean"] == pytest.approx(row["loss_sum"] / 2)
        assert row["events_per_s"] > 0
        assert 0 <= row["data_wait_ms"] <= row["step_ms"]
    assert rows[-1]["loss_sum"] < rows[0]["loss_sum"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_pair_of_loaders_and_no_folder_are_enough(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = (tiny.Loader(6), tiny.Loader(4, num_samples=9, seed=1))
    trainers = [
        Trainer(tiny.Model(), tiny.config, each) for each in (pair, pair, pair, Loaders(*pair))
    ]  # within a second
    assert len({trainer.fit() for trainer in trainers}) == 1
    assert sorted(Path("runs").iterdir()) == [trainer.run_dir for trainer in trainers]
    assert (trainers[1].run_dir / "checkpoints/last").exists()


def test_max_steps_ends_inside_an_epoch_with_an_evaluation(tiny: Any, tmp_path: Path) -> None:
    result = tiny.trainer(tmp_path, max_steps=2, schedule="linear").fit()
    assert (result.step, result.epochs_done, result.interrupted) == (2, 0, False)
    assert "validation_loss_sum" in tiny.rows_of(tmp_path)[-1]
    assert [row["lr"] for row in tiny.rows_of(tmp_path)] == [0.01, 0.005]  # the schedule ends with the run


def test_a_finished_run_says_so(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.trainer(tmp_path, max_steps=2).fit()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = tiny.trainer(tmp_path, max_steps=2)
    again.resume(tmp_path / "checkpoints/last")
    assert again.fit().step == 2
    assert "nothing left to do at step 2: raise epochs or max_steps" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    model = tiny.Model(before_forward=lambda calls: signal.raise_signal(number) if calls == 2 else None)
    trainer = tiny.trainer(tmp_path, model, log_every=100)
    trainer.ledger = Ledger(("kind", "place"), (5, 7), [1.5, 1.8], [1.4, 1.7])
    result = trainer.fit()
    assert (result.step, result.interrupted) == (2, True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "ledger.json").read_text())["step"] is None
    assert load_checkpoint(tmp_path / "checkpoints/last")["step"] == 2
    assert "stopped after step 2" in (said := capsys.readouterr().out)
    assert "to go on: eventkern train on" in said
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_aborts(tiny: Any, tmp_path: Path) -> None:
    def press_twice(calls: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, tiny.Model(before_forward=press_twice)).fit()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_autocast_over_float32_weights(
    tiny: Any, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    model = tiny.Model()
    tiny.trainer(tmp_path, model, precision=precision, max_steps=1).fit()
    assert model.dtypes == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for state in load_checkpoint(tmp_path / "checkpoints/last")["optimizer"]["state"].values():
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_fp16_takes_the_steps_of_its_unscaled_gradients(tiny: Any, tmp_path: Path) -> None:
    """Against fp16 without a scale, where it changes nothing: these gradients are far from float16's least number."""
    scaled, plain = (tiny.trainer(tmp_path, precision="fp16", clip=0.25) for _ in range(2))
    plain._optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for batch in list(scaled.loaders.train)[:3]:
        outcomes = [trainer._train_step([batch]) for trainer in (scaled, plain)]
        torch.testing.assert_close(outcomes[0].grad_norm, outcomes[1].grad_norm, rtol=2**-9, atol=0)
    pairs = zip(scaled.model.parameters(), plain.model.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * 0.01)  # of 3 steps of 0.01 each


def test_a_loss_scale_that_is_too_high_comes_down_and_costs_no_checkpoint(tiny: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, precision="fp16", max_skipped_steps=1, save_every=1, keep_checkpoints=20)
    trainer._optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
    trainer.fit()
    skipped = [row["skipped_steps"] for row in tiny.rows_of(tmp_path)]
    scales = [load_checkpoint(path)["scaler"]["scale"] for path in sorted(tmp_path.glob("checkpoints/step-*.pt"))]
    assert len(scales) == 12
    bad = [now > before for before, now in zip([0, *skipped], skipped, strict=False)]
    assert bad[0]
    assert not bad[-1]
    halved = [scale == before / 2 for before, scale in zip([2.0**22, *scales], scales, strict=False)]
    assert halved == bad
    assert scales[-1] < 2.0**22
    again = tiny.trainer(tmp_path, precision="fp16")
    again.resume(tmp_path / "checkpoints/last")
    assert again._optimizer_step.scaler.get_scale() == scales[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_precisions_train_on_a_gpu(tiny: Any, tmp_path: Path, precision: str, compiled: str) -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    seen: set[str] = set()
    model = tiny.Model(before_forward=lambda _: seen.add(torch.backends.cuda.matmul.fp32_precision))
    keys = {"device": "cuda", "precision": precision, "compile": compiled}
    if compiled == "on":
        model = tiny.Plain()
    result = tiny.trainer(tmp_path, model, **keys).fit()
    assert (result.step, [setting.fp32_precision for setting in settings]) == (12, before)
    assert compiled == "on" or (seen == {"tf32"}) == (precision == "tf32")
    rows = tiny.rows_of(tmp_path)
    assert rows[-1]["loss_sum"] < rows[0]["loss_sum"]


def test_a_loader_without_a_batch_is_named(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training loader has no batch"):
        tiny.trainer(tmp_path, loader=tiny.Loader(6, num_samples=0))
