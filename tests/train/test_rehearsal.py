"""A run whose state no checkpoint could hold ends before its first step; one that has begun is never lost to a save."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from eventkern.train import CheckpointError, TrainerConfig
from eventkern.train.checkpoint import CheckpointFolder, load_checkpoint
from eventkern.train.weights import DTYPES

EVERY_DTYPE = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
NOT_SAVED = {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
"""By torch.save itself."""
QUANTISED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=num_bytes))


@pytest.mark.parametrize("dtype", [dtype for dtype in EVERY_DTYPE if dtype not in QUANTISED], ids=str)
def test_a_buffer_of_any_dtype_is_saved_and_taken_up_or_refused_before_the_first_step(
    tiny: Any, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(byte: int) -> Any:
        model = tiny.Model()
        model.register_buffer("scale", torch.full((64,), byte, dtype=torch.uint8).view(dtype))
        return model

    model, run = made(1), tmp_path / "run"
    if str(dtype) in NOT_SAVED:
        told = rf"checkpoints: no checkpoint of this run could be loaded: state\['model'\]\['scale'\] is of {dtype} \("
        with pytest.raises(CheckpointError, match=told):
            tiny.trainer(run, model, max_steps=2).fit()
        assert model.num_calls == 0
        return
    tiny.trainer(run, model, max_steps=2).fit()
    other = made(0)
    tiny.trainer(run, other, max_steps=3).resume(run / "checkpoints/last")
    assert other.scale.view(torch.uint8).equal(model.scale.view(torch.uint8))
    is_whole = dtype in DTYPES
    assert (run / "checkpoints/best.safetensors").exists() == is_whole
    assert (f"best.safetensors is left out: weights['scale'] is of {dtype}" in capsys.readouterr().out) == (
        not is_whole
    )


class Weird(NamedTuple):
    scale: float


EXTRA = {
    "a dict": ({"scale": 2.0, "names": ["a", None], "table": torch.ones(2)}, None),
    "a tensor": (torch.arange(3), None),
    "numbers": ((1, 2.5, "x", True), None),
    "nothing": (None, None),
    "a scalar of numpy": ({"scale": [np.float64(2)]}, r"\['scale'\]\[0\] is of type float64"),
    "a configuration": ({"config": TrainerConfig()}, r"\['config'\] is of type TrainerConfig"),
    "a tuple with names": (Weird(2.0), r"_extra_state'\] is of type Weird"),
    "a lock": ({"a": 1, "lock": threading.Lock()}, r"\['lock'\] is of type lock"),
}


@pytest.mark.parametrize("name", EXTRA)
def test_extra_state_is_saved_and_taken_up_or_refused_before_the_first_step(
    tiny: Any, tmp_path: Path, name: str
) -> None:
    value, refused = EXTRA[name]

    class Extra(tiny.Model):  # type: ignore[misc]
        extra: Any = None

        def get_extra_state(self) -> Any:
            return value

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    model = Extra()
    if refused is None:
        tiny.trainer(tmp_path, model, max_steps=2).fit()
        other = Extra()
        tiny.trainer(tmp_path, other, max_steps=3).resume(tmp_path / "checkpoints/last")
        assert repr(other.extra) == repr(value)
        assert (tmp_path / "checkpoints/best.safetensors").exists() == isinstance(value, torch.Tensor)
        return
    with pytest.raises(CheckpointError, match=rf"state\['model'\].*{refused} \(.*; give tensors and plain values"):
        tiny.trainer(tmp_path, model, max_steps=2).fit()
    assert model.num_calls == 0


def test_whatever_else_a_checkpoint_would_hold_is_tried_too(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Model()
    trainer = tiny.trainer(tmp_path, model)
    trainer._metadata = {"model": {"width": np.int64(3)}}
    with pytest.raises(CheckpointError, match=r"state\['metadata'\]\['model'\]\['width'\] is of type int64 \("):
        trainer.fit()

    class Counting(tiny.Loader):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "position": np.int64(0)}

    with pytest.raises(CheckpointError, match=r"state\['loader'\]\['position'\] is of type int64 \("):
        tiny.trainer(tmp_path / "other", model, loader=Counting(6)).fit()
    assert model.num_calls == 0


@pytest.mark.parametrize("is_resumed", [False, True])
def test_too_little_space_is_told_before_the_first_step(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    tiny.trainer(tmp_path, max_steps=2).fit()
    files = [tmp_path / "checkpoints" / name for name in ("last", "best.safetensors")]
    wanted = sum(file.stat().st_size for file in files)
    run = tmp_path if is_resumed else tmp_path / "fresh/run"
    model = tiny.Model()
    trainer = tiny.trainer(run, model, max_steps=4)
    if is_resumed:
        trainer.resume(run / "checkpoints/last")
    with monkeypatch.context() as patch:
        free(patch, wanted // 2)
        with pytest.raises(OSError, match=r"checkpoints: No space left on device: .* bytes wanted .*; nothing was"):
            trainer.fit()
        assert model.num_calls == 0
        free(patch, int(1.1 * wanted))
        trainer = tiny.trainer(run, model, max_steps=4)
        trainer.fit()
    assert trainer.step == 4


def test_the_size_that_is_told_is_that_of_the_first_checkpoint_with_moments(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.Model()
    model.more = torch.nn.Linear(300, 300)  # larger than what torch.save adds
    free(monkeypatch, 10**7)
    tiny.trainer(tmp_path, model, max_steps=2, keep_checkpoints=7).fit()
    wanted = sum((tmp_path / "checkpoints" / name).stat().st_size for name in ("last", "best.safetensors"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "space is short" in line]
    told = int(line.split(" bytes wanted")[0].split()[-1].replace(",", ""))
    assert f"up to 9 checkpoints lie in {tmp_path / 'checkpoints'} at once" in line
    # no gradient reaches `more`, so that it never gets the moments that were counted
    assert told == pytest.approx(wanted + 2 * 4 * (300 * 300 + 300), rel=0.01)


def test_a_run_that_has_space_and_plain_values_hears_nothing(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.trainer(tmp_path, max_steps=1).fit()
    out = capsys.readouterr().out
    assert "left out" not in out
    assert "space" not in out
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_the_first_save_is_read_back_whole_and_later_ones_by_their_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *arguments, **keys: loads.append(keys) or load(*arguments, **keys))
    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"it does not load: state\['loader'\] is of type int64 \("):
        folder.save({"model": {}, "loader": np.int64(3)}, 1, is_best=True)
    assert list(folder.path.iterdir()) == []
    loads.clear()
    for step in (2, 3):
        folder.save({"model": {"w": torch.ones(3)}, "step": step}, step, is_best=True)
        assert [keys["weights_only"] for keys in loads] == [True]
    assert load_checkpoint(folder.path / "last")["step"] == 3


def test_an_older_best_is_no_side_file_of_a_newer_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save({"model": {"w": torch.ones(3)}, "step": 1}, 1, is_best=True)
    assert (tmp_path / "best.safetensors").exists()
    odd = {"model": {"w": torch.ones(3, dtype=torch.complex128)}}
    folder.save({**odd, "step": 2}, 2, is_best=False)
    assert (tmp_path / "best.safetensors").exists()
    folder.save({**odd, "step": 3}, 3, is_best=True)
    assert not (tmp_path / "best.safetensors").exists()
    assert load_checkpoint(tmp_path / "best")["step"] == 3
