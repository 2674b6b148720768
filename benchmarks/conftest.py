"""How contenders are timed, and the table at the end of a run.

pytest-benchmark times each test on its own, minutes apart, and a machine that warms up or is shared drifts meanwhile.
So one benchmark here is one case with all its contenders: pytest-benchmark drives (the first of) ours, and before each
of its rounds the others run once each. They take turns (A B C A B C ...), drift meets all alike, and ratios are taken
round by round. An untimed call goes before each timed one, so that nobody finds the caches as another contender left
them (the table of pytest-benchmark itself counts both of ours).
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import measure, report
from benchmarks.environment import environment
from benchmarks.measure import Compare, Contender
from eventkern.train.device import keep_freed_memory
from profiling.roofline import Ceilings, Work

CASES = pytest.StashKey[list[report.Case]]()
CEILINGS = pytest.StashKey[dict[str, Ceilings]]()
ENVIRONMENTS = pytest.StashKey[dict[str, dict[str, object]]]()
MIN_ROUNDS = 5
MAX_ROUNDS = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("eventkern benchmarks")
    group.addoption("--full", action="store_true", help="every size and every peer, slow starters too (default: quick)")
    group.addoption("--fast-starters", action="store_true", help="with --full: leave out peers that compile first")
    group.addoption("--quick", action="store_false", dest="full", help="the default: small budgets, fast starters")
    group.addoption("--results-dir", type=Path, help="write <subject>_<hardware>_<yyyymmdd>.{json,md} into this folder")


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()  # as a CPU run of the trainer does: page faults of fresh memory would drown every contender
    config.stash[CASES] = []
    config.stash[CEILINGS] = {}
    config.stash[ENVIRONMENTS] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` was given."""
    return bool(request.config.getoption("full"))


@pytest.fixture(scope="session")
def has_slow_starters(request: pytest.FixtureRequest, is_full: bool) -> bool:
    """Whether peers take part that need seconds before their first result."""
    return is_full and not request.config.getoption("fast_starters")


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, is_full: bool) -> Compare:
    """Times contenders in turn, ours under pytest-benchmark, and keeps the case for the table."""
    config = request.config
    subject = request.path.stem.removeprefix("bench_")

    def compare(
        case: str, contenders: list[Contender], work: Work, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        if str(device) not in config.stash[ENVIRONMENTS]:
            config.stash[ENVIRONMENTS][str(device)] = environment(device)
            config.stash[CEILINGS][str(device)] = Ceilings(device)
        ours = next(contender for contender in contenders if contender.is_ours)
        others = [contender for contender in contenders if contender is not ours]
        for contender in contenders:
            contender.run()
            contender.peak_bytes = measure.peak_extra_bytes(contender.run, device)
        start_s = time.perf_counter()
        for contender in contenders:
            contender.time_once(device)
            contender.times_s.clear()
        round_s = time.perf_counter() - start_s
        budget_s = 10.0 if is_full else 4.0
        num_rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(budget_s / round_s)))
        turns = measure.rotations(others)

        def let_others_run() -> None:
            for other in next(turns):
                other.time_once(device)

        benchmark.group = f"{subject}: {case}"
        run_rounds: Callable[..., object] = benchmark.pedantic
        run_rounds(ours.time_once, args=(device,), setup=let_others_run, rounds=num_rounds)
        if benchmark.disabled:
            return
        table = measure.rows(contenders, work, config.stash[CEILINGS][str(device)], dtype)
        benchmark.extra_info |= {row.contender: {"median_s": row.median_s, "ratio": row.ratio} for row in table}
        dtype_name = str(dtype).removeprefix("torch.")
        config.stash[CASES].append(report.Case(subject, case, str(device), dtype_name, work, tuple(table)))

    return compare


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cases = config.stash[CASES]
    if not cases:
        return
    terminalreporter.section("contenders, timed in turn")
    terminalreporter.write_line(report.markdown(cases))
    environments = config.stash[ENVIRONMENTS]
    ceilings = {device: measured.to_dict() for device, measured in config.stash[CEILINGS].items()}
    for device, facts in environments.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in facts.items()))
        terminalreporter.write_line(f"ceilings: {ceilings[device]}")
    folder = config.getoption("results_dir")
    if folder is not None:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        for path in report.write(folder, cases, environments, ceilings, command):
            terminalreporter.write_line(f"wrote {path}")
