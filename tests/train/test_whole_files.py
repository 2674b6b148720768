"""All files of a call, or none, and no leavings."""

from __future__ import annotations

import errno
import os
import stat
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


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    write_file(path, "né\n")
    assert path.read_bytes() == b"n\xc3\xa9\n"
    write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text("old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "new and longer")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.json"]


def test_the_rename_comes_after_the_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    order: list[str] = []
    flush, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        told = os.fstat(descriptor)
        order.append("flush the folder" if stat.S_ISDIR(told.st_mode) else f"flush {told.st_size} bytes")
        flush(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        order.append(f"rename to {new.name}")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_file(path, "seed = 1\n")
    assert order == ["flush 9 bytes", "rename to config.toml", "flush the folder"]
