"""Without a GPU the tests marked `triton` run in Triton's interpreter, which must be chosen before the first import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "ops").glob("test_*_triton.py"))
SECONDS = 900  # of a run that hangs


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked `triton` run on the GPU, in this process")
@pytest.mark.skipif(sys.platform != "linux", reason="needs triton, which exists for Linux alone")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_triton_kernels_pass_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert run.returncode == 0, run.stdout + run.stderr
    closing_line = run.stdout.strip().splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed\b", closing_line), closing_line
    assert "TRITON_INTERPRET=1" not in run.stdout, run.stdout
