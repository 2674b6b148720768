"""The order of an epoch: a keyed permutation that costs no memory."""

import torch
from torch import Tensor

from eventkern import _C

PERMUTATION_VERSION = 1
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
        if not 0 <= key < MAX_KEY:
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
    fill_permutation(out, n, seed=seed, epoch=epoch, start=start)
    return out


def fill_permutation(out: Tensor, n: int, *, seed: int, epoch: int, start: int, part: int = 0) -> None:
    """Fill out with the positions from start on, unchecked. Each part of an epoch has an order of its own: 0 is that of
    `permutation`, the others are for samplers that need more than one."""
    where = {"n": n, "seed": seed, "epoch": epoch, "part": part, "start": start, "count": len(out)}
    if out.is_cpu:
        _C.permutation_cpu(**where, out=out.data_ptr(), num_threads=torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(out.device).cuda_stream
        _C.permutation_cuda(**where, out=out.data_ptr(), device=out.device.index, stream=stream)
