"""The floors of the house: reads every import of eventkern and proves that it points down."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A room may import itself and any lower floor; rooms that share a floor are blind to one another.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"_C"}),
    frozenset({"__init__", "disk", "hardware", "modes", "plain"}),
    frozenset({"ops", "data", "train"}),
    frozenset({"nn"}),
    frozenset({"models"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
# These stand outside the house and may look in; nothing inside looks out.
OUTSIDE = frozenset({"benchmarks", "profiling", "tests"})
# An importer of the ops has the core dependencies alone, and pays for nothing it does not use.
LOADED_LATE = ("triton", "torch._dynamo", "pyarrow", "tensorboard", "tyro", "rich", "matplotlib")
LIBTORCH_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/')


def imported_names(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a file, wherever it stands; relative ones resolved from `package`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from eventkern import ops` names a room only in its last word.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and is_import_call(node) and isinstance(node.args[0], ast.Constant):
            yield node.lineno, str(node.args[0].value)


def is_import_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in {"import_module", "__import__"} and bool(call.args)


def floor_of(room: str) -> int | None:
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), None)


def room_of(name: str, house: Path) -> str:
    """The room a dotted name below eventkern lies in; a plain attribute (`eventkern.__version__`) is of `__init__`."""
    room = name.split(".")[1] if "." in name else "__init__"
    is_module = (house / room).is_dir() or (house / f"{room}.py").exists() or floor_of(room) is not None
    return room if is_module else "__init__"


def violations(root: Path) -> list[str]:
    """One line for each import under root/eventkern that points sideways, up or out of the house."""
    house = root / "eventkern"
    found: list[str] = []
    for path in sorted(house.rglob("*.py")):
        relative = path.relative_to(house)
        room = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        floor = floor_of(room)
        if floor is None:
            found.append(f"{relative}: the room '{room}' stands on no floor")
            continue
        package = ".".join(("eventkern", *relative.parts[:-1]))
        for line, name in imported_names(path, package):
            top = name.split(".")[0]
            if top in OUTSIDE:
                found.append(f"{relative}:{line}: imports {name}, which stands outside the house")
            if top != "eventkern":
                continue
            other = room_of(name, house)
            other_floor = floor_of(other)
            if other != room and (other_floor is None or other_floor >= floor):
                found.append(f"{relative}:{line}: '{room}' imports {name}, which is not below it")
    return found


def test_imports_point_down() -> None:
    rooms = {path.name for path in (ROOT / "eventkern").iterdir() if any(path.glob("*.py"))}
    assert {"ops", "data", "train", "nn", "models"} <= rooms
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "culprit"),
    [
        ("ops/api.py", "import eventkern.nn\n", "eventkern.nn"),
        ("ops/api.py", "from eventkern import data\n", "eventkern.data"),
        ("ops/sums/api.py", "from ...train import trainer\n", "eventkern.train.trainer"),
        ("ops/sums/api.py", "from ... import models\n", "eventkern.models"),
        ("data/loader.py", "def late():\n    from eventkern.ops import gather\n", "eventkern.ops.gather"),
        ("train/trainer.py", "import torch, eventkern.data.loader\n", "eventkern.data.loader"),
        ("train/trainer.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import eventkern.cli\n", "cli"),
        ("nn/heads.py", "from ..models import event_transformer\n", "eventkern.models.event_transformer"),
        ("models/gpt.py", "import importlib\nimportlib.import_module('eventkern.cli')\n", "eventkern.cli"),
        ("hardware.py", "from .ops import multi_embedding\n", "eventkern.ops.multi_embedding"),
        ("__init__.py", "from eventkern.nn import MultiEmbedding\n", "eventkern.nn.MultiEmbedding"),
        ("cli.py", "import benchmarks.peers\n", "benchmarks.peers"),
        ("models/gpt.py", "from profiling import roofline\n", "profiling.roofline"),
        ("misc/tools.py", "", "misc"),
        ("cli.py", "import eventkern.misc\n", "eventkern.misc"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, file: str, source: str, culprit: str) -> None:
    wrong = tmp_path / "eventkern" / file
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text(source)
    if culprit == "eventkern.misc":
        (tmp_path / "eventkern" / "misc").mkdir()
    (line,) = violations(tmp_path)
    assert line.startswith(file)
    assert culprit in line


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from eventkern import data, models, train, hardware, __version__\n"),
        (
            "models/gpt.py",
            "import eventkern.ops\nfrom ..nn import heads\nfrom eventkern.data.loader import EventBatch\n",
        ),
        ("ops/sums/api.py", "from eventkern import _C\nfrom ..switch import state\nfrom . import reference\n"),
        ("data/loader.py", "from .store import EventStore\nfrom eventkern._C import gather\nimport tests_of_mine\n"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, source: str) -> None:
    right = tmp_path / "eventkern" / file
    right.parent.mkdir(parents=True, exist_ok=True)
    right.write_text(source)
    assert violations(tmp_path) == []


FORWARD_ON_THE_CPU = """
import json, sys
import torch
import eventkern.ops as ops

loaded = {}
def look(stage):
    loaded[stage] = [name for name in sys.argv[1:] if name in sys.modules]

generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, (5, 2), generator=generator)
hidden = ops.multi_embedding(ids, torch.randn(7, 8, generator=generator), (3, 4))
heads = torch.randn(1, 2, 5, 8, generator=generator).requires_grad_()
ops.attention(heads, heads, heads, is_causal=True).sum().backward()
losses = ops.multi_head_cross_entropy(hidden, torch.randn(7, 8, generator=generator), ids, (3, 4))
assert losses.shape == (2,) and bool(losses.isfinite().all())
look("a forward of the ops")
import eventkern.nn, eventkern.models
look("importing the models")
import eventkern.data
look("importing the data room")
print(json.dumps(loaded))
"""


def test_nothing_heavy_is_loaded_by_a_forward_on_the_cpu() -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-c", FORWARD_ON_THE_CPU, *LOADED_LATE], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {stage: [] for stage in json.loads(run.stdout)}


def libtorch_includes(folder: Path) -> list[str]:
    return [
        f"{path.name}:{number}: {line}"
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh"}
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if LIBTORCH_INCLUDE.match(line)
    ]


def test_the_extension_includes_no_libtorch() -> None:
    assert (ROOT / "csrc" / "module.cpp").exists()
    assert libtorch_includes(ROOT / "csrc") == []


def test_a_libtorch_include_is_caught(tmp_path: Path) -> None:
    (tmp_path / "fast.cu").write_text('#include <vector>\n#include "own.h"\n  #  include <ATen/ATen.h>\n')
    assert libtorch_includes(tmp_path) == ["fast.cu:3:   #  include <ATen/ATen.h>"]
