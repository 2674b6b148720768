"""What a run was made with."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.train import environment as room


def test_the_facts_are_plain_and_true() -> None:
    facts = room.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert {type(value) for value in facts.values()} == {str, int}  # what weights_only loads
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["numpy"] != "not installed"


def test_the_commit_is_the_checkouts_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHECKOUT", tmp_path)
    assert room.git_commit() == "none"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert room.git_commit() == "unknown"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = room.git_commit()
    assert len(commit) == 40
    assert set(commit) <= set("0123456789abcdef")


def read(run_dir: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run_dir / "environment.json").read_text())
    return told


def test_a_run_is_told_with_all_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step, command in ((0, ["eventkern", "train", "my run"]), (7, ["again"]), (9, ["and again"])):
        monkeypatch.setattr(sys, "orig_argv", command)
        room.record_run(run_dir, {"lr": 0.5, "model": {"d_model": step}}, precision="bf16", seed=3, from_step=step)
    attempt = read(run_dir)
    earlier = attempt.pop("earlier_attempts")
    assert [each["from_step"] for each in (*earlier, attempt)] == [0, 7, 9]
    assert [each["command"] for each in (*earlier, attempt)] == ["eventkern train 'my run'", "again", "'and again'"]
    for each in (*earlier, attempt):
        assert each.keys() == attempt.keys() > room.environment().keys()
        assert (each["host"], each["world_size"]) == (socket.gethostname(), 2)
        assert (each["precision"], each["seed"]) == ("bf16", 3)
    assert tomllib.loads((run_dir / "config.toml").read_text()) == {"lr": 0.5, "model": {"d_model": 9}}
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.toml", "environment.json"]
