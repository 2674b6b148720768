"""Whatever comes in, out comes a named error or a right result: seeded cases of hostile input, for a number of seconds.

    python tests/fuzz --seconds 60 --seed 7       # cases of every subject in turn; a fault is shown with its case
    python tests/fuzz --seed 7 --case 1234        # that case alone, in this process
    python tests/fuzz --seconds 60 --only stores  # one subject

A case is a pure function of (seed, number). Cases run in a child process, so that one that crashes or hangs is told as
any other is; the status is 1 where there was a fault.
"""

import argparse
import importlib
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

CASES_A_CHILD = 2_000  # then a new one: what a case leaks does not add up
SECONDS_A_CASE = 60  # the slowest takes one, on a busy machine under a sanitizer a few
LEAST_ROUNDS = 3  # of all subjects, however short the time
MOST_FAULTS = 10

SUBJECTS = ("entries", "ops", "stores", "schemas", "checkpoints", "configs")


def run_case(subject: str, seed: int, case: int, folder: Path) -> str:
    """Run a case, which raises what is at fault; the word for how it ended otherwise."""
    place = folder / subject
    place.mkdir(exist_ok=True)
    return importlib.import_module(subject).run(random.Random(f"{seed}/{case}"), place)


def work(subjects: list[str], seed: int, first: int, folder: Path) -> None:
    """The child: tells the number of each case before it runs, and how it ended after."""
    for subject in subjects:
        importlib.import_module(subject)
    for case in range(first, first + CASES_A_CHILD):
        subject = subjects[case % len(subjects)]
        print("case", case, flush=True)
        try:
            print("end", run_case(subject, seed, case, folder), flush=True)
        except Exception as error:
            traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print("fault", f"{type(error).__name__} in {Path(frame.filename).name}, {frame.name}", flush=True)


class Child:
    """A child process and the lines that it tells."""

    def __init__(self, arguments: list[str], errors: Path) -> None:
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=file, text=True
            )
        self._errors = errors.open(errors="replace")
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def said(self) -> str:
        """What it wrote of its errors since it was last asked."""
        return self._errors.read()[-6_000:]

    def end(self) -> int:
        self.process.kill()
        status = self.process.wait()
        self._errors.close()
        return status


def run_for(seconds: float, subjects: list[str], seed: int) -> int:
    """Cases in turn until the time is over; the number of faults."""
    ends: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    case, started, deadline = 0, 0.0, 0.0
    only = "".join(f" --only {subject}" for subject in subjects) if len(subjects) < len(SUBJECTS) else ""

    def tell(fault: str, said: str) -> None:
        faults[fault] += 1
        if faults[fault] == 1:  # the others of the kind are counted
            print(f"FAULT in case {case}, {subjects[case % len(subjects)]}: {fault}", file=sys.stderr)
            print(f"again: python tests/fuzz --seed {seed} --case {case}{only}\n{said}", file=sys.stderr, flush=True)

    def is_over() -> bool:
        return (case >= LEAST_ROUNDS * len(subjects) and time.monotonic() >= deadline) or len(faults) >= MOST_FAULTS

    with tempfile.TemporaryDirectory(prefix="eventkern-fuzz-") as folder:
        arguments = [str(Path(__file__).parent), "--seed", str(seed), "--folder", folder, *only.split()]
        while not is_over():
            child = Child([*arguments, "--work", str(case)], Path(folder) / "errors")
            is_within = False  # a case
            while is_within or not is_over():
                try:
                    line = child.lines.get(timeout=SECONDS_A_CASE)
                except queue.Empty:
                    tell(f"no end within {SECONDS_A_CASE} seconds", child.said())
                    case += 1
                    break
                if line is None:
                    status = child.process.wait()
                    if is_within or status != 0:
                        tell(f"the process ended with status {status}", child.said())
                        case += 1
                    break
                word, _, rest = line.partition(" ")
                is_within = word == "case"
                if is_within:
                    case = int(rest)
                    if not started:  # what was imported before does not count
                        started = time.monotonic()
                        deadline = started + seconds
                    continue
                if word == "fault":
                    tell(rest, child.said())
                else:
                    ends[rest] += 1
                case += 1
            child.end()
    for counts, what in ((ends, ""), (faults, "FAULT ")):
        for end, count in sorted(counts.items()):
            print(f"{count:8,} {what}{end}")
    print(f"seed {seed}: {case:,} cases in {time.monotonic() - started:.0f} s, {faults.total()} faults")
    return faults.total()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="a subject; may be given again")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)  # the child's first case
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    subjects = [subject for subject in SUBJECTS if not options.only or subject in options.only]
    if options.work is not None:
        work(subjects, options.seed, options.work, options.folder)
        return 0
    if options.case is not None:
        with tempfile.TemporaryDirectory(prefix="eventkern-fuzz-") as folder:
            print(run_case(subjects[options.case % len(subjects)], options.seed, options.case, Path(folder)))
        return 0
    return int(run_for(options.seconds, subjects, options.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
