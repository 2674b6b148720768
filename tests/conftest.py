"""What every test needs: one thread, poisoned fresh memory, the accuracy judge, and no GPU test where there is none."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    no_interpreter = pytest.mark.skip(
        reason="needs a CUDA device, or TRITON_INTERPRET=1: see tests/test_interpreter.py"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        if item.get_closest_marker("triton") and not is_interpreted:
            item.add_marker(no_interpreter)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors this small gain nothing from threads, and lose much to threads that wait where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill torch.empty with NaN (integers: their largest value), after flash-linear-attention's tests."""
    real_empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real_empty(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta or tensor.dtype == torch.bool:
            return tensor
        with torch.no_grad():
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture
def triton_device() -> torch.device:
    """Where the tests marked `triton` keep their tensors: a GPU, or the CPU for Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20131101)


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """Judge a result by a float64 truth: at most 4 times the error of torch's own computation in the same dtype, plus
    4 ulp of the truth's RMS."""

    def judge(actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
        assert truth.dtype == torch.float64
        assert actual.dtype == same_dtype.dtype
        assert actual.shape == same_dtype.shape == truth.shape
        if truth.numel() == 0:
            return
        error = (actual.double() - truth).abs().max().item()
        own_error = (same_dtype.double() - truth).abs().max().item()
        floor = 4 * torch.finfo(actual.dtype).eps * truth.square().mean().sqrt().item()
        assert error <= 4 * own_error + floor, f"error {error:.3e}, torch's own {own_error:.3e}, floor {floor:.3e}"

    return judge


@pytest.fixture(scope="session")
def visits_schema() -> Callable[..., str]:
    """The TOML of a schema of visits, of which each category is an id; validation begins at `split`."""

    def text(split: str, *categories: str) -> str:
        streams = '{ name = "person", entity = "person" }, { name = "time", entity = "all" }'
        head = ['name = "visits"', 'timestamp = "when"', 'timezone = "UTC"', 'key = "person"', f'split = "{split}"']
        tables = [f'\n[[categories]]\nname = "{name}"\nkind = "id"' for name in categories]
        return "\n".join([*head, f"streams = [{streams}]", *tables]) + "\n"

    return text
