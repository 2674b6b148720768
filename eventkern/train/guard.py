"""The guard against numbers that are not finite: it skips the step, counts, and tells what went bad first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES_TOLD = 4


class Guard:
    """Decides on the device whether a step counts, and keeps what the first bad step of a row looked like.

    A step is skipped when one of its losses or the norm of its gradients is not finite. Nothing here waits for the
    device; under ranks all decide alike, since losses and norms are already those of all ranks.

    Weights, moments and counts are as before a skipped step. Buffers that a forward updates, such as the statistics of
    a BatchNorm, are not: they keep what the step's forwards have put there.

    Args:
        loss_names: names of the H losses.
        parameter_names: names of the P parameters.
        limit: skipped steps in a row that end the run.
        device: where the numbers are.

    Attributes:
        skipped: () int64, steps skipped in all, also those that a loss scale caused.
        in_a_row: () int64, skipped steps up to now in a row, without those that a loss scale caused.
    """

    def __init__(
        self, loss_names: Sequence[str], parameter_names: Sequence[str], limit: int, device: torch.device
    ) -> None:
        self.limit = limit
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._names = [
            *(f"the loss of {name}" for name in loss_names),
            *(f"gradient {name}" for name in parameter_names),
        ]
        self._first = torch.zeros(1 + len(self._names), dtype=torch.float32, device=device)

    def judge(self, step: int, losses: Tensor, norms: Tensor, norm: Tensor, scale: Tensor | None = None) -> Tensor:
        """Whether the step is to be skipped: () float32, 1 or 0, as torch's fused optimizers want it.

        Args:
            step: its number.
            losses: (H,) summed over ranks.
            norms: (P,) of each parameter's gradient, without the loss scale.
            norm: () of all gradients together.
            scale: () the loss scale of fp16. Above 1 it may be the cause itself, and halves: gradients that overflow
                then do not count in a row, unless a loss is bad too.
        """
        is_loss_bad = ~losses.isfinite().all()
        is_bad = is_loss_bad | ~norm.isfinite()
        counts = is_bad if scale is None else is_loss_bad | (is_bad & (scale <= 1))
        now = torch.cat([losses.new_full((1,), step), losses, norms])
        self._first = torch.where(counts & (self.in_a_row == 0), now, self._first)
        self.skipped += is_bad
        self.in_a_row = torch.where(is_bad, self.in_a_row + counts, 0)
        return is_bad.float()

    def story(self) -> str:
        """What the first bad step of the row looked like, read from the device."""
        step, *numbers = self._first.tolist()
        bad = [name for name, number in zip(self._names, numbers, strict=True) if not math.isfinite(number)]
        bad = bad or ["the norm of all gradients together"]
        more = f" and {len(bad) - NAMES_TOLD} more" if len(bad) > NAMES_TOLD else ""
        return f"at step {int(step)} were not finite: {', '.join(bad[:NAMES_TOLD])}{more}"


class Notice:
    """A few integers on their way from the device to the host, which waits only for what came before them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._posted: Tensor | None = None

    def post(self, numbers: Tensor) -> None:
        """Sends numbers off, after those sent before were read."""
        if not self._is_cuda:
            self._posted = numbers
            return
        if self._posted is None:
            self._posted = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._arrived = torch.cuda.Event()
        self._posted.copy_(numbers, non_blocking=True)
        self._arrived.record()

    def read(self) -> list[int]:
        """The numbers sent last; work that the device was given after them goes on meanwhile."""
        assert self._posted is not None
        if self._is_cuda:
            self._arrived.synchronize()
        return self._posted.tolist()
