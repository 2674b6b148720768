"""Do generated events look like the data? Each category's distribution among them, held against the true one.

    python -m benchmarks.studies.generated_marginals RUN [--store flights] [--most 60]

From the last training event of each key on, the model generates as many events as the key has in the validation period
(at most `--most`), at temperature 1 and from all classes, with nothing known of that period. For each category the
total variation distance (half the sum of |p - q| over the classes) is taken between the distribution of the true
classes of these events and

    generated    that of the generated events;
    training     that of the training period: what is known without a model;
    resampled    that of as many events drawn from the true ones (with replacement, a mean of 10): what chance alone
                 puts between two samples of this size and one distribution.

The category of the key is given and not generated, so that its distance is what the store tells of unknown keys.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eventkern.cli.commands import OpenedRun, open_run
from eventkern.cli.generating import generate_events
from eventkern.data import EventStore
from eventkern.train.termination import ending_quietly

RESAMPLES = 10


@dataclass(frozen=True)
class Distances:
    """Total variation distances of one category from its true distribution."""

    name: str
    classes: int
    num_events: int
    generated: float
    training: float
    resampled: float


def total_variation(counts: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Half the sum of the differences of two distributions, given as counts."""
    return float(np.abs(counts / counts.sum() - others / others.sum()).sum() / 2)


def events_of(store: EventStore, rows: NDArray[np.int64], id_category_size: int) -> NDArray[np.int64]:
    """(M, C) classes of rows as the model reads them."""
    codes = store.codes[rows].astype(np.int64)
    return np.where(codes < np.array(store.sizes(id_category_size)), codes, 1)


def generated_and_true(
    run: OpenedRun, *, most: int, seed: int, batch_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(M, C) generated events, and the true ones in whose place they stand."""
    store = run.store
    index = store.index(store.schema.key)
    ends = store.limits("train")
    numbers = np.minimum(index.offsets[1:] - ends, most)
    keys = np.flatnonzero((ends > index.offsets[:-1]) & (numbers > 0))
    keys = keys[np.argsort(-numbers[keys], kind="stable")]  # keys of a batch have about as many events
    generated, true = [], []
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        seeds = [seed * len(ends) + int(key) for key in batch]
        made = generate_events(run, ends[batch] - 1, int(numbers[batch[0]]), seeds=seeds, batch_size=batch_size)
        for events, key in zip(made, batch, strict=True):
            generated.append(events[: numbers[key]].astype(np.int64))
            true.append(index.rows[ends[key] : ends[key] + numbers[key]])
    return np.concatenate(generated), events_of(store, np.concatenate(true), run.config.id_category_size)


def distances(run: OpenedRun, *, most: int = 60, seed: int = 0, batch_size: int = 64) -> list[Distances]:
    """Of every category, between events that `run` generates and the true ones; see the module."""
    generated, true = generated_and_true(run, most=most, seed=seed, batch_size=batch_size)
    training = events_of(run.store, np.arange(run.store.split_row), run.config.id_category_size)
    random = np.random.default_rng(seed)
    found = []
    sizes = run.store.sizes(run.config.id_category_size)
    for column, (name, size) in enumerate(zip(run.store.schema.category_names, sizes, strict=True)):
        counts = np.bincount(true[:, column], minlength=size)
        resamples = random.multinomial(len(true), counts / counts.sum(), RESAMPLES)
        found.append(
            Distances(
                name,
                size,
                len(true),
                total_variation(np.bincount(generated[:, column], minlength=size), counts),
                total_variation(np.bincount(training[:, column], minlength=size), counts),
                float(np.mean([total_variation(resample, counts) for resample in resamples])),
            )
        )
    return found


def table(found: list[Distances]) -> str:
    """The distances as Markdown."""
    lines = [
        f"{found[0].num_events:,} events",
        "",
        "| category | classes | generated | training | resampled |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name} | {each.classes} | {each.generated:.3f} | {each.training:.3f} | {each.resampled:.3f} |"
        for each in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the table of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a checkpoint, or a run folder (its best checkpoint)")
    parser.add_argument("--store", help="default: the store it was trained on")
    parser.add_argument("--most", type=int, default=60, help="events of a key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    run = open_run(arguments.run, arguments.store, "auto")
    options = {"most": arguments.most, "seed": arguments.seed, "batch_size": arguments.batch_size}
    print(table(distances(run, **options)))


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
