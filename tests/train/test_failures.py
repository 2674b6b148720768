"""What ends a run is one line with its way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.train import Loaders, Trainer, TrainerConfig
from eventkern.train.failures import RunFailure, explained, is_out_of_memory, smaller_step

CONFIG = TrainerConfig(batch_size=6, grad_accum=3, device="cpu")
WAY_OUT = (
    r"^out of memory at batch_size 6 and grad_accum 3: lower batch_size, and raise grad_accum to keep the step as "
)


def test_memory_that_is_used_up_on_a_cpu_names_the_keys(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Model(before_forward=lambda _: torch.zeros(2**60, dtype=torch.uint8))
    trainer = Trainer(model, CONFIG, Loaders(tiny.Loader(6), tiny.Loader(4)), run_dir=tmp_path)
    with pytest.raises(RunFailure, match=WAY_OUT) as error:
        trainer.fit()
    assert "can't allocate memory" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_memory_that_is_used_up_on_a_gpu_names_the_keys(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Model(before_forward=lambda _: torch.zeros(2**50, dtype=torch.uint8, device="cuda"))
    config = TrainerConfig(batch_size=6, grad_accum=3, device="cuda", compile="off")
    loaders = Loaders(tiny.Loader(6, device="cuda"), tiny.Loader(4, device="cuda"))
    with pytest.raises(RunFailure, match=WAY_OUT):
        Trainer(model, config, loaders, run_dir=tmp_path).fit()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5000\nmore"


LOST = "^lost another rank, whose own message says why; --resume auto goes on"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), WAY_OUT),
        (lambda: MemoryError(), WAY_OUT + r"large \(MemoryError\)$"),
        (lambda: RuntimeError(GLOO), LOST + r" \(\[/pyt"),
        (lambda: RuntimeError("Gloo connectFullMesh failed with an error"), LOST),
        (lambda: torch.distributed.DistNetworkError("The client socket has timed out"), LOST),
        (lambda: torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"), LOST),
    ],
)
def test_errors_of_the_machine_are_explained(make: Callable[[], Exception], wanted: str) -> None:
    with pytest.raises(RunFailure, match=wanted) as error, explained(smaller_step(CONFIG), is_alone=False):
        raise make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), RuntimeError("mat1 and mat2"), ValueError("gloo"), RunFailure("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, explained(smaller_step(CONFIG)):
        raise error
    assert passed.value is error
    assert not is_out_of_memory(error)
