"""Checkpoints that are whole or absent.

A checkpoint is a file of `torch.save`, which is a zip archive. Its comment (the last bytes of the file) is
``eventkern sha256 <64 hex digits>``, the checksum of every byte before the comment: `torch.load` reads the file
unchanged, and `unzip -z` prints the checksum. It is written to a temporary file, read back, flushed to the disk and
renamed, then the folder is flushed: a crash leaves the previous checkpoints as they were. ``last`` and ``best`` are
relative symbolic links, replaced in one rename; ``best.safetensors`` holds the weights of the best alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from eventkern.disk import flush
from eventkern.train.weights import write_safetensors
from eventkern.train.whole_files import remove_leftovers, write_whole

CHECKPOINTS = "checkpoints"
BEST_WEIGHTS = "best.safetensors"
FORMAT = 1
COMMENT = b"eventkern sha256 "
COMMENT_BYTES = len(COMMENT) + 64
END_OF_ZIP = b"PK\x05\x06"
END_OF_ZIP_BYTES = 22
BLOCK_BYTES = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; one line that names the file."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is missing, truncated or altered; `whole` is the newest beside it that verifies, or None."""

    def __init__(self, message: str, whole: Path | None = None) -> None:
        super().__init__(message)
        self.whole = whole


class CheckpointFolder:
    """The checkpoints of one run: ``step-00000123.pt``, the links ``last`` and ``best``, and ``best.safetensors``.

    Args:
        path: the folder; made at the first save.
        keep: the number of newest checkpoints that stay, beside the best.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self.keep = keep

    @property
    def last(self) -> Path | None:
        """The checkpoint that was written last, or None. It may be gone or damaged: whoever loads it is told."""
        # A run that was killed between its first checkpoint and the link to it has that one alone.
        return self._target("last") or next(iter(_newest_first(self.path)), None)

    @property
    def best(self) -> Path | None:
        """The checkpoint that was saved as best last, or None."""
        return self._target("best")

    def save(self, state: Mapping[str, Any], step: int, *, is_best: bool) -> Path:
        """Writes one checkpoint, points `last` (and `best`) at it, then removes those no longer kept.

        Args:
            state: tensors and plain values; "model" is the state_dict, whose tensors `best.safetensors` holds.
            step: names the file.
            is_best: whether it is the best so far.

        Raises:
            OSError: no space, no permission, bytes that read back other than written: what was there is untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        target = self.path / f"step-{step:08d}.pt"
        state = {**state, "format": FORMAT}
        writers: dict[Path, Any] = {target: lambda file: _write_checkpoint(state, file)}
        if is_best:
            writers[self.path / BEST_WEIGHTS] = lambda file: write_safetensors(state["model"], _told(state), file)
        write_whole(writers)
        # `last` comes last: a run that is killed before it goes on from the one before, and finds this best again.
        for name in ("best", "last") if is_best else ("last",):
            self._point(name, target)
        self._prune()
        return target

    def _target(self, name: str) -> Path | None:
        link = self.path / name
        if link.is_symlink():
            return self.path / link.readlink()
        return link if link.exists() else None  # a copy of the folder that has turned links into files

    def _point(self, name: str, target: Path) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.symlink_to(target.name)
        temporary.replace(self.path / name)
        flush(self.path)

    def _prune(self) -> None:
        newest_first = _newest_first(self.path)
        kept = {path.name for path in (self.last, self.best, *newest_first[: self.keep]) if path is not None}
        for file in newest_first:
            if file.name not in kept:
                file.unlink()


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that a run wrote last, or None."""
    return CheckpointFolder(run_dir / CHECKPOINTS).last


def newest_whole(folder: Path, other_than: Path) -> Path | None:
    """The newest checkpoint of a folder whose checksum holds, one left out; None where there is no other."""
    for file in _newest_first(folder):
        if file.resolve() != other_than.resolve() and _fault(file) is None:
            return file
    return None


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` (tensors and plain values) to `path`: whole, or not at all."""
    write_whole({path: lambda file: _write_checkpoint(state, file)})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU with `weights_only=True`, after verifying its checksum.

    Raises:
        DamagedCheckpointError: missing, truncated or altered; it names the newest checkpoint beside it that verifies.
        CheckpointError: of another format.
    """
    fault = _fault(path)
    if fault is not None:
        whole = newest_whole(path.parent, path)
        mend = f"the newest beside it that verifies is {whole}" if whole else "no other beside it verifies"
        raise DamagedCheckpointError(f"{path}: {fault}; {mend}", whole)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is whole, but holds more than tensors and plain values; give a checkpoint that eventkern wrote"
        ) from error
    except Exception as error:  # what torch raises depends on where in the file it stumbles
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"{path}: its checksum holds, but torch cannot read it ({told}); give a checkpoint that eventkern wrote"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; give a checkpoint that eventkern wrote")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state.get('format')}, but this version reads {FORMAT}; "
            "use the version of eventkern that wrote it"
        )
    return state


def load_weights(model: Any, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Loads a plain state_dict into a model, or names the first parameter that differs."""
    own = model.state_dict()
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path}: its weights are a {type(weights).__name__}; give one that eventkern wrote")
    for name in [*own, *weights]:
        here, there = _shape_of(own, name), _shape_of(weights, name)
        if here != there:
            raise CheckpointError(
                f"{path}: parameter {name!r} is {there} in the checkpoint and {here} in the model; "
                "give the configuration it was trained with"
            )
    model.load_state_dict(weights)


