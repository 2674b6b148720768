"""multi_head_cross_entropy's Triton kernels against a float64 formula, on a GPU or in Triton's interpreter."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern.ops import check_inputs, multi_head_cross_entropy

kernels = pytest.importorskip("eventkern.ops.multi_head_cross_entropy.triton", reason="triton exists for Linux alone")

from eventkern.ops.multi_head_cross_entropy import triton_backward, triton_chunks, triton_tiles  # noqa: E402

pytestmark = pytest.mark.triton

MIXED_SIZES = (1, 2, 3, 17, 60, 1000)
IGNORED = -100
ALL = (True, True, True)
PATHS = ("whole", "split", "wide")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One program for each sum; several; or the path of wide rows, in chunks of 48 rows and few classes."""
    monkeypatch.setattr(triton_tiles, "MIN_STEPS", 1)
    monkeypatch.setattr(triton_tiles, "WANTED_PROGRAMS", 12 if request.param == "split" else 1)
    if request.param == "wide":
        monkeypatch.setattr(triton_backward, "WIDE_ROW_BYTES", {2: 0, 4: 0})
        monkeypatch.setattr(triton_chunks, "CHUNK_ROWS", 48)
        monkeypatch.setattr(triton_chunks, "CHUNK_BYTES", 48 * 6 * 300)
        resident = kernels.forward_constants
        monkeypatch.setattr(kernels, "forward_constants", lambda *shapes: {**resident(*shapes), "BLOCK_D": 16})
    return request.param


def make_targets(rows: int, sizes: tuple[int, ...], generator: torch.Generator, ignored_share: float = 0.3) -> Tensor:
    targets = torch.stack([torch.randint(0, size, (rows,), generator=generator) for size in sizes], -1)
    return targets.where(torch.rand(targets.shape, generator=generator) >= ignored_share, IGNORED)


def make_inputs(rows, dim, sizes, generator, dtype=torch.float32, device="cpu"):
    """hidden, weight, bias, targets, upstream gradients with a fifth of zeros."""
    hidden = torch.randn(rows, dim, generator=generator)
    weight = torch.randn(sum(sizes), dim, generator=generator) * (1.5 / math.sqrt(dim))
    bias = torch.randn(sum(sizes), generator=generator)
    upstream = torch.randn(rows, len(sizes), generator=generator)
    upstream *= torch.rand(upstream.shape, generator=generator) > 0.2
    tensors = [tensor.to(device, dtype) for tensor in (hidden, weight, bias)]
    return *tensors, make_targets(rows, sizes, generator).to(device), upstream.to(device)


def run(hidden, weight, bias, targets, upstream, sizes, ignore_index=IGNORED, smoothing=0.0, z_loss=0.0, needs=ALL):
    """(losses, log-sum-exps in nats, d_hidden, d_weight, d_bias) of the launchers."""
    options = (sizes, ignore_index, smoothing, z_loss)
    losses, log_sum_exp = kernels.multi_head_cross_entropy(hidden, weight, bias, targets, *options)
    needs = needs if bias is not None else (*needs[:2], False)
    gradients = kernels.multi_head_cross_entropy_backward(
        upstream, hidden, weight, bias, targets, log_sum_exp, *options, needs
    )
    return losses, log_sum_exp * math.log(2), *gradients


