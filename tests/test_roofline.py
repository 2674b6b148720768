import pytest
import torch

from eventkern import hardware
from profiling.roofline import Ceilings, Work


def test_the_floor_is_the_larger_of_two_times() -> None:
    ceilings = Ceilings(torch.device("cpu"), 100.0, {torch.float32: 1000.0, torch.bfloat16: 4000.0})
    arithmetic = Work(operations=8000.0, bytes=300.0)
    assert (ceilings.floor_s(arithmetic, torch.float32), ceilings.bound(arithmetic, torch.float32)) == (8.0, "gemm")
    assert (ceilings.floor_s(arithmetic, torch.bfloat16), ceilings.bound(arithmetic, torch.bfloat16)) == (3.0, "copy")


def test_each_ceiling_is_measured_once_and_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda device: asked.append("copy") or 2.0)
    monkeypatch.setattr(hardware, "gemm_rate", lambda device, dtype: asked.append(dtype) or 5.0)
    ceilings = Ceilings(torch.device("cpu"))
    assert ceilings.to_dict() == {
        "device": "cpu",
        "copy_bytes_per_s": None,
        "read_bytes_per_s": {},
        "gemm_flops_per_s": {},
    }
    monkeypatch.setattr(hardware, "read_bandwidth", lambda size, device: asked.append(size) or 4.0)
    for _ in range(2):
        assert ceilings.floor_s(Work(operations=10.0, bytes=2.0), torch.float32) == 2.0
        assert ceilings.floor_s(Work(0.0, bytes=2.0, cache_bytes=20.0, cache_size=64), torch.float32) == 5.0
        assert ceilings.bound(Work(0.0, bytes=2.0, cache_bytes=20.0, cache_size=64), torch.float32) == "cache"
    assert asked == ["copy", torch.float32, 64]
    assert ceilings.to_dict()["read_bytes_per_s"] == {"64": 4.0}
    assert ceilings.to_dict()["gemm_flops_per_s"] == {"float32": 5.0}
