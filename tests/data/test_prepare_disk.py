"""A disk that is full at any moment of a prepare leaves nothing half-made, and is named with what was wanted."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from eventkern.cli import main
from eventkern.data import prepare as preparing
from eventkern.data.prepare import prepare
from eventkern.data.schema import Schema
from eventkern.data.store import EventStore

FULL = r"store: No space left on device: ([\d,]+) bytes wanted, ([\d,]+) free; nothing was written; make room, or give"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB in memory, in place of the one before."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        while mounted:
            subprocess.run(["umount", mounted.pop()], check=True)
        options = ["-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", disk]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def table(tmp_path: Path, write_csv: Callable[..., Path]) -> Path:
    """20,000 rows out of order, whose columns take 560 KB and whose store takes 640 KB."""
    minutes = np.random.default_rng(0).permutation(20_000)
    return write_csv(
        tmp_path,
        *(f"2024-01-{1 + m // 1440:02}T{m // 60 % 24:02}:{m % 60:02},k{m % 90},0,{m},2000-01-01" for m in minutes),
    )


def test_a_full_disk_is_told_and_nothing_is_left(
    table: Path, schema: Schema, small_disk: Callable[[int], Path], left_in: Callable[[Path], list[str]]
) -> None:
    refused: list[int] = []
    for size_kib in range(64, 4096, 128):
        disk = small_disk(size_kib)
        if refused and size_kib * 1024 > refused[-1] + 32 * 1024:  # as much as was wanted, and the pages' ends
            break
        with pytest.raises(OSError, match=FULL) as caught:
            prepare(table, schema, disk / "deep" / "store", progress=False)
        wanted, free = (int(number.replace(",", "")) for number in re.findall(FULL, str(caught.value))[0])
        assert wanted > free
        assert free == size_kib * 1024  # measured once all is removed
        assert left_in(disk) == []
        refused.append(wanted)
    prepare(table, schema, disk / "deep" / "store", progress=False)
    EventStore.open(disk / "deep" / "store", verify=True)
    assert len(refused) > 5, "it fills up while columns are spilled and while rows are written"
    assert refused[0] == pytest.approx(refused[-1], rel=0.15), "foreseen from the first rows"


def test_a_full_disk_keeps_the_store_before(
    table: Path, schema: Schema, small_disk: Callable[[int], Path], run: Callable[..., EventStore], tmp_path: Path
) -> None:
    disk = small_disk(1024)
    small = tmp_path / "small.csv"
    small.write_text("".join(table.read_text().splitlines(keepends=True)[:900]))
    prepare(small, schema, disk / "store", progress=False)
    before = (disk / "store" / "store.json").read_bytes()
    with pytest.raises(OSError, match=FULL):
        prepare(table, schema, disk / "store", progress=False, overwrite=True)
    assert (disk / "store" / "store.json").read_bytes() == before
    assert [path.name for path in disk.iterdir()] == ["store"]


def test_the_command_tells_it_in_one_line(
    small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str], left_in: Callable[[Path], list[str]]
) -> None:
    disk = small_disk(2048)  # too small for the table that synthetic is made of
    assert main(["prepare", "synthetic", "--out", str(disk / "store")]) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(r"eventkern: \[Errno 28\] .*/disk/store: No space left on device: .* on another disk\n", told)
    assert left_in(disk) == []


def test_other_errors_of_the_system_pass_unchanged(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(preparing, "flush", fail)
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error"):
        prepare(write_csv(tmp_path, "2024-01-01T09:00,a,0,1,", "2024-01-01T13:00,a,0,1,"), schema, tmp_path / "store")
