"""A model over the ranks of a run, replicated or sharded, compiled or not; its state is that of the plain model."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eventkern.train.config import ConfigError, TrainerConfig
from eventkern.train.device import compiles
from eventkern.train.distributed import Ranks
from eventkern.train.failures import RunFailure

CHANGED_GRAPH = "training graph has changed in this iteration"
"""Of both errors of DistributedDataParallel: a parameter is used for the first time, or no longer."""
NAMES_TOLD = 4


class Parallel:
    """Calls a model on this rank's batches; gradients of a synchronised backward are the mean over ranks.

    Args:
        model: on the device of `ranks`; `fully_shard` turns its parameters into shards, in place.
        ranks: a process that is alone calls the model itself.
        config: its keys sharding, compile and find_unused_parameters. With sharding "none" every rank holds the model,
            under DistributedDataParallel; with "fully_shard" it holds a share of each block, by torch's function of
            that name, and gathers a block when it computes it. Blocks are the members of the model's module lists that
            have no such list inside; the rest is one more. What is compiled is the forward as one graph, or each block
            where it is sharded, since the gathering of blocks is no part of a graph; "reduce-overhead" replays forward
            and backward as CUDA graphs, at one launch each.

    Attributes:
        is_compiled: whether it is.
        has_graphs: whether forward and backward are CUDA graphs.
        is_cold: the first call will not be like those after it: it compiles, or finds out the order of gradients.
    """

    def __init__(self, model: Any, ranks: Ranks, config: TrainerConfig) -> None:
        self.model = model
        self.is_compiled = compiles(config.compile, ranks.device)
        self.has_graphs = config.compile == "reduce-overhead"
        self.is_sharded = config.sharding == "fully_shard" and not ranks.is_alone
        self.is_cold = self.is_compiled or not ranks.is_alone
        self._ranks = ranks
        self._unused: list[str] = []
        self._forward: Any = model
        if self.is_sharded:
            self._shard()
            return
        if self.is_compiled:
            mode = "reduce-overhead" if self.has_graphs else None
            self._forward = torch.compile(model, fullgraph=True, mode=mode)
        if not ranks.is_alone:
            from torch.nn.parallel import DistributedDataParallel

            is_free = config.find_unused_parameters
            options: Any = {"find_unused_parameters": is_free, "static_graph": not is_free}
            self._forward = DistributedDataParallel(self._forward, gradient_as_bucket_view=True, **options)

    def _shard(self) -> None:
        from torch.distributed import broadcast
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for value in self.model.state_dict().values():
            if isinstance(value, Tensor):  # and not what a get_extra_state returns
                broadcast(value, src=0)  # as DistributedDataParallel does
        mesh = init_device_mesh(self._ranks.device.type, (self._ranks.world_size,))
        for block in blocks(self.model):
            # A lone Linear stays uncompiled: dynamo starts no graph in torch's own code.
            if self.is_compiled and not type(block).__module__.startswith("torch."):
                block.compile(fullgraph=True)
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        register_fsdp_forward_method(self.model, "metrics")

    def __call__(self, batch: Any) -> Tensor:
        if self.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._forward(batch)

    def note_unused(self) -> None:
        """Keeps which parameters the backward before it has given no gradient."""
        self._unused = [name for name, parameter in self._trained() if parameter.grad is None]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [named for named in self.model.named_parameters() if named[1].requires_grad]

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns what DistributedDataParallel says of parameters that some batches leave out into a RunFailure."""
        try:
            yield
        except RuntimeError as error:
            if CHANGED_GRAPH not in str(error):
                raise
            if numbers := re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error)):
                trained = self._trained()
                names = [trained[int(number)][0] for number in numbers[1].split()]
            else:  # a parameter has its first gradient
                names = self._unused
            more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
            raise RunFailure(
                f"not every batch gives gradients to {', '.join(names[:NAMES_TOLD])}{more}: set find_unused_parameters "
                "(--find-unused-parameters), or let every batch use them, if only with weight 0"
            ) from error

    @contextmanager
    def synchronising(self, is_last: bool) -> Iterator[None]:
        """Of the forwards and backwards of a step, the gradients are summed over ranks with the last alone."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)
        waits = not (is_last or self.is_sharded or self._ranks.is_alone)
        with self._forward.no_sync() if waits else nullcontext():
            yield

    def whole(self, state: Any) -> Any:
        """A state dict with its shards put together, on the main rank; all ranks must take part."""
        if not self.is_sharded:
            return state
        if isinstance(state, Mapping):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if not isinstance(state, torch.distributed.tensor.DTensor):
            return state
        gathered = state.full_tensor()
        return gathered.cpu() if self._ranks.is_main else None

    def own_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this rank holds of the whole model's weights."""
        own = self.model.state_dict() if self.is_sharded else {}
        return {name: _share(weight, own.get(name)) for name, weight in weights.items()}

    def own_moments(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank holds of the whole optimizer's state."""
        if not self.is_sharded:
            return dict(state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {
                name: _share(value, parameters[number]) if value.shape == parameters[number].shape else value
                for name, value in of_parameter.items()
            }
            for number, of_parameter in state["state"].items()
        }
        return {**state, "state": moments}


def refuse_graphs(config: TrainerConfig, ranks: Ranks) -> None:
    """Raises a ConfigError where a configuration wants CUDA graphs without CUDA, or among ranks."""
    if config.compile == "reduce-overhead" and not (ranks.device.type == "cuda" and ranks.is_alone):
        where = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} on {ranks.device.type}"
        raise ConfigError(f"compile is 'reduce-overhead', but must be on or off for {where}")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of module lists that hold no module list themselves, in the model's order."""
    members = [member for owner in model.modules() if isinstance(owner, nn.ModuleList) for member in owner]
    return [member for member in members if not any(isinstance(inner, nn.ModuleList) for inner in member.modules())]


def _share(whole: Any, own: Any) -> Any:
    if own is None or not hasattr(own, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # every rank has read the whole: none needs to be told
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class CompileClock:
    """The seconds that torch.compile has taken."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0

    def begin(self, _: Any) -> None:
        self._began = time.perf_counter()

    def end(self, _: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """The seconds since the last call of this."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@contextmanager
def compile_clock(is_compiled: bool) -> Iterator[CompileClock]:
    """Inside, the clock runs while torch.compile is at work, and no graph is split for DistributedDataParallel."""
    clock = CompileClock()
    if not is_compiled:
        yield clock
        return
    import torch._dynamo
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(clock.begin)
    callback_handler.register_end_callback(clock.end)
    try:
        with torch._dynamo.config.patch(optimize_ddp=False):
            yield clock
    finally:
        callback_handler.remove_start_callback(clock.begin)
        callback_handler.remove_end_callback(clock.end)
