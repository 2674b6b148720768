"""One optimizer step: micro-batches of all ranks weighted as one large batch, clipped, guarded, taken or skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nvtx
import torch
from torch import Tensor, nn

from eventkern.train.checkpoint import random_state, set_random_state
from eventkern.train.config import TrainerConfig
from eventkern.train.device import autocast
from eventkern.train.distributed import Ranks
from eventkern.train.guard import Guard, Notice
from eventkern.train.parallel import Parallel


@dataclass(frozen=True)
class Outcome:
    """A step's numbers over all ranks, still on the device: (H,) losses, the gradient norm before clipping, labels."""

    losses: Tensor
    grad_norm: Tensor
    num_targets: Tensor


class OptimizerStep:
    """Takes optimizer steps that equal those on one large batch to float32 rounding. No step waits for the device.

    Each micro-batch weighs its num_targets over those of the whole step, of all ranks: so all are drawn first. Ranks
    exchange labels and stop requests before the forward, gradients in the backward, and losses after it.

    Args:
        parallel: the model, over the ranks.
        optimizer: of its parameters; a fused one skips a step on the device, another lets the host look.
        config: its keys clip and max_skipped_steps.
        ranks: those of `parallel`.
        precision: "fp32", "tf32", "bf16" or "fp16".

    Attributes:
        guard: counts skipped steps.
        notice: of the step under way, once it was enqueued: how many ranks had asked for a stop before it began, and
            the steps skipped in a row up to then.
        scaler: the loss scale of fp16.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        ranks: Ranks,
        precision: str,
    ) -> None:
        self._parallel = parallel
        self._optimizer: Any = optimizer
        self._is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._clip = config.clip
        self._keeps_gradients = config.histograms  # which show them at an evaluation
        # A CUDA graph's outputs live until its next replay: gradients that add up over replays are no outputs of it.
        self._owns_gradients = parallel.has_graphs and config.grad_accum > 1
        self._ranks = ranks
        self._device = ranks.device
        self._precision = precision
        named = [named for named in parallel.model.named_parameters() if named[1].requires_grad]
        self._parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        names = [name for name, _ in named]
        self._num_losses = len(parallel.model.head_names)
        self.guard = Guard(parallel.model.head_names, names, config.max_skipped_steps, self._device)
        self.notice = Notice(self._device)
        # on the CPU also where it is not in use: the class for other devices is the same, and asks for CUDA
        self.scaler = torch.amp.GradScaler(
            self._device.type if precision == "fp16" else "cpu", enabled=precision == "fp16"
        )

    def warm_up(self, batch: Any) -> None:
        """A forward and a backward without effect: what is compiled or laid out at the first call is so afterwards.

        DistributedDataParallel orders its buckets by the first backward it sees, so without this the first step after a
        resume would add in another order than the same step of an undisturbed run; and a static graph must be seen
        synchronised first.
        """
        generators = random_state()
        self._clear_gradients()
        buffers = [(buffer, buffer.clone()) for buffer in self._parallel.model.buffers()]
        for _ in range(1 if self._ranks.is_alone else 2):  # a static graph is laid out anew after the second
            with self._parallel.synchronising(True):
                self._forward(batch, torch.ones((), dtype=torch.float32, device=self._device))
        self._parallel.note_unused()
        self._clear_gradients()
        for buffer, before in buffers:
            buffer.copy_(before)
        set_random_state(generators)
        self._parallel.is_cold = False

    def __call__(self, batches: list[Any], number: int, is_stop_requested: bool = False) -> Outcome:
        """Step `number` on this rank's micro-batches: as many on every rank."""
        counts = torch.stack([batch.num_targets for batch in batches])
        stops = torch.full((), is_stop_requested, dtype=torch.int64, device=self._device)
        num_targets, num_stops = self._ranks.sum(torch.stack([counts.sum(), stops]))
        self.notice.post(torch.stack([num_stops, self.guard.in_a_row]))
        # times world_size, since gradients become the mean over ranks
        weights = (counts * self._ranks.world_size).float() / num_targets.clamp(min=1)
        losses = torch.zeros(self._num_losses, dtype=torch.float32, device=self._device)
        self._clear_gradients()
        for position, batch in enumerate(batches):
            with self._parallel.synchronising(position == len(batches) - 1):
                losses += self._forward(batch, weights[position])
        losses = self._ranks.sum(losses) / self._ranks.world_size
        with marked("optimizer"):
            grad_norm = self._update(number, losses)
            if not self._keeps_gradients:
                self._clear_gradients()
        return Outcome(losses, grad_norm, num_targets)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: the loss scale, and the steps skipped so far."""
        return {"scaler": self.scaler.state_dict(), "skipped_steps": int(self.guard.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` returned; a loss scale only where both runs have one."""
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.guard.skipped.fill_(state.get("skipped_steps", 0))

    def _clear_gradients(self) -> None:
        if self._owns_gradients:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self._optimizer.zero_grad(set_to_none=not self._owns_gradients)

    def _forward(self, batch: Any, weight: Tensor) -> Tensor:
        """Forward and backward of a micro-batch; returns its weighted losses."""
        with self._parallel.explaining(), marked("forward"), autocast(self._precision, self._device):
            losses = self._parallel(batch) * weight
        with self._parallel.explaining(), marked("backward"):
            self.scaler.scale(losses.sum()).backward()
        return losses.detach()

    def _update(self, number: int, losses: Tensor) -> Tensor:
        """Takes the step or skips it; returns the norm of its gradients."""
        scale = None
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), dtype=torch.float32, device=self._device))
            self.scaler.unscale_(self._optimizer)
        norms = self._norms()
        grad_norm = torch.linalg.vector_norm(norms)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, grad_norm)
        is_bad = self.guard.judge(number, losses, norms, grad_norm, scale)
        if self._is_fused:
            # the protocol of GradScaler, without its own judgement: the kernel leaves weights, moments and counts alone
            self._optimizer.grad_scale, self._optimizer.found_inf = None, is_bad
            self._optimizer.step()
            del self._optimizer.grad_scale, self._optimizer.found_inf
        elif not is_bad.item():
            self._optimizer.step()
        if self.scaler.is_enabled():
            for found in self.scaler._found_inf_per_device(self._optimizer).values():
                found.copy_(is_bad)
            self.scaler.update()
        return grad_norm

    def _norms(self) -> Tensor:
        """(P,) norms of the gradients, over all shards; 0 where a parameter has none."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not gradients:
            return torch.zeros(len(self._parameters), dtype=torch.float32, device=self._device)
        norms: Any = torch.stack(torch._foreach_norm(gradients))
        if self._parallel.is_sharded:
            norms = norms.full_tensor()
        if len(norms) == len(self._parameters):
            return norms
        found, none = iter(norms.unbind()), norms.new_zeros(())
        return torch.stack([none if parameter.grad is None else next(found) for parameter in self._parameters])


def marked(name: str) -> nvtx.annotate:
    """A range that a profiler shows."""
    return nvtx.annotate(name, domain="eventkern")
