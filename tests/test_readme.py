"""The README tells the truth: its Python examples run, and its first two commands are the ones that CI relies on."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_example_runs(number):
    exec(compile(blocks("python")[number], f"README.md, python block {number}", "exec"), {})


def test_there_are_python_examples():
    assert len(blocks("python")) >= 2


def test_the_first_commands_are_one_line_each():
    main_job, tests = blocks("bash")[:2]
    assert re.fullmatch(r"pip install -c constraints.txt .* && eventkern train flights\n", main_job)
    assert re.fullmatch(r"pip install -c constraints.txt .* && pytest\n", tests)


def test_every_file_that_it_names_exists():
    named = set(re.findall(r"`((?:benchmarks|csrc|eventkern|profiling|tests)/[\w/]+\.\w+)`", README))
    assert len(named) >= 2
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_test_that_it_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) >= 6
    assert named <= defined, named - defined


def test_the_schema_in_it_is_one(tmp_path):
    from eventkern.data import Schema

    (tmp_path / "payments.toml").write_text(blocks("toml")[0], encoding="utf-8")
    schema = Schema.load(tmp_path / "payments.toml")
    assert schema.key == "Card"
    assert [category.kind for category in schema.categories] == ["id", "id", "flag", "bins", "time", "elapsed"]
