"""The fuzz: a short run finds nothing, and a crash, a hang and a wrong error are told with the case that shows them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
SUBJECTS = ("entries", "ops", "stores", "schemas", "checkpoints", "configs")


def fuzz(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_short_run_tries_every_subject_and_finds_nothing() -> None:
    status, told, errors = fuzz(FUZZ, "--seconds", "3", "--seed", "15")
    assert (status, errors) == (0, ""), told + errors
    for subject in SUBJECTS:
        assert re.search(rf"^ +[\d,]+ {subject}: ", told, re.MULTILINE), told
    assert re.search(r"^seed 15: [\d,]+ cases in \d+ s, 0 faults$", told, re.MULTILINE), told


@pytest.mark.parametrize(
    ("at_fault", "message"),
    [
        ("import os; os.abort()", "the process ended with status -6"),
        ("import time; time.sleep(100)", "no end within 2 seconds"),
        ("raise KeyError('size')", "KeyError in entries.py, run"),
        ("import hostile; hostile.outcome(lambda: {}['size'])", "KeyError in entries.py, <lambda>"),
        ("import hostile; hostile.outcome(lambda: int('x' * 0 + 'é', 0))", None),
        ("import hostile; hostile.outcome(lambda: b'\\xff'.decode())", "UnicodeDecodeError in entries.py, <lambda>"),
        ("import hostile; hostile.outcome(lambda: [].index(''))", None),
        ("import hostile, json; hostile.outcome(lambda: json.loads('{'))", "JSONDecodeError in decoder.py, raw_decode"),
        ("raise AssertionError", "AssertionError in entries.py, run"),
    ],
)
def test_what_is_at_fault_is_told_with_its_case(tmp_path: Path, at_fault: str, message: str | None) -> None:
    for name in ("__main__.py", "hostile.py"):
        shutil.copy(FUZZ / name, tmp_path)
    main = tmp_path / "__main__.py"
    main.write_text(re.sub(r"SECONDS_A_CASE = \d+", "SECONDS_A_CASE = 2", main.read_text()))
    case = f"    if random.random() < 0.1:\n        {at_fault}\n    return 'entries: right'\n"
    (tmp_path / "entries.py").write_text(f"def run(random, folder):\n{case}")
    status, told, errors = fuzz(tmp_path, "--seconds", "1", "--seed", "3", "--only", "entries")
    if message is None:
        assert (status, errors) == (0, ""), told + errors
        return
    assert status == 1
    found = re.search(r"^FAULT in case (\d+), entries: (.+)\nagain: python tests/fuzz (.+)$", errors, re.MULTILINE)
    assert found, errors
    assert found[2] == message
    assert re.search(rf"^ +[\d,]+ FAULT {re.escape(message)}$", told, re.MULTILINE), told
    assert found[3] == f"--seed 3 --case {found[1]} --only entries"
    if "Error" in message:  # the others would end this process's child alike
        status, _, again = fuzz(tmp_path, *found[3].split())
        assert status == 1
        assert message.split()[0] in again