def _shape_of(weights: Mapping[str, Any], name: str) -> tuple[int, ...] | str:
    if name not in weights:
        return "absent"
    value = weights[name]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


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


class _ChecksummedZip:
    """Passes a zip archive on to a file, and ends it in a comment: the checksum of all bytes before that.

    The bytes are hashed as they are written, so that a file that differs from them does not verify.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held_back = b""  # the end record, which tells the length of the comment
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        if len(data) >= END_OF_ZIP_BYTES:
            self._put(self._held_back)
            self._put(memoryview(data)[:-END_OF_ZIP_BYTES])
            self._held_back = bytes(data[-END_OF_ZIP_BYTES:])
        else:
            joined = self._held_back + bytes(data)
            self._put(joined[:-END_OF_ZIP_BYTES])
            self._held_back = joined[-END_OF_ZIP_BYTES:]
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Writes the end record with its comment."""
        is_bare = self._held_back.startswith(END_OF_ZIP) and self._held_back.endswith(b"\0\0")
        assert is_bare, "torch.save no longer ends in a zip record without a comment"
        self._put(self._held_back[:-2] + COMMENT_BYTES.to_bytes(2, "little"))
        self._file.write(COMMENT + self._digest.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error  # torch turns it into a RuntimeError that does not tell it
            raise


def _write_checkpoint(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Writes a checkpoint to an open file and reads it back, since older ones are pruned in trust of it."""
    archive: Any = _ChecksummedZip(file)
    try:
        torch.save(dict(state), archive)
    except RuntimeError:
        if archive.error is not None:
            raise archive.error from None
        raise
    archive.finish()
    file.flush()
    if file.readable() and _fault_of(file) is not None:
        raise OSError(errno.EIO, f"{file.name}: read back, its bytes are not those written; see to the disk or memory")


def _fault(path: Path) -> str | None:
    """What is wrong with the file of a checkpoint, or None."""
    if not path.is_file():
        return "no such checkpoint"
    with path.open("rb") as file:
        return _fault_of(file)


def _fault_of(file: IO[bytes]) -> str | None:
    size = file.seek(0, 2)
    file.seek(max(0, size - COMMENT_BYTES))
    comment = file.read()
    if not comment.startswith(COMMENT) or len(comment) != COMMENT_BYTES:
        return f"truncated, or no checkpoint: {size} bytes do not end in a checksum"
    file.seek(0)
    digest, left = hashlib.sha256(), size - COMMENT_BYTES
    while block := file.read(min(BLOCK_BYTES, left)):
        digest.update(block)
        left -= len(block)
    is_whole = digest.hexdigest().encode() == comment.removeprefix(COMMENT)
    return None if is_whole else "damaged: its bytes do not have the checksum it was written with"


def _newest_first(folder: Path) -> list[Path]:
    """By time of writing, not by step: a run resumed from an earlier step keeps what it writes now."""
    return sorted(folder.glob("step-*.pt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _told(state: Mapping[str, Any]) -> dict[str, str]:
    """What best.safetensors tells of its weights: "pt" as other programs expect it, the rest as JSON."""
    told = {key: state[key] for key in ("step", "best_loss", "config", "metadata") if key in state}
    return {"format": "pt"} | {key: json.dumps(value, default=str) for key, value in told.items()}
