"""Whoever hands addresses to the extension: right and hostile arguments, against the references in plain torch."""

import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import hostile
import torch
from torch import Tensor

from eventkern.data.permutation import permutation
from eventkern.data.sampler import IndexSampler
from eventkern.models.generation import ClassSampler
from eventkern.ops import attention, multi_embedding, multi_head_cross_entropy, use_reference

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64)
SIZES = (1, 2, 3, 17, 60, 300)
DIMS = (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 64, 130)
ROWS = (0, 1, 2, 3, 7, 17, 64, 131)
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def run(random: Random, folder: Path) -> str:
    torch.set_num_threads(random.choice((1, 1, 2)))
    torch.manual_seed(random.getrandbits(32))
    kind = random.choice((embed, embed, cross_entropy, cross_entropy, attend, attend, draw, permute, sample))
    return f"ops: {kind.__name__} {kind(random)}"


def is_hostile(random: Random, share: float = 0.08) -> bool:
    return random.random() < share


def shape_of(random: Random, *last: int) -> tuple[int, ...]:
    lead = random.choice(((random.choice(ROWS),), (2, random.choice(ROWS)), (random.choice((0, 1, 3)), 1, 5), ()))
    return (*lead, *last)


def laid_out(random: Random, tensor: Tensor) -> Tensor:
    """The same values in other strides, at times at an odd place of its memory."""
    kind = random.randrange(5)
    if tensor.dim() == 0 or kind < 2:
        return tensor
    if kind == 2:  # one more of everything, of which a part is read
        wide = tensor.new_zeros([size + 1 for size in tensor.shape])
        part = wide[tuple(slice(1, None) for _ in tensor.shape)]
        return part.copy_(tensor)
    if kind == 3:
        order = random.sample(range(tensor.dim()), tensor.dim())
        back = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    step = tensor.new_zeros([*tensor.shape[:-1], 2 * tensor.shape[-1]])[..., ::2]
    return step.copy_(tensor)


