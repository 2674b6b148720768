"""Checkpoints are whole or absent, and say what is wrong with them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from eventkern.train import CheckpointError, TrainerConfig
from eventkern.train.checkpoint import (
    COMMENT,
    COMMENT_BYTES,
    CheckpointFolder,
    DamagedCheckpointError,
    last_checkpoint,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)


def state_of(value: float) -> dict[str, Any]:
    return {
        "format": 1,
        "model": {"weight": torch.full((50, 40), value)},
        "step": 3,
        "loader": {"seed": 2**63, "w": None},
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000003.pt"
    save_checkpoint(state_of(1.0), path)
    return path


def test_what_is_saved_is_loaded_and_torch_reads_it_alone(saved: Path) -> None:
    ours, torchs = load_checkpoint(saved), torch.load(saved, weights_only=True)
    for state in (ours, torchs, torch.load(saved, weights_only=True, mmap=True)):
        assert torch.equal(state["model"]["weight"], torch.ones(50, 40))
        assert state["loader"] == {"seed": 2**63, "w": None}
    with zipfile.ZipFile(saved) as archive:
        assert archive.comment.startswith(b"eventkern sha256 ")
        assert archive.testzip() is None


def test_every_truncation_is_named(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (0, 1, 21, COMMENT_BYTES, len(content) // 2, len(content) - COMMENT_BYTES, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(
            DamagedCheckpointError, match=rf"step-00000003\.pt: truncated, or no checkpoint: {length} bytes.*no other"
        ):
            load_checkpoint(saved)


def test_a_flipped_bit_anywhere_is_named(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    for place in (0, 100, len(content) // 2, len(content) - COMMENT_BYTES - 1, len(content) - 1):
        content[place] ^= 1
        saved.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step-00000003\.pt: damaged.*; no other beside it verifies"):
            load_checkpoint(saved)
        content[place] ^= 1
    saved.write_bytes(content)
    load_checkpoint(saved)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such checkpoint; no other beside it verifies"):
        load_checkpoint(tmp_path / "gone.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt: truncated, or no checkpoint"):
        load_checkpoint(tmp_path / "foreign.pt")
    save_checkpoint({"format": 99}, tmp_path / "later.pt")
    with pytest.raises(
        CheckpointError, match=r"later\.pt: checkpoint format 99, but this version reads 1; use the version"
    ):
        load_checkpoint(tmp_path / "later.pt")


def sealed(body: bytes) -> bytes:
    """An archive that ends in the comment that fits it."""
    body = body[:-2] + COMMENT_BYTES.to_bytes(2, "little")
    return body + COMMENT + hashlib.sha256(body).hexdigest().encode()


def test_what_has_a_checksum_and_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "step-00000001.pt"
    torch.save(torch.ones(3), file)
    archive = file.read_bytes()
    file.write_bytes(sealed(archive))
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt: holds a Tensor; give a checkpoint that eventkern"):
        load_checkpoint(file)
    for damage in (archive[: len(archive) // 2] + bytes(100), archive.replace(b"data", b"\xff\xfe\0\0")):
        file.write_bytes(sealed(damage))
        with pytest.raises(
            CheckpointError, match=r"step-.*: its checksum holds, but torch cannot read it \("
        ) as caught:
            load_checkpoint(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [3, None, [], {"weight": 7, "bias": None}])
def test_weights_that_are_none_are_named(tmp_path: Path, weights: Any) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}: (its weights are a|parameter 'weight' is (absent|no tensor))"
    ):
        load_weights(torch.nn.Linear(2, 3), weights, tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_save_that_fails_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(state_of(1.0), 3, is_best=True)
    before = sorted(path.name for path in folder.path.iterdir())

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "write": (torch, "save")}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(*target, no_space)
        with pytest.raises(OSError, match="No space left"):
            folder.save(state_of(2.0), 3, is_best=False)
    assert sorted(path.name for path in folder.path.iterdir()) == before
    assert folder.last is not None
    assert torch.equal(load_checkpoint(folder.last)["model"]["weight"], torch.ones(50, 40))


def test_last_and_best_are_relative_links_and_the_rest_is_pruned(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert last_checkpoint(run) is None
    folder = CheckpointFolder(run / "checkpoints", keep=2)
    for step, is_best in ((10, True), (20, True), (30, False), (40, False), (50, False)):
        folder.save(state_of(step), step, is_best=is_best)
    assert sorted(os.listdir(folder.path)) == [
        "best",
        "best.safetensors",
        "last",
        "step-00000020.pt",
        "step-00000040.pt",
        "step-00000050.pt",
    ]
    assert os.readlink(folder.path / "last") == "step-00000050.pt"
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    last, best = CheckpointFolder(moved / "checkpoints").last, CheckpointFolder(moved / "checkpoints").best
    assert (last, best) == (moved / "checkpoints/step-00000050.pt", moved / "checkpoints/step-00000020.pt")
    assert last_checkpoint(moved) == last


def test_the_newest_that_verifies_is_offered(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=9)
    paths = [folder.save(state_of(step), step, is_best=False) for step in (10, 20, 30, 40)]
    for path in (paths[1], paths[3]):
        path.write_bytes(path.read_bytes()[:-1])
        os.utime(path, ns=(0, paths[3].stat().st_mtime_ns + 1))  # newer than all the others
    for damaged in (paths[3], folder.path / "last"):
        with pytest.raises(
            DamagedCheckpointError, match=rf"; the newest beside it that verifies is {paths[2]}$"
        ) as told:
            load_checkpoint(damaged)
        assert told.value.whole == paths[2]


def test_a_checkpoint_that_reads_back_otherwise_takes_the_place_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(state_of(1.0), 1, is_best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real_open = Path.open

    def flipping_open(path: Path, *arguments: Any, **options: Any) -> Any:
        file = real_open(path, *arguments, **options)

        class Flipping:
            """Passes everything on, but for one bit of the tensor."""

            def write(self, data: Any) -> int:
                if len(data) > 4000:
                    data = bytearray(data)
                    data[2000] ^= 4
                return file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Flipping()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", flipping_open)
        with pytest.raises(
            OSError, match=r"\.step-00000002\.pt\.tmp: read back, its bytes are not those written"
        ) as told:
            folder.save(state_of(2.0), 2, is_best=False)
    assert told.value.errno == errno.EIO
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_leavings_of_a_killed_save_are_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".step-00000009.pt.tmp", ".best.safetensors.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".last.tmp").symlink_to("step-00000009.pt")
    CheckpointFolder(tmp_path).save(state_of(1.0), 10, is_best=False)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000010.pt"]


def test_the_best_weights_alone_tell_where_they_are_from(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    origin = {"lineage": {"key": "person"}}
    folder.save({**state_of(1.0), "best_loss": 2.5, "config": {"lr": 0.1}, "metadata": origin}, 3, is_best=True)
    folder.save({**state_of(9.0), "step": 4}, 4, is_best=False)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), torch.ones(50, 40))
        told = file.metadata()
    assert told.pop("format") == "pt"
    assert {key: json.loads(value) for key, value in told.items()} == {
        "step": 3,
        "best_loss": 2.5,
        "config": {"lr": 0.1},
        "metadata": origin,
    }


def test_without_its_link_the_newest_is_the_last(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run/checkpoints", keep=9)
    for step in (10, 40, 20):
        folder.save(state_of(step), step, is_best=False)
    (folder.path / "last").unlink()
    assert last_checkpoint(tmp_path / "run") == folder.path / "step-00000020.pt"
    (folder.path / "last").symlink_to("step-00000099.pt")
    assert last_checkpoint(tmp_path / "run") == folder.path / "step-00000099.pt"  # the loader names what is gone


def test_a_run_resumed_from_an_earlier_step_keeps_what_it_writes(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state_of(1), 100, is_best=False)
    folder.save(state_of(2), 60, is_best=False)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-00000060.pt"]


def test_random_states_go_on(tmp_path: Path) -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    save_checkpoint({"format": 1, "random": random_state()}, tmp_path / "random.pt")

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()]  # noqa: NPY002

    first = draw()
    assert draw() != first
    set_random_state(load_checkpoint(tmp_path / "random.pt")["random"])
    assert draw() == first


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    path = tmp_path / "some.pt"
    load_weights(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
    assert torch.equal(model.weight, torch.ones(2, 3))
    for weights, message in (
        ({"weight": torch.ones(2, 4), "bias": torch.zeros(2)}, r"'weight' is \(2, 4\) in the checkpoint and \(2, 3\)"),
        ({"weight": torch.ones(2, 3)}, r"'bias' is absent in the checkpoint and \(2,\) in the model"),
        ({**model.state_dict(), "scale": torch.ones(1)}, r"'scale' is \(1,\) in the checkpoint and absent"),
    ):
        with pytest.raises(CheckpointError, match=rf"some\.pt: parameter {message}.*; give the configuration"):
            load_weights(model, weights, path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("failing", ["checkpoint", "weights"])
def test_a_write_that_fails_at_any_byte_leaves_no_trace(tmp_path: Path, share: float, failing: str) -> None:
    # The weights are written as float64 here and are the larger file, or are few and the smaller one.
    large, small = torch.zeros(40_000), torch.zeros(10)
    model, rest = (large, small) if failing == "weights" else (small, large)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save({"model": {"weight": model}, "rest": rest, "step": 1}, 1, is_best=True)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = int(share * large.numel() * large.element_size())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"step-00000002\.pt.*: File too large: .* bytes wanted, .* free"):
            folder.save({"model": {"weight": model + 1}, "rest": rest, "step": 2}, 2, is_best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "step-00000003.pt"
    generator = torch.Generator().manual_seed(5)
    save_checkpoint({"format": 1, "model": {"weight": torch.randn(300, generator=generator)}, "step": 3}, path)
    return path


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_and_no_cut_is_ever_loaded(intact: Path, data: st.DataObject) -> None:
    content = bytearray(intact.read_bytes())
    parts = {"header": (0, 200), "trailer": (len(content) - 120, len(content)), "anywhere": (0, len(content))}
    start, end = parts[data.draw(st.sampled_from(sorted(parts)))]
    place = data.draw(st.integers(start, end - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        message = "damaged: its bytes do not have the checksum|truncated, or no checkpoint"
    else:
        del content[place:]
        message = f"truncated, or no checkpoint: {place} bytes"
    damaged = intact.with_name("damaged.pt")  # is no name of a checkpoint, so that intact is the one offered
    damaged.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=rf"damaged\.pt: ({message}).*verifies is .*step-00000003\.pt$"):
        load_checkpoint(damaged)


def test_a_checkpoint_with_more_than_plain_values_is_refused(tmp_path: Path) -> None:
    save_checkpoint({"format": 1, "model": TrainerConfig()}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: is whole, but holds more than tensors and plain values; give"):
        load_checkpoint(tmp_path / "odd.pt")
