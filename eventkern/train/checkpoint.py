"""Checkpoints that are whole or absent.

A checkpoint is a file of `torch.save`, which is a zip archive. Its comment (the last bytes of the file) is
``eventkern sha256 <64 hex digits>``, the checksum of every byte before the comment: `torch.load` reads the file
unchanged, and `unzip -z` prints the checksum. It is written to a temporary file, flushed to the disk and renamed, then
the folder is flushed: a crash leaves the previous checkpoints as they were. ``last`` and ``best`` are relative symbolic
links, replaced in one rename.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

CHECKPOINTS = "checkpoints"
FORMAT = 1
COMMENT = b"eventkern sha256 "
COMMENT_BYTES = len(COMMENT) + 64
END_OF_ZIP = b"PK\x05\x06"
END_OF_ZIP_BYTES = 22
BLOCK_BYTES = 1 << 20
MEND_DAMAGE = "copy it again, or give another checkpoint of the run"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; one line that names the file."""


class CheckpointFolder:
    """The checkpoints of one run: ``step-00000123.pt``, and the links ``last`` and ``best``.

    Args:
        path: the folder; made at the first save.
        keep: the number of newest checkpoints that stay, beside the best.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self.keep = keep

    @property
    def last(self) -> Path | None:
        """The checkpoint that was written last, or None."""
        return self._target("last")

    @property
    def best(self) -> Path | None:
        """The checkpoint that was saved as best last, or None."""
        return self._target("best")

    def save(self, state: Mapping[str, Any], step: int, *, is_best: bool) -> Path:
        """Writes one checkpoint, points `last` (and `best`) at it, then removes those no longer kept.

        Raises:
            OSError: no space, no permission: the previous checkpoints are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"step-{step:08d}.pt"
        save_checkpoint({**state, "format": FORMAT}, target)
        for name in ("last", "best") if is_best else ("last",):
            self._point(name, target)
        self._prune()
        return target

    def _target(self, name: str) -> Path | None:
        link = self.path / name
        return self.path / link.readlink() if link.exists() else None

    def _point(self, name: str, target: Path) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(self.path / name)
        flush_folder(self.path)

    def _prune(self) -> None:
        # By time of writing, not by step: a run resumed from an earlier step keeps what it writes now.
        newest_first = sorted(self.path.glob("step-*.pt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        kept = {path.name for path in (self.last, self.best, *newest_first[: self.keep]) if path is not None}
        for file in newest_first:
            if file.name not in kept:
                file.unlink()


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run wrote last, or None."""
    return CheckpointFolder(run_dir / CHECKPOINTS).last


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` (tensors and plain values) to `path`: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w+b") as file:
            torch.save(dict(state), file)
            _append_checksum(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU with `weights_only=True`, after verifying its checksum.

    Raises:
        CheckpointError: missing, truncated, damaged, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint file, or the folder of a run")
    _verify_checksum(path)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state.get('format')}, but this version reads {FORMAT}; "
            "use the version of eventkern that wrote it"
        )
    return state


def load_weights(model: Any, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Loads a plain state_dict into a model, or names the first parameter that differs."""
    own = model.state_dict()
    for name in [*own, *weights]:
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(weights[name].shape) if name in weights else "absent"
        if here != there:
            raise CheckpointError(
                f"{path}: parameter {name!r} is {there} in the checkpoint and {here} in the model; "
                "give the configuration it was trained with"
            )
    model.load_state_dict(weights)


def random_state() -> dict[str, Any]:
    """The states of the generators of python, numpy, torch and every CUDA device, as plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002  # whatever uses the global one must go on too
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes up what `random_state` returned; states of CUDA devices that are not here are left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


def flush_folder(path: Path) -> None:
    """Makes renames inside the folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append_checksum(file: IO[bytes]) -> None:
    """Turns the archive's empty comment into the checksum of all bytes before it."""
    file.seek(-END_OF_ZIP_BYTES, os.SEEK_END)
    record = file.read()
    is_bare = record.startswith(END_OF_ZIP) and record.endswith(b"\0\0")
    assert is_bare, "torch.save no longer ends in a zip record without a comment"
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT_BYTES.to_bytes(2, "little"))
    end = file.tell()
    file.seek(0)
    digest = _digest(file, end)
    file.write(COMMENT + digest)


def _verify_checksum(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - COMMENT_BYTES))
        comment = file.read()
        if not comment.startswith(COMMENT):
            raise CheckpointError(
                f"{path}: truncated, or no checkpoint: {size} bytes do not end in a checksum; {MEND_DAMAGE}"
            )
        file.seek(0)
        if _digest(file, size - COMMENT_BYTES) != comment.removeprefix(COMMENT):
            raise CheckpointError(
                f"{path}: damaged: its bytes do not have the checksum it was written with; {MEND_DAMAGE}"
            )


def _digest(file: IO[bytes], num_bytes: int) -> bytes:
    digest = hashlib.sha256()
    while num_bytes:
        block = file.read(min(BLOCK_BYTES, num_bytes))
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest().encode()
