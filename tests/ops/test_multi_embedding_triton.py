"""multi_embedding's Triton kernels against the reference and a float64 truth, on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from eventkern.ops import check_inputs, multi_embedding
from eventkern.ops.multi_embedding import reference

kernels = pytest.importorskip("eventkern.ops.multi_embedding.triton", reason="triton exists for Linux alone")

pytestmark = pytest.mark.triton

MIXED_SIZES = (60, 4097, 1, 2, 1000, 3, 17)
MODES = ("sum", "mean", "concat")
# The largest table that is small: all tables go one way, or each its own.
PATHS = {"multi_hot": 10_000, "segments": 0, "mixed": 60}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "SMALL_TABLE_ROWS", PATHS[request.param])
    return request.param


def make_ids(rows: int, sizes: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.int64) -> Tensor:
    columns = [torch.randint(0, size, (rows,), generator=generator) for size in sizes]
    return torch.stack(columns, -1).to(dtype)


def by_reference(
    ids: Tensor, weight: Tensor, sizes: tuple[int, ...], mode: str, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = weight.detach().requires_grad_()
    output = reference.multi_embedding(ids, leaf, sizes, mode)
    output.backward(upstream)
    return output.detach(), leaf.grad


def hit_sums(ids: Tensor, sizes: tuple[int, ...], upstream: Tensor) -> Tensor:
    """The gradient of the sum in float64, event by event; ids out of range add nothing."""
    gradient = torch.zeros(sum(sizes), upstream.shape[1], dtype=torch.float64)
    first_row = 0
    for column, size in enumerate(sizes):
        is_valid = (ids[:, column] >= 0) & (ids[:, column] < size)
        gradient.index_add_(0, ids[is_valid, column].long() + first_row, upstream[is_valid].double())
        first_row += size
    return gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "rows", "dim"), [(torch.float32, 97, 33), (torch.float16, 131, 64), (torch.bfloat16, 1, 5)]
)
def test_values_and_gradients_match_a_float64_truth(
    dtype, rows, dim, mode, path, triton_device, generator, assert_accurate
):
    sizes = MIXED_SIZES if path != "multi_hot" else MIXED_SIZES[2:]
    ids = make_ids(rows, sizes, generator).to(triton_device)
    weight = torch.randn(sum(sizes), dim, generator=generator).to(triton_device, dtype)
    width = dim * len(sizes) if mode == "concat" else dim
    upstream = torch.randn(rows, width, generator=generator).to(triton_device, dtype)
    actual = kernels.multi_embedding(ids, weight, sizes, mode)
    gradient = kernels.multi_embedding_backward(upstream, ids, sizes, mode)
    same_dtype = by_reference(ids, weight, sizes, mode, upstream)
    truth = by_reference(ids, weight.double(), sizes, mode, upstream.double())
    assert_accurate(actual, same_dtype[0], truth[0])
    assert_accurate(gradient, same_dtype[1], truth[1])


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_give_no_output_and_a_gradient_of_zeros(mode, path, triton_device):
    ids = torch.empty(0, 2, dtype=torch.int64, device=triton_device)
    output = kernels.multi_embedding(ids, torch.ones(70, 4, device=triton_device), (60, 10), mode)
    assert output.shape == (0, 8 if mode == "concat" else 4)
    gradient = kernels.multi_embedding_backward(output, ids, (60, 10), mode)
    assert gradient.equal(torch.zeros(70, 4, device=triton_device))


def test_every_id_equal_adds_all_upstream_rows(path, triton_device, generator, assert_accurate):
    """A run across 70 chunks and 3 splits, between rows that few events hit."""
    sizes, rows = (61, 3), 70 * 64 + 2065
    ids = torch.full((rows, 2), 1, dtype=torch.int32)
    ids[[5, 77, 4000], 0] = torch.tensor([0, 60, 2], dtype=torch.int32)
    upstream = torch.rand(rows, 16, generator=generator)
    truth = hit_sums(ids, sizes, upstream)
    same_dtype = by_reference(ids, torch.zeros(64, 16), sizes, "sum", upstream)[1]
    actual = kernels.multi_embedding_backward(upstream.to(triton_device), ids.to(triton_device), sizes, "sum").cpu()
    assert_accurate(actual, same_dtype, truth)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_and_dtypes_of_ids_do_not_matter(dtype, path, triton_device, generator):
    sizes = (60, 7, 70)
    ids = make_ids(40, sizes, generator, dtype).to(triton_device)
    weight = torch.randn(137, 8, generator=generator).to(triton_device)
    upstream = torch.randn(40, 8, generator=generator).to(triton_device)
    expected = kernels.multi_embedding(ids.long(), weight, sizes, "sum")
    expected_gradient = kernels.multi_embedding_backward(upstream, ids.long(), sizes, "sum")
    transposed = ids.t().contiguous().t()
    strided = torch.stack([ids, -ids], 2).flatten(1).repeat_interleave(2, 0)[::2, ::2]
    wide_weight, wide_upstream = (torch.cat([value, value], 1)[:, :8] for value in (weight, upstream))
    for form in (ids, transposed, strided):
        assert kernels.multi_embedding(form, wide_weight, sizes, "sum").equal(expected)
        assert kernels.multi_embedding_backward(wide_upstream, form, sizes, "sum").equal(expected_gradient)


@pytest.mark.parametrize("mode", MODES)
def test_an_id_out_of_range_is_a_row_of_nan_and_adds_nothing(mode, path, triton_device, generator):
    sizes = (61, 3)
    ids = make_ids(12, sizes, generator)
    wrong = {1: (0, -1), 2: (1, 3), 4: (0, 61), 6: (1, 2**32), 7: (0, 2**32 + 5), 9: (1, -(2**32)), 10: (0, 2**62)}
    for row, (column, value) in wrong.items():
        ids[row, column] = value
    weight = torch.randn(64, 5, generator=generator)
    output = kernels.multi_embedding(ids.to(triton_device), weight.to(triton_device), sizes, mode).cpu()
    assert output.isnan().all(1).nonzero().flatten().tolist() == list(wrong)
    assert output.isnan().any(1).nonzero().flatten().tolist() == list(wrong)
    torch.testing.assert_close(output, reference.multi_embedding(ids, weight, sizes, mode), equal_nan=True)
    upstream = torch.randn(output.shape, generator=generator)
    gradient = kernels.multi_embedding_backward(upstream.to(triton_device), ids.to(triton_device), sizes, mode)
    blocks = upstream.split(5, 1) if mode == "concat" else (upstream, upstream)
    truth = torch.cat([hit_sums(ids[:, c, None], sizes[c : c + 1], blocks[c]) for c in range(2)])
    truth = truth / 2 if mode == "mean" else truth
    torch.testing.assert_close(gradient.cpu().double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_more_tables_than_one_launch_takes(mode, path, triton_device, generator, assert_accurate):
    sizes = (1, 2, 3) * 21 + (61, 4)
    ids = make_ids(9, sizes, generator)
    ids[3, 64], ids[5, 63] = 4, -1
    weight = torch.randn(sum(sizes), 5, generator=generator)
    output = kernels.multi_embedding(ids.to(triton_device), weight.to(triton_device), sizes, mode).cpu()
    assert output.isnan().all(1).nonzero().flatten().tolist() == [3, 5]
    ids[3, 64] = ids[5, 63] = 0
    upstream = torch.randn(output.shape, generator=generator)
    output = kernels.multi_embedding(ids.to(triton_device), weight.to(triton_device), sizes, mode).cpu()
    gradient = kernels.multi_embedding_backward(upstream.to(triton_device), ids.to(triton_device), sizes, mode).cpu()
    same_dtype = by_reference(ids, weight, sizes, mode, upstream)
    truth = by_reference(ids, weight.double(), sizes, mode, upstream.double())
    assert_accurate(output, same_dtype[0], truth[0])
    assert_accurate(gradient, same_dtype[1], truth[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_hit_once_gets_the_very_bits_of_its_event(dtype, path, triton_device, generator):
    exponents = torch.randint(-12, 12, (97, 17), generator=generator)
    upstream = (torch.randn(97, 17, generator=generator) * 2.0**exponents).to(triton_device, dtype)
    ids = torch.randperm(97, generator=generator).to(triton_device)
    gradient = kernels.multi_embedding_backward(upstream, ids[:, None], (97,), "sum")
    assert gradient[ids].equal(upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sum", "concat"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_values_reach_the_rows_that_they_hit_alone(dtype, mode, path, triton_device, generator):
    sizes = (61, 3)
    ids = make_ids(50, sizes, generator)
    upstream = torch.randn(50, 10 if mode == "concat" else 5, generator=generator).to(dtype)
    for row, column, value in ((4, 0, torch.nan), (9, 1, torch.inf), (11, 2, -torch.inf), (30, 1, torch.inf)):
        upstream[row, column] = value
    ids[[13, 14], 0] = 7
    upstream[13, 3], upstream[14, 3] = torch.inf, -torch.inf
    blocks = upstream.split(5, 1) if mode == "concat" else (upstream, upstream)
    truth = torch.cat([hit_sums(ids[:, c, None], sizes[c : c + 1], blocks[c]) for c in range(2)])
    gradient = kernels.multi_embedding_backward(upstream.to(triton_device), ids.to(triton_device), sizes, mode)
    assert truth[7, 3].isnan()
    assert truth.isfinite().any()
    torch.testing.assert_close(gradient.cpu(), truth.to(dtype), equal_nan=True)


def test_a_repeat_run_is_bitwise_equal(path, triton_device, generator):
    sizes, rows = (61, 3, 17), 200_000 if triton_device.type == "cuda" else 300
    ids = make_ids(rows, sizes, generator, torch.int32).to(triton_device)
    upstream = torch.randn(rows, 16, generator=generator).to(triton_device)
    first, again = (kernels.multi_embedding_backward(upstream, ids, sizes, "mean") for _ in range(2))
    assert first.equal(again)


@pytest.mark.gpu
def test_on_cuda_values_match_and_bad_ids_are_nan(generator):
    ids = make_ids(1000, MIXED_SIZES, generator)
    weight = torch.randn(sum(MIXED_SIZES), 64, generator=generator)
    output = multi_embedding(ids.cuda(), weight.cuda(), MIXED_SIZES)
    torch.testing.assert_close(output.cpu(), multi_embedding(ids, weight, MIXED_SIZES))
    ids[7, 3] = 17
    assert multi_embedding(ids.cuda(), weight.cuda(), MIXED_SIZES).isnan().all(1).nonzero().flatten().tolist() == [7]
    with check_inputs(), pytest.raises(IndexError, match=r"ids\[\.\.\., 3\] holds 17"):
        multi_embedding(ids.cuda(), weight.cuda(), MIXED_SIZES)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_ids(generator):
    sizes = (3, 50, 4097)
    weight = torch.randn(sum(sizes), 64, generator=generator).cuda().requires_grad_()
    ids = make_ids(999, sizes, generator).cuda()

    def run():
        output = multi_embedding(ids, weight, sizes)
        return output, torch.autograd.grad(output.square().sum(), weight)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    ids.copy_(make_ids(999, sizes, generator))
    graph.replay()
    for replayed, eager in zip(captured, run(), strict=True):
        assert replayed.equal(eager)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, dim = 2**25 + 3, 64
    weight = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    weight[-3:] = torch.arange(3.0, device="cuda")[:, None] + 1
    weight.requires_grad_()
    ids = torch.arange(rows - 3, rows, device="cuda")[:, None]
    output = multi_embedding(ids, weight, (rows,))
    assert output[:, 0].tolist() == [1.0, 2.0, 3.0]
    output.backward(torch.ones_like(output))
    assert weight.grad[-4:, 5].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert weight.grad.sum(dtype=torch.float64).item() == 3 * dim
    del output, weight
    torch.cuda.empty_cache()
    many = torch.zeros(rows, 1, dtype=torch.int32, device="cuda")
    many[-1] = 1
    output = multi_embedding(
        many, torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16, device="cuda").expand(2, dim), (2,)
    )
    assert output.shape == (rows, dim)
    assert output[-1].tolist() == [1.0] * dim
    assert output.sum(dtype=torch.float64).item() == dim
