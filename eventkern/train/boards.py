"""Where the numbers of metrics.jsonl are shown, under the same names: TensorBoard, and Weights & Biases when asked for.

Names with a slash are groups on both: ``loss/<category>``, ``validation_loss/<category>``, ``weights/<parameter>``.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from eventkern.train.config import ConfigError
from eventkern.train.whole_files import write_file

PROJECT = "eventkern"
RUN_ID_FILE = "wandb_id"


class Board(Protocol):
    """Something that draws numbers over steps."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Adds the numbers of a step, by name."""

    def write_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Adds the distribution of each tensor's elements, by name; tensors are flat, of float32 and on the CPU."""

    def close(self, *, failed: bool) -> None:
        """Writes what is left; nothing may follow."""


class TensorBoard:
    """Event files in the run folder.

    Args:
        run_dir: their folder.
        first_step: steps already taken: what an earlier attempt wrote after them is hidden.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir), purge_step=first_step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        for name, values in tensors.items():
            self._writer.add_histogram(name, values, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "eventkern", named like the run folder; a resumed run goes on under its own id.

    $WANDB_MODE=offline needs no account and keeps the run in <run folder>/wandb, for `wandb sync`.

    Args:
        run_dir: the run's folder.
        settings: the run's configuration, shown with it.

    Raises:
        ConfigError: the package is not installed, or does not start (no account, no network).
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        require_board("wandb")
        self._wandb: Any = importlib.import_module("wandb")
        id_file = run_dir / RUN_ID_FILE
        if not id_file.exists():
            write_file(id_file, secrets.token_hex(4) + "\n")
        try:
            self._run = self._wandb.init(
                project=PROJECT,
                name=run_dir.resolve().name,
                dir=str(run_dir),
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                config=dict(settings),
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except self._wandb.Error as error:
            told = " ".join(str(error).split())
            raise ConfigError(
                f"logger is 'wandb', which does not start: {told} (WANDB_MODE=offline needs no account)"
            ) from error
        # steps are ours: a resumed run goes back to its checkpoint, which W&B's own count refuses
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log({**row, "step": step})

    def write_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        histograms = {name: self._wandb.Histogram(values.numpy()) for name, values in tensors.items()}
        self._run.log({"step": step, **histograms})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def require_board(logger: str) -> None:
    """Raises a ConfigError unless the package that the key `logger` needs is installed."""
    if logger == "wandb" and not has("wandb"):
        raise ConfigError("logger is 'wandb', but the package is not installed: pip install wandb, or logger = 'none'")


def has(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None
