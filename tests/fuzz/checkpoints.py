"""Checkpoints: a file whose bytes are not those written is refused in one line, with its checksum made anew too."""

import functools
import hashlib
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import hostile
import torch

from eventkern.train.checkpoint import (
    COMMENT,
    COMMENT_BYTES,
    FORMAT,
    CheckpointError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)


@functools.cache
def whole(folder: Path) -> bytes:
    model = torch.nn.Linear(3, 4)
    save_checkpoint(
        {"format": FORMAT, "model": model.state_dict(), "step": 7, "config": {"lr": 0.1}}, folder / "whole.pt"
    )
    return (folder / "whole.pt").read_bytes()


def run(random: Random, folder: Path) -> str:
    written, file = whole(folder), folder / "step-00000007.pt"
    body = written[:-COMMENT_BYTES]
    kind = random.randrange(4)
    if kind == 0:
        content = hostile.flipped(random, written)
    elif kind == 1:
        content = summed(hostile.flipped(random, body))
    elif kind == 2:
        content = summed(changed_member(random, folder, written))
    else:
        torch.save(random.choice((3, [1], {"format": 99}, {"format": FORMAT}, torch.ones(2), {})), folder / "other.pt")
        other = (folder / "other.pt").read_bytes()
        content = summed(other[:-2] + COMMENT_BYTES.to_bytes(2, "little"))
    file.write_bytes(content)
    state = hostile.outcome(lambda: load_checkpoint(file), (CheckpointError,))
    if isinstance(state, Exception):
        assert str(state).startswith(f"{file}: "), state
        assert "\n" not in str(state), state
        return f"checkpoints: {hostile.told(state)}"
    if content == written:
        assert state["step"] == 7
    if "model" not in state:
        return "checkpoints: right"
    used = hostile.outcome(lambda: load_weights(torch.nn.Linear(3, 4), state["model"], file), (CheckpointError,))
    return f"checkpoints: weights {hostile.told(used)}"


def summed(body: bytes) -> bytes:
    """The bytes of an archive with the comment that fits them."""
    return body + COMMENT + hashlib.sha256(body).hexdigest().encode()


def changed_member(random: Random, folder: Path, written: bytes) -> bytes:
    """The archive with one of its members flipped, or its pickle another, and the sums of the archive right."""
    source, target = folder / "source.zip", folder / "target.zip"
    source.write_bytes(written)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                content = other_member(random, name, content)
            new.writestr(name, content)
    return target.read_bytes()[:-2] + COMMENT_BYTES.to_bytes(2, "little")


def other_member(random: Random, name: str, content: bytes) -> bytes:
    if name.endswith(".pkl") and random.random() < 0.5:
        state: dict[Any, Any] = {"format": FORMAT, "model": hostile.value(random), "step": hostile.value(random)}
        return pickle.dumps(random.choice((state, [], None, FORMAT)), protocol=2)
    return hostile.flipped(random, content)
