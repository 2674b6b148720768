"""What a run was made with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

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
