"""Plays settings with several seeds, several at a time, and keeps every run that is finished in a file."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks.measure import rotations
from benchmarks.studies.loss_gap.settings import Setting
from benchmarks.studies.loss_gap.streams import open_stream, stream_name
from benchmarks.studies.loss_gap.training import Run, Stepper, missing, model_config, train
from eventkern.data import EventBatch
from eventkern.hardware import gemm_rate
from eventkern.models import EventTransformer
from eventkern.train.device import keep_freed_memory

FORMAT = 1
"""Of the file of runs and of what a run does: another number takes none of the runs before."""

GEMM_SHARE, CALL_S = 0.9, 0.006
"""What a step, mostly in bf16, reaches of float32's rate of matrix products, and its other seconds: for forecasts."""


class Runs:
    """Finished runs, in memory and as lines of a file: a study that was interrupted plays only what is missing.

    Args:
        path: the file, made by the first run; a last line cut short by a crash is dropped.
        threads: of each run; another number adds in another order, so its runs are not taken.
        commit: that runs are played at from now on.

    Attributes:
        commits: of each run by its key.
    """

    def __init__(self, path: Path, threads: int, commit: str = "unknown") -> None:
        self.path = path
        self.threads = threads
        self.commit = commit
        self.commits: dict[str, str] = {}
        self._found: dict[str, Run] = {}
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            path.write_bytes(b"".join(lines[:-1]))
            del lines[-1]
        for line in lines:
            entry = json.loads(line)
            self._found[entry["key"]] = Run.from_dict(entry["run"])
            self.commits[entry["key"]] = entry["commit"]

    def key(self, setting: Setting, seed: int) -> str:
        """Names a run by all that its numbers depend on."""
        machine = torch.backends.cpu.get_cpu_capability()
        if setting.device == "cuda":
            machine += f" {torch.cuda.get_device_name()}"
        facts = [FORMAT, torch.__version__, machine, self.threads, seed, stream_name(setting.stream)]
        return hashlib.sha256(json.dumps([*facts, setting.to_dict()]).encode()).hexdigest()[:16]

    def get(self, setting: Setting, seed: int) -> Run | None:
        return self._found.get(self.key(setting, seed))

    def add(self, run: Run) -> None:
        key = self.key(run.setting, run.seed)
        self._found[key] = run
        self.commits[key] = self.commit
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "commit": self.commit, "run": run.to_dict()}) + "\n")

    def of(self, setting: Setting, seeds: Iterable[int]) -> list[Run]:
        """The runs of a setting, in the order of the seeds; none where the machine cannot run it.

        Raises:
            KeyError: a run that can be played was not.
        """
        if missing(setting):
            return []
        return [self._found[self.key(setting, seed)] for seed in seeds]

    def wanted(self, settings: Iterable[Setting], seeds: Iterable[int]) -> list[tuple[Setting, int]]:
        """What is still to be played, each once, the longest first so that the last workers end together."""
        pairs = dict.fromkeys(itertools.product(settings, seeds))
        left = [(setting, seed) for setting, seed in pairs if not missing(setting) and not self.get(setting, seed)]
        return sorted(left, key=lambda pair: (-operations(pair[0]), pair[1]))


def operations(setting: Setting) -> float:
    """Floating-point operations of a run."""
    num_categories, num_streams = 17, 3
    names = tuple(map(str, range(num_categories)))
    config = model_config(setting, names, (setting.id_category_size,) * num_categories, num_streams)
    with torch.device("meta"):
        model = EventTransformer(config)
        batch = EventBatch(
            torch.empty(setting.batch_size, num_streams, setting.src_seq_len, num_categories),
            torch.empty(setting.batch_size, setting.tgt_seq_len + 1, num_categories),
            torch.empty(()),
        )
    return float(model.flops(batch)) * setting.grad_accum * setting.num_steps


def forecast_s(wanted: list[tuple[Setting, int]], jobs: int) -> float:
    """Seconds that runs should take on a CPU, `jobs` at a time."""
    rate = GEMM_SHARE * gemm_rate(budget_s=0.1) / max(1, torch.get_num_threads())
    calls = sum(setting.num_steps * setting.grad_accum for setting, _ in wanted)
    return (sum(operations(setting) for setting, _ in wanted) / rate + calls * CALL_S) / jobs


def play(runs: Runs, wanted: list[tuple[Setting, int]], folder: Path, jobs: int, progress: Progress) -> None:
    """Play runs, `jobs` at a time in processes of their own, and add each as it ends.

    Raises:
        KeyboardInterrupt: as it came; runs that had ended are kept.
        RuntimeError: a worker process died.
    """
    for stream in {setting.stream for setting, _ in wanted}:
        open_stream(stream, folder)  # made by this process alone
    task = progress.add_task("runs", total=sum(operations(setting) for setting, _ in wanted))
    if jobs == 1:
        with threads_for_now(runs.threads):
            for setting, seed in wanted:
                runs.add(train(open_stream(setting.stream, folder), setting, seed))
                progress.advance(task, operations(setting))
        return
    workers = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker, initargs=(runs.threads,)
    )
    others = set(multiprocessing.active_children())
    try:
        futures = {workers.submit(played, folder, *pair): pair for pair in wanted}
        for future in as_completed(futures):
            runs.add(future.result())
            progress.advance(task, operations(futures[future][0]))
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died (out of memory?); runs that had ended are kept") from error
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
        for worker in (
            set(multiprocessing.active_children()) - others
        ):  # else the interpreter waits for what they are at
            worker.terminate()


def begin_worker(threads: int) -> None:
    """Readies a worker process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides


def played(folder: Path, setting: Setting, seed: int) -> Run:
    """A run in a worker process."""
    return train(open_stream(setting.stream, folder), setting, seed)


def step_times(settings: dict[str, Setting], folder: Path, rounds: int, threads: int) -> dict[str, float]:
    """Median seconds of a step of each setting that can be run, a step of each in turn."""
    with threads_for_now(threads):
        steppers = {
            name: Stepper(open_stream(setting.stream, folder), setting, 0)
            for name, setting in settings.items()
            if not missing(setting)
        }
        times_s: dict[str, list[float]] = {name: [] for name in steppers}
        for order in itertools.islice(rotations(list(steppers)), rounds + 1):
            for name in order:
                start_s = time.perf_counter()
                steppers[name].step()
                times_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(times[1:]) for name, times in times_s.items()}


@contextmanager
def threads_for_now(threads: int) -> Iterator[None]:
    """torch's threads inside; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
