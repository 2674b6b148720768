"""The order of an epoch: a keyed permutation that costs no memory, and the sampler that deals it out in batches."""

from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor

from eventkern import _C

PERMUTATION_VERSION = 1
_MAX_KEY = 1 << 64


def permutation(
    n: int,
    *,
    seed: int,
    epoch: int = 0,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Positions [start, stop) of a pseudo-random bijection of [0, n).

    A Feistel network on the smallest power-of-two domain that holds n, with cycle-walking: the value at a position
    depends on (n, seed, epoch, position) alone, so any slice costs only itself, and no state grows with n.

    Args:
        n: size of the permuted range, 1 to 2^48.
        seed: in [0, 2^64); hashed together with epoch into the round keys.
        epoch: in [0, 2^64).
        start: first position.
        stop: one past the last position; n when None.
        device: where the integers are made, "cpu" or "cuda"; ignored when out is given.
        out: (stop - start,) contiguous int64 tensor to fill.

    Returns:
        (stop - start,) int64; the same integers on every device and machine.

    Raises:
        ValueError: an argument out of its range, or an out of another shape or dtype.
        RuntimeError: device is "cuda", but the extension was built without CUDA.

    Source:
        Black and Rogaway, 2002 (cycle-walking); Luby and Rackoff, 1988 (Feistel networks).
    """
    stop = n if stop is None else stop
    if not 1 <= n <= _C.max_permutation_size:
        raise ValueError(f"n is {n}; want 1 to 2^48")
    if not 0 <= start <= stop <= n:
        raise ValueError(f"start, stop is {start}, {stop}; want 0 <= start <= stop <= n = {n}")
    for name, key in (("seed", seed), ("epoch", epoch)):
        if not 0 <= key < _MAX_KEY:
            raise ValueError(f"{name} is {key}; want 0 to 2^64 - 1")
    device = torch.device(device) if out is None else out.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; want cpu or cuda")
    if device.type == "cuda" and not _C.has_cuda:
        raise RuntimeError("device is 'cuda', but eventkern._C was built without CUDA; rebuild it where nvcc is found")
    if out is None:
        out = torch.empty(stop - start, dtype=torch.int64, device=device)
    elif out.shape != (stop - start,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; want ({stop - start},) contiguous torch.int64")
    where = {"n": n, "seed": seed, "epoch": epoch, "start": start, "count": stop - start, "out": out.data_ptr()}
    if out.device.type == "cpu":
        _C.permutation_cpu(**where, num_threads=torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(out.device).cuda_stream
        _C.permutation_cuda(**where, device=out.device.index, stream=stream)
    return out


class SamplerState(TypedDict):
    """Where a sampler stands: everything its order depends on, and the position reached in the global order."""

    version: int
    n: int
    seed: int
    epoch: int
    position: int
    shuffle: bool
    window: int | None


class IndexSampler:
    """Batches of sample indices, shuffled globally and then shared among ranks by position.

    Rank r takes positions [r * batch_size, (r + 1) * batch_size) of each global batch of world_size * batch_size. A
    short last batch is shared evenly; its remainder below world_size is dropped (num_dropped). Iterating starts the
    epoch anew, or goes on from a loaded state. Serves as torch's `batch_sampler=`.

    Args:
        num_samples: n.
        batch_size: samples of a batch, per rank.
        seed: of the order.
        shuffle: a new order each epoch; else 0, 1, 2, ...
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        drop_last: leave out a short last batch.
        window: not supported yet; must be None.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        window: int | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; want at least 1")
        if not 0 <= seed < _MAX_KEY:
            raise ValueError(f"seed is {seed}; want 0 to 2^64 - 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; want 0 to world_size - 1 = {world_size - 1}")
        if window is not None:
            raise ValueError(f"window is {window}; windowed shuffling is not supported yet, want None")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self._position = 0
        self._resume_position = 0

    @property
    def num_dropped(self) -> int:
        """Samples of a whole epoch that no rank sees."""
        short = self.num_samples % (self.batch_size * self.world_size)
        return short if self.drop_last else short % self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        full, short = divmod(self.num_samples, self.batch_size * self.world_size)
        return full + (not self.drop_last and short >= self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; another epoch than the loaded one starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume_position = epoch, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        position, self._resume_position = self._resume_position, 0
        while (batch := self._slice(position)) is not None:
            start, stop, position = batch
            self._position = position
            yield self._indices(start, stop)

    def _slice(self, position: int) -> tuple[int, int, int] | None:
        """This rank's [start, stop) of the global batch at `position`, and the position after it; None at the end."""
        global_size = self.batch_size * self.world_size
        left = self.num_samples - position
        if left >= global_size:
            start = position + self.rank * self.batch_size
            return start, start + self.batch_size, position + global_size
        share = left // self.world_size
        if self.drop_last or share == 0:
            return None
        start = position + self.rank * share
        return start, start + share, self.num_samples

    def _indices(self, start: int, stop: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(start, stop)
        return permutation(self.num_samples, seed=self.seed, epoch=self.epoch, start=start, stop=stop)

    def state_dict(self) -> SamplerState:
        """The scalars that name this point of the epoch: batches already yielded are behind it."""
        return {
            "version": PERMUTATION_VERSION,
            "n": self.num_samples,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "shuffle": self.shuffle,
            "window": None,
        }

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on at a saved point, under any batch size and world size.

        Raises:
            ValueError: the state belongs to another n, window or version of the permutation.
        """
        own = self.state_dict()
        for key, value in (("version", own["version"]), ("n", own["n"]), ("window", own["window"])):
            if state.get(key) != value:
                raise ValueError(f"the sampler state has {key} {state.get(key)}, but this sampler {value}")
        if not 0 <= state["position"] <= self.num_samples:
            raise ValueError(f"the sampler state has position {state['position']}; want 0 to n = {self.num_samples}")
        self.seed, self.shuffle, self.epoch = state["seed"], state["shuffle"], state["epoch"]
        self._position = self._resume_position = state["position"]
