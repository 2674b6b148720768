import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import environment as module
from benchmarks.environment import environment, first_line, hardware_slug, has_changes
from eventkern import hardware


def test_the_environment_names_what_a_figure_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.238, 0.0, 0.0))
    facts = environment("cpu", commit="abc")
    assert facts["commit"] == "abc"
    assert facts["load_average"] == 1.24
    assert facts["threads"] == torch.get_num_threads()
    assert {
        "time",
        "cpu",
        "cores",
        "instruction_set",
        "python",
        "torch",
        "triton",
        "numpy",
        "eventkern",
    } <= facts.keys()
    assert "driver" not in facts


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("AMD EPYC", "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-2c"),
        ("AMD EPYC 9354 32-Core Processor", "amd-epyc-9354-2c"),
    ],
)
def test_a_processor_makes_a_file_name(monkeypatch: pytest.MonkeyPatch, model: str, slug: str) -> None:
    monkeypatch.setattr(hardware, "cpu_model", lambda: model)
    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    assert hardware_slug("cpu") == slug


def test_a_card_makes_a_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert hardware_slug("cuda") == "nvidia-h200"


def test_a_card_adds_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "first_line", lambda *command: "580.1" if command[0] == "nvidia-smi" else "")
    facts = environment("cuda", commit="abc")
    assert (facts["driver"], facts["compute_capability"]) == ("580.1", "9.0")


def test_a_missing_or_failing_command_says_nothing() -> None:
    assert first_line("no-such-command-anywhere") == ""
    assert first_line("sh", "-c", "echo said; exit 1") == ""
    assert first_line("sh", "-c", "echo ' said '; echo more") == "said"


def test_changed_files_mark_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert not has_changes(tmp_path)
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert not has_changes(tmp_path)
    (tmp_path / "file").write_text("two")
    assert has_changes(tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert str(environment("cpu")["commit"]).endswith("+changes")
