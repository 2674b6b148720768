"""Where a training step's time goes, by phase, by operator, and by operator within each phase.

    python -m profiling.trace --config cpu_baseline.json --steps 5 --out DIR

writes a Chrome trace (open it at https://ui.perfetto.dev) and the tables, and prints these; on a GPU also the launches
of a step and how much of it the GPU was busy, from steps that wait for nothing. With `--store` the events come from a
prepared store through the loader, else they are drawn at random. A phase is an NVTX range and a recorded range of one
name: `data`, `forward`, `backward`, `optimizer`. With `--nvtx` nothing is recorded: the steps run inside a capture
range, for Nsight Systems (profiling/nsys.sh).
"""

import argparse
import contextlib
import itertools
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import nvtx
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.training import NameRange, Shapes, TrainingStep, config_name, endless, random_batch
from eventkern.data.loader import EventLoader
from eventkern.data.shipped import open_store
from eventkern.hardware import synchronize
from eventkern.models import EventTransformer
from eventkern.models.event_transformer import EventBatchLike
from eventkern.train.termination import ending_quietly

PHASES = ("data", "forward", "backward", "optimizer")
NUM_WARM_UP_STEPS = 3
DOMAIN = "eventkern"
"""Of NVTX ranges, as the trainer has it."""
NUM_OPERATORS = 8
"""Of each phase, in the table."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="profile a few training steps")
    names = "a TOML or JSON file, or a name in eventkern/configs"
    parser.add_argument("--config", type=config_name, default="cpu_baseline", help=names)
    stores = "a prepared store, flights or synthetic; without it, random events of 17 categories of id_category_size"
    parser.add_argument("--store", help=stores)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", choices=("off", "on", "reduce-overhead"), default="off", help="torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/trace"), help="folder for the trace and the tables")
    parser.add_argument("--nvtx", action="store_true", help="NVTX ranges and a capture range, for Nsight Systems")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    shapes = Shapes.load(options.config)
    batches = random_batches(shapes, device)
    if options.store:
        shapes, batches = from_store(options.store, shapes, device)
    torch.manual_seed(0)
    model = EventTransformer(shapes.model).to(device)
    if options.compile != "off":
        model.compile(fullgraph=True, mode=None if options.compile == "on" else options.compile)
    autocast = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    name_range: NameRange = partial(phase, device, waits=not options.nvtx)
    step = TrainingStep(model, autocast, name_range=name_range)

    run_steps(step, batches, NUM_WARM_UP_STEPS)
    if options.nvtx:
        # A backward in a thread of its own would launch its kernels outside of the caller's range.
        with capture_range(device), torch.autograd.set_multithreading_enabled(False):
            run_steps(step, batches, options.steps)
        return
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(acc_events=True, activities=kinds, record_shapes=True) as profiler:
        run_steps(step, batches, options.steps)
        synchronize(device)
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "trace.json.gz"))
    tables = {
        "phases": phase_table(profiler, options.steps),
        "operators": operator_table(profiler, device),
        "operators_by_phase": operators_by_phase_table(profiler, device, options.steps),
    }
    if device.type == "cuda":
        unwaiting = TrainingStep(model, autocast)
        run_steps(unwaiting, batches, NUM_WARM_UP_STEPS)
        with profile(acc_events=True, activities=kinds) as profiler:
            run_steps(unwaiting, batches, options.steps)
            synchronize(device)
        tables["utilization"] = utilization_table(profiler, options.steps)
    for name, table in tables.items():
        (options.out / f"{name}.txt").write_text(table + "\n")
        print(table)
    print(f"wrote {options.out}/trace.json.gz, {', '.join(f'{name}.txt' for name in tables)}")


def random_batches(shapes: Shapes, device: torch.device) -> Iterator[EventBatchLike]:
    """Random batches without end."""
    return (random_batch(shapes, device, seed=seed) for seed in itertools.count())


def from_store(name: str, shapes: Shapes, device: torch.device) -> tuple[Shapes, Iterator[EventBatchLike]]:
    """The configuration with a store's categories, and the store's training batches without end."""
    store = open_store(name)
    id_category_size = shapes.model.category_sizes[0]
    model = replace(
        shapes.model,
        category_names=store.schema.category_names,
        category_sizes=store.sizes(id_category_size),
        num_streams=len(store.schema.streams),
    )
    loader = EventLoader(
        store,
        "train",
        src_seq_len=model.src_seq_len,
        tgt_seq_len=model.tgt_seq_len,
        id_category_size=id_category_size,
        batch_size=shapes.batch_size,
        device=device,
    )
    return replace(shapes, model=model), endless(loader)


def run_steps(step: TrainingStep, batches: Iterator[EventBatchLike], num_steps: int) -> None:
    """Training steps, the drawing of each batch in a range of its own."""
    for _ in range(num_steps):
        with step.name_range("data"):
            batch = next(batches)
        step(batch)


@contextmanager
def phase(device: torch.device, name: str, *, waits: bool) -> Iterator[None]:
    """An NVTX range and a recorded range; one that waits for the device at its end holds its own kernels' time."""
    with nvtx.annotate(name, domain=DOMAIN), torch.profiler.record_function(name):
        yield
        if waits:
            synchronize(device)


