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
import io
import json
import os
import pickle
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from eventkern.disk import flush
from eventkern.train.weights import unwritable, write_safetensors
from eventkern.train.whole_files import num_bytes, remove_leftovers, write_whole

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
        self._is_proven = False

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

        Its checksum is read back, and of the first one all of it, with `weights_only=True`. `best.safetensors` is
        left out where safetensors cannot hold the weights, as `rehearse` tells.

        Args:
            state: tensors and plain values; "model" is the state_dict, whose tensors `best.safetensors` holds.
            step: names the file.
            is_best: whether it is the best so far.

        Raises:
            OSError: no space, no permission, bytes that read back other than written: what was there is untouched.
            CheckpointError: a value that could be written and not be read: what was there is untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        target = self.path / f"step-{step:08d}.pt"
        write_whole(self._writers(target, state, is_best))
        self._is_proven = True
        if is_best and unwritable(state["model"]):
            (self.path / BEST_WEIGHTS).unlink(missing_ok=True)  # of an older best
        # `last` comes last: a run that is killed before it goes on from the one before, and finds this best again.
        for name in ("best", "last") if is_best else ("last",):
            self._point(name, target)
        self._prune()
        return target

    def rehearse(self, state: Mapping[str, Any], more_bytes: int = 0) -> list[str]:
        """Does all that the first save of a run will do but for keeping anything, while there is nothing to lose yet.

        Args:
            state: as for `save`.
            more_bytes: what a later checkpoint will hold beside it.

        Returns:
            What is worth knowing beforehand, in a line each: a best.safetensors that is left out, or space that will do
            for the first checkpoint and not for all that are kept.

        Raises:
            CheckpointError: a value that cannot be saved, or not be loaded with `weights_only=True`; it is named.
            OSError: less space than the first checkpoint takes.
        """
        if fault := _unloadable(state, "state"):
            mend = "give tensors and plain values there, or leave it out of the state_dict"
            raise CheckpointError(f"{self.path}: no checkpoint of this run could be loaded: {fault}; {mend}")
        writers = self._writers(self.path / "step-00000000.pt", state, True)
        wanted = num_bytes(writers.values()) + more_bytes
        folder = next(parent for parent in (self.path, *self.path.parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        sizes = f"{wanted:,} bytes wanted for a checkpoint, {free:,} free"
        if free < wanted:
            raise OSError(errno.ENOSPC, f"{self.path}: {os.strerror(errno.ENOSPC)}: {sizes}; nothing was trained yet")
        remarks = []
        if fault := unwritable(state["model"]):
            remarks.append(f"{BEST_WEIGHTS} is left out: {fault}")
        if (most := self.keep + 2) * wanted > free + sum(file.stat().st_size for file in _newest_first(self.path)):
            remarks.append(f"space is short: up to {most} checkpoints lie in {self.path} at once, and {sizes} now")
        return remarks

    def _writers(
        self, target: Path, state: Mapping[str, Any], is_best: bool
    ) -> dict[Path, Callable[[IO[bytes]], None]]:
        state = {**state, "format": FORMAT}
        is_read = not self._is_proven
        writers: dict[Path, Callable[[IO[bytes]], None]] = {
            target: lambda file: _write_checkpoint(state, file, is_read)
        }
        if is_best and not unwritable(state["model"]):
            told = _told(state)
            writers[self.path / BEST_WEIGHTS] = lambda file: write_safetensors(state["model"], told, file)
        return writers

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


def load_weights(model: Any, weights: Mapping[str, Any], path: Path) -> None:
    """Loads a plain state_dict into a model, or names the first parameter, buffer or extra state that differs."""
    refuse_other_weights(model.state_dict(), weights, path)
    try:
        model.load_state_dict(weights)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # of torch, or of a set_extra_state
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: the model does not take its weights: {reason}; give the configuration it was trained with"
        ) from error


def refuse_other_weights(own: Mapping[str, Any], weights: Any, path: Path) -> None:
    """Raises a CheckpointError unless two state_dicts have the same names and shapes."""
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path}: its weights are a {type(weights).__name__}; give one that eventkern wrote")
    for name in [*own, *weights]:
        here, there = (_shown(state, name) for state in (own, weights))
        if here != there:
            what = "parameter" if "(" in here + there else "extra state"
            raise CheckpointError(
                f"{path}: {what} {name!r} is {there} in the checkpoint and {here} in the model; "
                "give the configuration it was trained with"
            )


def _shown(weights: Mapping[str, Any], name: str) -> str:
    if name not in weights:
        return "absent"
    value = weights[name]
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    return "there" if name.endswith("_extra_state") else "no tensor"


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


def _write_checkpoint(state: Mapping[str, Any], file: IO[bytes], is_read: bool = False) -> None:
    """Writes a checkpoint to an open file and reads it back, since older ones are pruned in trust of it.

    What is read back are its bytes, for their checksum, and where `is_read` what they mean too.
    """
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
    if file.readable() and is_read:
        try:
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            fault = _unloadable(state, "state") or " ".join(str(error).split())
            raise CheckpointError(f"{file.name}: read back, it does not load: {fault}") from error


def _unloadable(value: Any, name: str) -> str | None:
    """The innermost part of a state that cannot be saved and loaded with `weights_only=True`, and why; or None."""
    file = io.BytesIO()
    try:
        torch.save(_without_numbers(value), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # whatever a value's own pickling raises
        parts = (
            value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in (list, tuple) else ()
        )
        inner = (_unloadable(part, f"{name}[{key!r}]") for key, part in parts)
        reason = " ".join(str(error).split())[:200]
        kind = value.dtype if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
        return next(filter(None, inner), f"{name} is of {kind} ({reason})")
    return None


def _without_numbers(value: Any) -> Any:
    """A state of the same types with no element in its tensors: what a load makes of it takes no time to see."""
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        is_plain = value.layout == torch.strided and not value.is_quantized
        return torch.empty(0, dtype=value.dtype) if is_plain else value
    if type(value) is dict:
        return {key: _without_numbers(part) for key, part in value.items()}
    if type(value) is OrderedDict:  # a state_dict, which bears the modules' versions as an attribute
        bare = OrderedDict((key, _without_numbers(part)) for key, part in value.items())
        vars(bare).update(vars(value))
        return bare
    if type(value) in (list, tuple):
        return type(value)(_without_numbers(part) for part in value)
    return value


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