def formula(hidden, weight, bias, targets, upstream, sizes, smoothing, z_loss, dtype):
    """The same five by autograd: in float64 from the definition, else the plain model code in its own dtype."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    biases = leaves[2].split(sizes) if bias is not None else [None] * len(sizes)
    losses, log_sum_exps = [], []
    for head, table in enumerate(leaves[1].split(sizes)):
        logits = F.linear(leaves[0], table, biases[head])
        kept = targets[:, head] != IGNORED
        picked = targets[:, head].where(kept, 0)
        if dtype == torch.float64:
            log_sum_exp = logits.exp().sum(1).log()
            loss = log_sum_exp - (1 - smoothing) * logits.gather(1, picked[:, None])[:, 0]
            loss = loss - smoothing * logits.mean(1) if smoothing else loss
        else:
            logits = logits.float()
            log_sum_exp = logits.logsumexp(1)
            loss = F.cross_entropy(logits, picked, reduction="none", label_smoothing=smoothing)
        losses.append((loss + z_loss * log_sum_exp.square()).where(kept, 0))
        log_sum_exps.append(log_sum_exp)
    losses = torch.stack(losses, -1)
    losses.backward(upstream.to(losses.dtype))
    gradients = [leaf.grad for leaf in leaves]
    return losses.detach(), torch.stack(log_sum_exps, -1).detach(), *gradients


@pytest.mark.parametrize(
    ("dtype", "rows", "dim", "sizes", "smoothing", "z_loss", "has_bias"),
    [
        (torch.float32, 131, 33, MIXED_SIZES, 0.1, 0.01, True),
        (torch.float32, 67, 5, (1031,), 0.0, 0.01, False),
        (torch.float16, 127, 64, (1, 2, 300), 0.0, 0.0, True),
        (torch.float16, 53, 257, (1, 4) * 5, 0.1, 0.0, True),
        (torch.bfloat16, 61, 33, MIXED_SIZES, 0.0, 0.01, True),
        (torch.bfloat16, 67, 64, (1031,), 0.1, 0.01, False),
    ],
)
def test_values_and_gradients_match_the_float64_formula(
    dtype, rows, dim, sizes, smoothing, z_loss, has_bias, path, triton_device, generator, assert_accurate
):
    hidden, weight, bias, targets, upstream = make_inputs(rows, dim, sizes, generator, dtype, triton_device)
    bias = bias if has_bias else None
    inputs = (hidden, weight, bias, targets, upstream, sizes)
    actual = run(*inputs, smoothing=smoothing, z_loss=z_loss)
    same_dtype = formula(*inputs, smoothing, z_loss, dtype)
    truth = formula(*inputs, smoothing, z_loss, torch.float64)
    assert (actual[4] is None) != has_bias
    for one, own, true in zip(actual[: len(truth)], same_dtype, truth, strict=True):
        assert_accurate(one, own, true)
    for one, again in zip(actual, run(*inputs, smoothing=smoothing, z_loss=z_loss), strict=True):
        assert one is again is None or one.equal(again)


def test_all_rows_ignored_give_zero_losses_and_gradients_whatever_comes_from_upstream(path, triton_device, generator):
    hidden, weight, bias, targets, upstream = make_inputs(19, 33, (3, 140), generator, device=triton_device)
    targets.fill_(IGNORED)
    upstream.fill_(torch.nan)
    losses, _, *gradients = run(hidden, weight, bias, targets, upstream, (3, 140), smoothing=0.1, z_loss=0.01)
    for tensor in (losses, *gradients):
        assert tensor.count_nonzero() == 0


def test_an_ignored_class_that_exists_is_ignored(path, triton_device, generator):
    hidden, weight, bias, targets, upstream = make_inputs(41, 16, (3, 70), generator, device=triton_device)
    targets = targets.clamp(min=0)
    moved = targets.where(targets != 0, IGNORED)
    ignoring_zero = run(hidden, weight, bias, targets, upstream, (3, 70), ignore_index=0, smoothing=0.1)
    for one, other in zip(
        ignoring_zero, run(hidden, weight, bias, moved, upstream, (3, 70), smoothing=0.1), strict=True
    ):
        assert one.equal(other)
    assert ((ignoring_zero[0] == 0) == (targets == 0)).all()


@pytest.mark.parametrize("value", [-1, 70, 2**40])
def test_a_target_out_of_range_is_nan_and_adds_no_gradient(value, path, triton_device, generator):
    hidden, weight, bias, targets, upstream = make_inputs(41, 16, (3, 70), generator, device=triton_device)
    targets[7, 1] = IGNORED
    expected = run(hidden, weight, bias, targets, upstream, (3, 70))
    targets[7, 1] = value
    upstream[7, 1] = torch.nan
    losses, *others = run(hidden, weight, bias, targets, upstream, (3, 70))
    assert losses.isnan().nonzero().tolist() == [[7, 1]]
    assert losses.nan_to_num().equal(expected[0])
    for one, other in zip(others, expected[1:], strict=True):
        assert one.equal(other)


def test_extreme_logits_stay_finite(path, triton_device):
    hidden = torch.tensor([[1e4], [-1e4]], device=triton_device)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], device=triton_device)
    targets = torch.zeros(2, 1, dtype=torch.int64, device=triton_device)
    upstream = torch.ones(2, 1, device=triton_device)
    losses, log_sum_exp, d_hidden, d_weight, _ = run(hidden, weight, None, targets, upstream, (3,))
    assert losses[0].item() == 0
    torch.testing.assert_close(losses[1].item(), 2e4, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_sum_exp.cpu(), torch.full((2, 1), 1e4), rtol=1e-6, atol=0)
    assert d_hidden.tolist() == [[0.0], [-2.0]]
    assert d_weight.tolist() == [[1e4], [-1e4], [0.0]]


def test_classes_barred_by_their_bias_get_no_probability(path, triton_device, generator, assert_accurate):
    sizes, barred = (3, 200), slice(3, 140)  # more than the first tile of the second head
    hidden, weight, bias, targets, upstream = make_inputs(23, 16, sizes, generator, device=triton_device)
    targets = torch.where(targets == IGNORED, targets, targets.clamp(min=torch.tensor([0, 137], device=triton_device)))
    bias[barred] = -torch.inf
    inputs = (hidden, weight, bias, targets, upstream, sizes)
    actual = run(*inputs)
    own, truth = (formula(*inputs, 0.0, 0.0, dtype) for dtype in (torch.float32, torch.float64))
    for one, same_dtype, true in zip(actual, own, truth, strict=True):
        assert_accurate(one, same_dtype, true)
    assert actual[3][barred].count_nonzero() == 0


def test_strides_and_index_dtypes_change_nothing(path, triton_device, generator):
    hidden, weight, bias, targets, upstream = make_inputs(37, 33, (5, 150), generator, device=triton_device)
    expected = run(hidden, weight, bias, targets, upstream, (5, 150))
    wide_hidden = torch.cat([hidden, hidden + 1], 1)[:, :33]
    wide_weight = torch.cat([weight, weight + 1], 1)[:, :33]
    short_targets = targets.t().contiguous().t().to(torch.int32)
    spread_upstream = upstream[:, None, :].expand(-1, 3, -1).contiguous()[:, 1]
    assert not any(tensor.is_contiguous() for tensor in (wide_hidden, wide_weight, short_targets, spread_upstream))
    strided = run(wide_hidden, wide_weight, bias, short_targets, spread_upstream, (5, 150))
    for one, other in zip(strided, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_needed_are_made(needs, path, triton_device, generator):
    inputs = make_inputs(37, 16, (5, 150), generator, device=triton_device)
    everything = run(*inputs, (5, 150))[2:]
    for needed, one, other in zip(needs, run(*inputs, (5, 150), needs=needs)[2:], everything, strict=True):
        assert one.equal(other) if needed else one is None


def test_one_row_matches_the_float64_formula(path, triton_device, generator):
    inputs = make_inputs(1, 64, (1, 2, 300), generator, device=triton_device)
    targets = torch.tensor([[0, 1, 299]], device=triton_device)
    inputs = (*inputs[:3], targets, inputs[4] + 1, (1, 2, 300))
    truth = formula(*inputs, 0.1, 0.01, torch.float64)
    for one, true in zip(run(*inputs, smoothing=0.1, z_loss=0.01), truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=2e-6, atol=2e-6)


def test_no_rows(path, triton_device, generator):
    hidden, weight, bias, targets, upstream = make_inputs(0, 16, (5, 150), generator, device=triton_device)
    losses, log_sum_exp, d_hidden, d_weight, d_bias = run(hidden, weight, bias, targets, upstream, (5, 150))
    assert losses.shape == log_sum_exp.shape == (0, 2)
    assert d_hidden.shape == (0, 16)
    assert d_weight.shape == weight.shape
    assert d_weight.count_nonzero() == d_bias.count_nonzero() == 0


@pytest.mark.parametrize("columns", [1, 128, 300, 10_000])
@pytest.mark.parametrize("sizes", [(1031,), MIXED_SIZES, (1,) * 7])
def test_chunks_hold_whole_tiles_in_order(sizes, columns):
    chunks = triton_chunks.class_chunks(sizes, columns)
    assert chunks[0][0] == chunks[0][2] == 0
    assert chunks[-1][1] == triton_tiles.count_tiles(sizes, triton_chunks.BLOCK_V)
    assert chunks[-1][3] == sum(sizes)
    for chunk, following in pairwise(chunks):
        assert (chunk[1], chunk[3]) == (following[0], following[2])
    for first_tile, last_tile, first_class, last_class in chunks:
        assert last_tile > first_tile
        assert last_tile == first_tile + 1 or last_class - first_class <= columns


def test_partial_results_stay_bounded():
    steps = triton_tiles.steps_per_split(programs=1, steps=10_000, partial_bytes=2**26)
    assert steps == 5000  # two splits of 64 MiB
    assert triton_tiles.steps_per_split(programs=2048, steps=100, partial_bytes=1) == 100
    assert triton_tiles.steps_per_split(programs=1, steps=100, partial_bytes=1) == triton_tiles.MIN_STEPS


def test_tiles_pad_small_heads_little():
    assert triton_tiles.class_block((1000,) * 17, (128, 64)) == 128
    assert triton_tiles.class_block((4,) * 10 + (60,), (128, 64)) == 64


@pytest.mark.gpu
def test_on_cuda_values_match_and_bad_targets_are_nan(generator):
    hidden, weight = torch.randn(500, 64, generator=generator), torch.randn(sum(MIXED_SIZES), 64, generator=generator)
    targets = make_targets(500, MIXED_SIZES, generator)
    losses = multi_head_cross_entropy(hidden.cuda(), weight.cuda(), targets.cuda(), MIXED_SIZES)
    expected = multi_head_cross_entropy(hidden, weight, targets, MIXED_SIZES)
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-4, atol=1e-4)
    targets[7, 3] = 17
    arguments = (hidden.cuda(), weight.cuda(), targets.cuda(), MIXED_SIZES)
    losses = multi_head_cross_entropy(*arguments, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[7, 3]]
    with check_inputs(), pytest.raises(IndexError, match=r"targets\[\.\.\., 3\] holds 17"):
        multi_head_cross_entropy(*arguments)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_targets(generator):
    sizes = (3, 50, 4097)
    hidden = torch.randn(999, 64, generator=generator).cuda().requires_grad_()
    weight = torch.randn(sum(sizes), 64, generator=generator).cuda().requires_grad_()
    targets = make_targets(999, sizes, generator).cuda()

    def run():
        losses = multi_head_cross_entropy(hidden, weight, targets, sizes)
        return losses, *torch.autograd.grad(losses.sum(), (hidden, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    targets.copy_(make_targets(999, sizes, generator))
    graph.replay()
    for replayed, eager in zip(captured, run(), strict=True):
        assert replayed.equal(eager)


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_in_little_memory():
    rows, num_classes = 2**17, 2**14 + 5
    hidden = torch.zeros(rows, 16, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.zeros(num_classes, 16, dtype=torch.bfloat16, device="cuda").requires_grad_()
    targets = torch.full((rows, 1), num_classes - 1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = multi_head_cross_entropy(hidden, weight, targets, (num_classes,), reduction="none")
    losses.mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.02 * 2 * rows * num_classes
    torch.testing.assert_close(losses[-1].item(), torch.tensor(float(num_classes)).log().item())
    assert hidden.grad.count_nonzero() == 0
