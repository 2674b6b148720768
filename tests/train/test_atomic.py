"""A file is whole, or what it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from eventkern.train.whole_files import write_file


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
