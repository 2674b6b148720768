"""The door of the train room."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_is_imported_before_it_is_used() -> None:
    program = (
        "import sys, eventkern.train; assert 'torch' not in sys.modules, 'torch'\n"
        "import eventkern.train.trainer\n"
        "late = {'rich', 'tensorboard', 'matplotlib', 'triton', 'tyro', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
