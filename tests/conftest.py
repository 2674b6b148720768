"""What every test needs: one thread, poisoned fresh memory, the accuracy judge, and no GPU test where there is none."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SHARES = pytest.StashKey[dict[tuple[str, str], tuple[float, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "repeat each test that judges an accuracy under N seeds, and show the largest share of its bounds"
    parser.addoption("--seeds", type=int, metavar="N", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHARES] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    num_seeds = metafunc.config.getoption("seeds")
    if num_seeds and {"assert_accurate", "seed"} <= set(metafunc.fixturenames):
        metafunc.parametrize("seed", range(num_seeds))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("seeds"):
        terminalreporter.section("largest share of a bound")
        for (_, kind), (share, case) in sorted(config.stash[SHARES].items()):
            terminalreporter.write_line(f"{share:.2f} {kind:8s} {case}")


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
    with torch.device("cpu"):  # torch now lists the functions that a default device is for, and keeps the list
        torch.empty(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty makes with NaN (integers: their largest value), after flash-linear-attention's tests."""

    def poison(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = real(*args, **kwargs)
            if torch.compiler.is_compiling() or tensor.is_meta or tensor.dtype == torch.bool or not tensor.numel():
                return tensor
            with torch.no_grad():
                has_nan = tensor.is_floating_point() or tensor.is_complex()
                return tensor.fill_(torch.nan if has_nan else torch.iinfo(tensor.dtype).max)

        return poisoned

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def triton_device() -> torch.device:
    """Where the tests marked `triton` keep their tensors: a GPU, or the CPU for Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def seed() -> int:
    """Of `generator`; `--seeds N` repeats each test that judges an accuracy under N of them."""
    return 20131101


@pytest.fixture
def assert_accurate(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Judge a result by a float64 truth, beside torch's own computation in the same dtype.

    The root mean square error may be twice torch's own and a floor: 4 ulp of the truth's RMS in float32, where the
    order of a sum shows, and a tenth in 16 bits, where one rounding is all that a sum in float32 costs. Where few
    elements carry the RMS it is chance to that extent: of n such, one in sqrt(n) is added. The largest error is one
    draw, and torch's may be small by chance: its bound is 10 times torch's own, its own RMS error and the floor. Where
    a truth is what is left of larger terms, the RMS of `terms` gives the ulp. Over 1,000 seeds no error passes 0.7 of
    its bound (`--seeds`).
    """
    shares = request.config.stash[SHARES]
    name = request.node.nodeid.split("[")[0]

    def judge(actual: Tensor, same_dtype: Tensor, truth: Tensor, terms: Tensor | None = None) -> None:
        assert truth.dtype == torch.float64
        assert actual.dtype == same_dtype.dtype
        assert actual.shape == same_dtype.shape == truth.shape
        if truth.numel() == 0:
            return
        error, own = actual.double() - truth, same_dtype.double() - truth
        own_error = root_mean_square(own)
        scale = root_mean_square(truth if terms is None else terms)
        num_ulp = 4 if actual.dtype == torch.float32 else 0.1
        if actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
            num_ulp = 1  # the interpreter cuts float32 to bfloat16, where a GPU rounds
        floor = num_ulp * torch.finfo(actual.dtype).eps * scale
        weights = truth.square() if truth.any() else torch.ones_like(truth)
        num_carriers = weights.sum().square().item() / weights.square().sum().item()
        bounds = {
            "RMS": (root_mean_square(error), 2 * (1 + num_carriers**-0.5) * own_error + floor),
            "largest": (largest(error), 10 * (largest(own) + own_error + floor)),
        }
        for kind, (value, bound) in bounds.items():
            assert value <= bound, (
                f"{kind} error {value:.3e}, bound {bound:.3e} (torch's own RMS error {own_error:.3e})"
            )
            share = value / bound if bound else 0.0
            shares[name, kind] = max(shares.get((name, kind), (0.0, "")), (share, request.node.nodeid))

    return judge


def root_mean_square(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@pytest.fixture(scope="session")
def visits_schema() -> Callable[..., str]:
    """The TOML of a schema of visits, of which each category is an id; validation begins at `split`."""

    def text(split: str, *categories: str) -> str:
        streams = '{ name = "person", entity = "person" }, { name = "time", entity = "all" }'
        head = ['name = "visits"', 'timestamp = "when"', 'timezone = "UTC"', 'key = "person"', f'split = "{split}"']
        tables = [f'\n[[categories]]\nname = "{name}"\nkind = "id"' for name in categories]
        return "\n".join([*head, f"streams = [{streams}]", *tables]) + "\n"

    return text
