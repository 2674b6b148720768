"""Devices and precisions by name, and seeds."""

from __future__ import annotations

import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from eventkern.train import ConfigError
from eventkern.train.device import (
    autocast,
    float32_products,
    has_precision,
    seed_everything,
    select_device,
    select_precision,
)


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, wanted in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert select_device("auto") == torch.device(wanted)
        assert select_device("cpu") == torch.device("cpu")
    for missing in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=rf"device is '{missing}', but torch .* sees no such device"):
            select_device(missing)
    with pytest.raises(ConfigError, match=r"device is 'tpu', but must be auto \| cpu \| cuda \| mps"):
        select_device("tpu")


def test_auto_precision_is_bf16_where_cuda_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_precision("auto", torch.device("cpu")) == "fp32"
    for has_it, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it, **_: has_it)
        assert select_precision("auto", torch.device("cuda")) == wanted
        assert select_precision("fp32", torch.device("cuda")) == "fp32"


@pytest.mark.parametrize(
    ("precision", "kind", "capability"),
    [("tf32", "cpu", (9, 0)), ("tf32", "mps", (9, 0)), ("tf32", "cuda", (7, 5)), ("fp16", "mps", (9, 0))],
)
def test_a_precision_that_a_device_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, precision: str, kind: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ConfigError) as error:
        select_precision(precision, torch.device(kind))
    assert str(error.value) == f"precision is '{precision}', but device {kind} has none: use fp32 or auto"
    assert not has_precision(precision, torch.device(kind))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert select_precision(precision, torch.device("cuda")) == precision


def test_tf32_is_set_inside_alone() -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    settings += (torch.backends.mkldnn.matmul,)
    before = [setting.fp32_precision for setting in settings]
    with float32_products("tf32"):
        assert [setting.fp32_precision for setting in settings[:3]] == ["tf32"] * 3
        # inductor's autotuning asks the one, kernels of others the other; torch raises where they do not agree
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    assert [setting.fp32_precision for setting in settings] == before
    assert torch.get_float32_matmul_precision() == "highest"
    assert before[0] != "tf32"
    with float32_products("bf16"):
        assert [setting.fp32_precision for setting in settings] == before


def test_tf32_leaves_a_setting_of_the_users_own() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with float32_products("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_autocast_computes_products_in_half_precision() -> None:
    x = torch.ones(2, 2)
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision, dtype in dtypes.items():
        with autocast(precision, torch.device("cpu")):
            assert (x @ x).dtype == dtype


def test_every_generator_is_seeded() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.standard_normal(), torch.randn(1).item()]  # noqa: NPY002

    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    again = draw()
    seed_everything(2**40 + 2)
    other = draw()
    assert again == first
    others = []
    for rank, step in ((1, 0), (2, 0), (1, 1), (0, 1)):
        seed_everything(2**40 + 1, rank, step)
        others += draw()
    assert len({*others, *first}) == len(others) + len(first)
    assert not set(other) & set(first)


FAULTS_OF_A_BLOCK_FREED_AND_TAKEN_AGAIN = """
import resource, sys, torch
from eventkern.train.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(20):  # the heap takes some rounds to find its shape
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_comes_back_without_page_faults() -> None:
    faults = {}
    for kept in ("kept", "returned"):
        command = [sys.executable, "-c", FAULTS_OF_A_BLOCK_FREED_AND_TAKEN_AGAIN, kept]
        faults[kept] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["kept"] < 10 < faults["returned"]