def compare(
    random: Random, call: Callable[..., Tensor], tensors: list[Tensor | None], dtype: torch.dtype, has_gradient: bool
) -> str:
    """The call's outcome and gradients against those of the reference, errors by their class."""
    results = []
    for context in (None, use_reference):
        inputs = [
            tensor.detach().requires_grad_(tensor.is_floating_point() and has_gradient)
            if isinstance(tensor, Tensor)
            else tensor
            for tensor in tensors
        ]

        def measure(inputs: list[Tensor | None] = inputs) -> list[Tensor]:
            out = call(*inputs)
            wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
            if not has_gradient or not out.requires_grad:
                return [out]
            upstream = torch.linspace(0.5, 1.5, out.numel()).view(out.shape).to(out.dtype)
            gradients = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
            return [out, *(gradient for gradient in gradients if gradient is not None)]

        if context is None:
            results.append(hostile.outcome(measure))
        else:
            with context():
                results.append(hostile.outcome(measure))
    ours, theirs = results
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"ours: {ours!r}; the reference: {theirs!r}"
        assert str(ours) == str(theirs)
        return hostile.told(ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        bound = ERRORS[dtype] * (1 + other.detach().double().abs().max().item()) if other.numel() else 0
        difference = (one.detach().double() - other.detach().double()).abs()
        assert difference.numel() == 0 or difference.max().item() <= bound, f"{difference.max()} above {bound}"
    return "right"


def embed(random: Random) -> str:
    sizes = [random.choice(SIZES) for _ in range(random.choice((1, 2, 3, 6, 17)))]
    dim, dtype = random.choice(DIMS), random.choice(FLOATS)
    shape = shape_of(random)
    ids = torch.stack([torch.randint(size, shape) for size in sizes], -1)
    ids = laid_out(random, ids.to(random.choice((torch.int32, torch.int64))))
    weight = laid_out(random, torch.randn(sum(sizes), dim).to(dtype))
    mode: Any = random.choice(("sum", "mean", "concat"))
    if ids.numel() and is_hostile(random, 0.2):
        bad = [n for n in hostile.INTEGERS if torch.iinfo(ids.dtype).min <= n <= torch.iinfo(ids.dtype).max]
        place = tuple(random.randrange(size) for size in ids.shape)
        ids = ids.clone()
        ids[place] = random.choice(bad)
    told: Any = tuple(sizes)
    if is_hostile(random):
        told = random.choice((told[1:], (*told, 1), [], (0, *told[1:]), (-1, *told[1:]), (*told[:-1], 2**62)))
    if is_hostile(random):
        ids = random.choice((ids.to(random.choice(OTHERS)), ids[..., :-1], ids.reshape(-1), ids[..., :0]))
    if is_hostile(random):
        weight = random.choice((weight.to(random.choice(OTHERS)), weight[:-1], weight[:, :0], weight[0], weight.t()))
    if is_hostile(random):
        mode = random.choice(("", "SUM", "max"))
    has_gradient = dtype == torch.float32 and random.random() < 0.5
    return compare(
        random, lambda ids, weight: multi_embedding(ids, weight, told, mode=mode), [ids, weight], dtype, has_gradient
    )


def cross_entropy(random: Random) -> str:
    sizes = [random.choice(SIZES) for _ in range(random.choice((1, 2, 3, 6, 17)))]
    dim, dtype, shape = random.choice(DIMS), random.choice(FLOATS), shape_of(random)
    hidden = laid_out(random, torch.randn(*shape, dim).to(dtype))
    weight = laid_out(random, torch.randn(sum(sizes), dim).to(dtype) / dim**0.5)
    bias = laid_out(random, torch.randn(sum(sizes)).to(dtype)) if random.random() < 0.5 else None
    ignored = random.choice((-100, 0, 1, 2**31 - 1, -(2**31)))
    targets = torch.stack([torch.randint(size, shape) for size in sizes], -1)
    targets = torch.where(torch.rand(targets.shape) < random.choice((0.0, 0.3, 1.0)), ignored, targets)
    targets = laid_out(random, targets.to(random.choice((torch.int32, torch.int64))))
    if targets.numel() and is_hostile(random, 0.2):
        limits = torch.iinfo(targets.dtype)
        place = tuple(random.randrange(size) for size in targets.shape)
        targets = targets.clone()
        targets[place] = random.choice([n for n in hostile.INTEGERS if limits.min <= n <= limits.max])
    told: Any = tuple(sizes)
    options: dict[str, Any] = {
        "ignore_index": ignored,
        "label_smoothing": random.choice((0.0, 0.1, 1.0)),
        "z_loss": random.choice((0.0, 1e-3)),
        "reduction": random.choice(("mean", "sum", "none")),
    }
    if is_hostile(random):
        told = random.choice((told[1:], (*told, 1), (), (0, *told[1:]), (*told[:-1], 2**62)))
    if is_hostile(random):
        weight = random.choice((weight.to(random.choice(OTHERS)), weight[:-1], weight[:, :0], weight[0]))
    if is_hostile(random):
        hidden = random.choice((hidden.to(random.choice(OTHERS)), hidden[..., :-1], hidden[..., 0], hidden.reshape(-1)))
    if is_hostile(random):
        targets = random.choice((targets.to(random.choice(OTHERS)), targets[..., :-1], targets.reshape(-1)))
    if bias is not None and is_hostile(random):
        bias = random.choice((bias.to(random.choice(OTHERS)), bias[:-1], bias[None]))
    if is_hostile(random):
        options["label_smoothing"] = random.choice((-0.1, 1.1, float("nan"), float("inf")))
    if is_hostile(random):
        options["z_loss"] = random.choice((-0.1, float("nan")))
    if is_hostile(random):
        options["reduction"] = random.choice(("", "max"))
    has_gradient = dtype == torch.float32 and random.random() < 0.5

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        return multi_head_cross_entropy(hidden, weight, targets, told, bias=bias, **options)

    return compare(random, call, [hidden, weight, bias, targets], dtype, has_gradient)


def attend(random: Random) -> str:
    batch, heads, dtype = random.choice((0, 1, 2)), random.choice((1, 2, 3)), random.choice(FLOATS)
    head_dim, num_queries = random.choice((1, 4, 8, 16, 32, 33)), random.choice((0, 1, 2, 15, 16, 17, 63, 130))
    is_causal = random.random() < 0.4
    num_keys = max(num_queries, 1) if is_causal else random.choice((1, 2, 15, 16, 17, 33, 100))
    lengths = (num_queries, num_keys, num_keys)
    tensors = [laid_out(random, torch.randn(batch, heads, length, head_dim).to(dtype)) for length in lengths]
    if is_hostile(random, 0.15):
        place = random.randrange(3)
        tensor = tensors[place]
        tensors[place] = random.choice(
            (
                tensor.to(random.choice(OTHERS)),
                tensor[:, :, :0],
                tensor[..., :0],
                tensor[0] if batch else tensor[..., 0],
            )
        )
        tensors[place] = random.choice((tensors[place], tensor[:, :, 1:], tensor[:, :-1], tensor[..., :-1]))
    has_gradient = dtype == torch.float32 and random.random() < 0.5
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        has_gradient = False
    return compare(random, lambda *qkv: attention(*qkv, is_causal=is_causal), tensors, dtype, has_gradient)


def draw(random: Random) -> str:
    """Classes are always some that may be drawn; where logits are finite, those that torch's operations draw."""
    sizes = tuple(random.choice((2, 3, 17, 60, 300, 1_000)) for _ in range(random.choice((1, 2, 5))))
    rows, dtype = random.choice((0, 1, 2, 17)), random.choice(FLOATS)
    logits = laid_out(random, (torch.randn(rows, sum(sizes)) * random.choice((1, 50))).to(dtype))
    is_broken = logits.numel() > 0 and is_hostile(random, 0.3)
    if is_broken:
        logits = logits.clone()
        for _ in range(random.choice((1, 5, 500))):
            place = random.randrange(rows), random.randrange(sum(sizes))
            logits[place] = random.choice((float("nan"), float("inf"), float("-inf"), 3e38))
    uniforms: Any = laid_out(random, torch.rand(rows, len(sizes)))
    temperature, top_k = (
        random.choice((0.0, 1e-31, 1e-20, 0.5, 1.0, 1e30)),
        random.choice((None, 1, 2, 5, 40, 2_000, 2**62)),
    )
    told: Any = sizes
    if is_hostile(random):
        temperature = random.choice(hostile.FLOATS)
    if is_hostile(random):
        top_k = hostile.integer(random)
    if is_hostile(random):
        told = random.choice(((), sizes[1:], (*sizes, 2), (1, *sizes[1:]), (2**40, *sizes[1:])))
    if is_hostile(random):
        uniforms = random.choice((None, uniforms[:-1], uniforms.double(), uniforms[..., :0], uniforms * float("nan")))
    allow_missing = random.random() < 0.5
    drawn = hostile.outcome(lambda: ClassSampler(told, temperature, top_k, allow_missing)(logits, uniforms))
    if isinstance(drawn, Exception):
        return hostile.told(drawn)
    assert drawn.dtype == torch.int32
    assert drawn.shape == (rows, len(sizes))
    least = torch.tensor([2 if not allow_missing and size > 2 else 1 for size in sizes])
    assert ((drawn >= least) & (drawn < torch.tensor(sizes))).all()
    if not is_broken and temperature == 0:
        starts = [0, *itertools.accumulate(sizes)]
        for head, size in enumerate(sizes):
            first = int(least[head])
            of_head = logits[:, starts[head] + first : starts[head] + size].float()
            assert (of_head.gather(1, drawn[:, head : head + 1].long() - first)[:, 0] == of_head.amax(1)).all()
    return "right"


def permute(random: Random) -> str:
    n = random.choice((1, 2, 3, 255, 256, 257, 4_095, 4_096, 4_097))
    seed, epoch = random.getrandbits(64), random.choice((0, 1, 2**64 - 1))
    if is_hostile(random, 0.4):
        n, seed = hostile.integer(random), hostile.integer(random)
        start, stop = hostile.integer(random), random.choice((None, hostile.integer(random)))
        if random.random() < 0.2:
            n = random.choice(hostile.JUNK)
        is_index = isinstance(n, int) and isinstance(stop if stop is not None else n, int)
        if is_index and (n if stop is None else stop) - start > 100_000 and start >= 0:
            stop = start + 100
        out = random.choice((None, torch.empty(100, dtype=torch.int64), torch.empty(100), torch.empty(200)[::2].long()))
        result = hostile.outcome(lambda: permutation(n, seed=seed, start=start, stop=stop, out=out))
        if isinstance(result, Tensor):
            assert ((result >= 0) & (result < n)).all()
            assert len(result.unique()) == len(result)
        return hostile.told(result)
    order = permutation(n, seed=seed, epoch=epoch)
    assert order.sort().values.equal(torch.arange(n))
    start = random.randrange(n + 1)
    stop = random.randint(start, n)
    assert permutation(n, seed=seed, epoch=epoch, start=start, stop=stop).equal(order[start:stop])
    return "right"


def sample(random: Random) -> str:
    """A sampler of hostile sizes is refused, or gives every index once."""
    sizes = [random.choice((0, 1, 97, 500)), random.choice((1, 8, 97, 1_000))]
    options: dict[str, Any] = {"seed": random.getrandbits(63), "shuffle": random.random() < 0.7}
    if is_hostile(random, 0.3):
        sizes[random.randrange(2)] = random.choice((*hostile.INTEGERS, *hostile.JUNK))
    if is_hostile(random, 0.3):
        options[random.choice(("seed", "rank", "world_size", "window"))] = hostile.integer(random)
    made = hostile.outcome(lambda: IndexSampler(*sizes, **options))
    if isinstance(made, Exception):
        return hostile.told(made)
    if made.num_samples > 10_000:
        return "right"
    seen = sorted(itertools.chain.from_iterable(batch.tolist() for batch in made))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(made.num_samples))
    assert made.world_size > 1 or len(seen) == made.num_samples
    return "right"