@contextmanager
def capture_range(device: torch.device) -> Iterator[None]:
    """What Nsight Systems records when it is started with --capture-range=cudaProfilerApi."""
    with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext():
        yield
        synchronize(device)


def phase_table(profiler: profile, num_steps: int) -> str:
    """Milliseconds a step and share of each phase."""
    wall_ms = {
        event.key: event.cpu_time_total / 1e3 / num_steps for event in profiler.key_averages() if event.key in PHASES
    }
    total_ms = sum(wall_ms.values())
    lines = [f"{name:<10} {wall_ms[name]:10.3f} ms {100 * wall_ms[name] / total_ms:6.1f} %" for name in PHASES]
    return "\n".join([*lines, f"{'step':<10} {total_ms:10.3f} ms"])


def utilization_table(profiler: profile, num_steps: int) -> str:
    """Launches and kernels of a step, and the share of the time from the first to the last that the GPU was busy."""
    events = profiler.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    launches = sum(event.name in LAUNCHES for event in events)
    busy_us, span_us = busy([(event.time_range.start, event.time_range.end) for event in on_device])
    lines = (
        f"{'launches':<10} {launches / num_steps:10.1f} a step",
        f"{'kernels':<10} {len(on_device) / num_steps:10.1f} a step",
        f"{'busy':<10} {busy_us / 1e3 / num_steps:10.3f} ms {100 * busy_us / max(span_us, 1e-9):6.1f} %",
    )
    return "\n".join(lines)


def busy(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """The time that (start, end) intervals cover, counted once where they overlap, and that from first to last."""
    covered, first, reached = 0.0, min((start for start, _ in intervals), default=0.0), -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered, max(0.0, reached - first)


def operators_by_phase_table(profiler: profile, device: torch.device, num_steps: int) -> str:
    """The operators of each phase by their own time on the device: milliseconds and calls a step, share of the phase.

    An operator is of the phase in whose time it began, on whichever thread.
    """
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
    phases = sorted(
        (event.time_range.start, event.time_range.end, event.name) for event in events if event.name in PHASES
    )
    times_us: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        place = bisect_right(phases, (event.time_range.start, math.inf, "")) - 1
        if event.name in PHASES or place < 0 or event.time_range.start > phases[place][1]:
            continue
        name = phases[place][2]
        is_on_cpu = device.type != "cuda"
        times_us[name][event.name] += event.self_cpu_time_total if is_on_cpu else event.self_device_time_total
        calls[name, event.name] += 1
    lines = [f"{'phase':<10} {'operator':<48} {'ms':>10} {'calls':>8} {'%':>6}"]
    for name in PHASES:
        total_us = max(sum(times_us[name].values()), 1e-9)
        for operator, time_us in times_us[name].most_common(NUM_OPERATORS):
            num_calls = calls[name, operator] / num_steps
            share = 100 * time_us / total_us
            milliseconds = time_us / 1e3 / num_steps
            lines.append(f"{name:<10} {operator[:48]:<48} {milliseconds:10.3f} {num_calls:8.1f} {share:6.1f}")
    return "\n".join(lines)


def operator_table(profiler: profile, device: torch.device) -> str:
    """The operators by their own time on the device."""
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=48))


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
