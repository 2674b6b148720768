"""All files of a call, or none, and no leavings."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import pytest

from eventkern.train.whole_files import remove_leftovers, write_file, write_whole


def test_files_are_flushed_then_renamed_then_their_folder_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        (name,) = [
            path.name for path in (tmp_path, *tmp_path.iterdir()) if path.stat().st_ino == os.fstat(descriptor).st_ino
        ]
        order.append(f"flush {name}")
        real_fsync(descriptor)

    def replace(old: Any, new: Any) -> None:
        order.append(f"rename {os.path.basename(new)}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole({tmp_path / "a": lambda file: file.write(b"1"), tmp_path / "b": lambda file: file.write(b"2")})
    assert order == ["flush .a.tmp", "flush .b.tmp", "rename a", "rename b", f"flush {tmp_path.name}"]
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"1", b"2"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_for_one_changes_none_and_tells_the_sizes(tmp_path: Path, number: int) -> None:
    write_file(tmp_path / "a", "before")

    def full(file: IO[bytes]) -> None:
        file.write(b"x" * 100)
        if file.readable():  # the second call only counts
            raise OSError(number, os.strerror(number))

    with pytest.raises(
        OSError, match=r"/a and .*/b: .*: 106 bytes wanted, [\d,]+ free; earlier files are as they"
    ) as told:
        write_whole({tmp_path / "a": lambda file: file.write(b"after!"), tmp_path / "b": full})
    assert told.value.errno == number
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_any_other_error_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    def stop(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole({tmp_path / "a": stop})
    assert os.listdir(tmp_path) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.tmp", "b.tmp", ".c"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".c", "b.tmp"]
