"""The order of an epoch: a keyed permutation that costs no memory."""

import torch
from torch import Tensor

from eventkern import _C
from eventkern.plain import check_integer

PERMUTATION_VERSION = 1
MAX_SIZE = _C.max_permutation_size
MAX_KEY = 1 << 64


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

    The value at a position depends on (n, seed, epoch, position) alone, so any slice costs only itself, and no state
    grows with n. It is a Feistel network on the smallest power-of-two domain that holds n, of 256 at least, whose
    values outside [0, n) go through it again until they fall inside:

        (high, low) = position;  in round r:  (high, low) = (low, high ^ upper bits of (x^2 + x)),  x = c * low + key_r

    with 8 rounds; the code alternates the halves' roles instead of swapping them. The round keys are a hash of n, seed,
    epoch and part (0 here), one inside the other.

    Args:
        n: size of the permuted range, 1 to 2^48.
        seed: in [0, 2^64).
        epoch: in [0, 2^64).
        start: first position.
        stop: one past the last position; n when None.
        device: where the integers are made, "cpu" or "cuda"; ignored when out is given.
        out: (stop - start,) contiguous int64 tensor to fill.

    Returns:
        (stop - start,) int64; the same integers on every device and machine, for one PERMUTATION_VERSION.

    Raises:
        TypeError: n, seed, epoch, start or stop is no integer.
        ValueError: an argument out of its range, or an out of another shape or dtype.
        RuntimeError: device is "cuda", but the extension was built without CUDA.

    Numerics:
        Integers alone: exact, and the same for any number of threads. Orders of sizes from 1,000 up are told from
        numpy's by none of the tests of tests/data/test_permutation_statistics.py (orders of neighbours, serial
        correlation, spread over batches, likeness to the next seed, epoch and part), which fail networks of 2 to 4
        rounds. It is no cipher: who sees a part of an order can find the rest.

    Source:
        Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988; Black and
        Rogaway, "Ciphers with arbitrary finite domains", 2002, section 4 (cycle-walking); Rivest et al., "The RC6 block
        cipher", 1998 (a quadratic as the round function).
    """
    n, seed, epoch, start = map(check_integer, ("n", "seed", "epoch", "start"), (n, seed, epoch, start))
    stop = n if stop is None else check_integer("stop", stop)
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"n is {n}; want 1 to 2^48")
    if not 0 <= start <= stop <= n:
        raise ValueError(f"start, stop is {start}, {stop}; want 0 <= start <= stop <= n = {n}")
    if not 0 <= seed < MAX_KEY:
        raise ValueError(f"seed is {seed}; want 0 to 2^64 - 1")
    if not 0 <= epoch < MAX_KEY:
        raise ValueError(f"epoch is {epoch}; want 0 to 2^64 - 1")
    if out is None:
        if device != "cpu":
            _check_device(torch.device(device))
        out = torch.empty(stop - start, dtype=torch.int64, device=device)
    else:
        if not out.is_cpu:
            _check_device(out.device)
        if out.shape != (stop - start,) or out.dtype != torch.int64 or not out.is_contiguous():
            raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; want ({stop - start},) contiguous torch.int64")
    fill_permutation(out, n, seed=seed, epoch=epoch, start=start)
    return out


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; want cpu or cuda")
    if device.type == "cuda" and not _C.has_cuda:
        raise RuntimeError("device is 'cuda', but eventkern._C was built without CUDA; rebuild it where nvcc is found")


def fill_permutation(out: Tensor, n: int, *, seed: int, epoch: int, start: int, part: int = 0) -> None:
    """Fill out with the positions from start on, unchecked. Each part of an epoch has an order of its own: 0 is that of
    `permutation`, the others are for samplers that need more than one."""
    count, address = out.numel(), out.data_ptr()
    if out.is_cpu:
        _C.permutation_cpu(
            n, seed=seed, epoch=epoch, part=part, start=start, count=count, out=address,
            num_threads=torch.get_num_threads(),
        )  # fmt: skip
    else:
        _C.permutation_cuda(
            n, seed=seed, epoch=epoch, part=part, start=start, count=count, out=address, device=out.device.index,
            stream=torch.cuda.current_stream(out.device).cuda_stream,
        )  # fmt: skip
