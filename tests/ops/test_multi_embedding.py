"""multi_embedding against a float64 loop over tables: values, gradients, errors, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eventkern.nn import MultiEmbedding
from eventkern.ops import check_inputs, implementations, multi_embedding, switches, use_reference
from eventkern.ops.multi_embedding import reference

MIXED_SIZES = (1, 2, 3, 17, 60, 1000, 4097)
LARGE_SIZES = (3, 20_000, 2)  # the large one's float32 sums take more than the 4 MiB that csrc keeps in cache


def make_ids(rows: int, sizes: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.int64) -> Tensor:
    columns = [torch.randint(0, size, (rows,), generator=generator) for size in sizes]
    return torch.stack(columns, -1).to(dtype)


def loop_of_tables(ids: Tensor, weight: Tensor, sizes: tuple[int, ...], mode: str) -> Tensor:
    """The plain model code: one F.embedding per table."""
    rows = torch.stack([F.embedding(ids[..., c], table) for c, table in enumerate(weight.split(sizes))], -2)
    return {"sum": rows.sum(-2), "mean": rows.mean(-2), "concat": rows.flatten(-2)}[mode]


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 5), (97, 7), (257, 64)])
def test_values_and_gradients_match_a_float64_loop(rows, dim, dtype, mode, generator, assert_accurate):
    ids = make_ids(rows, MIXED_SIZES, generator)
    weight = torch.randn(sum(MIXED_SIZES), dim, generator=generator).to(dtype)
    results = []
    for run_dtype, function in ((dtype, multi_embedding), (dtype, loop_of_tables), (torch.float64, loop_of_tables)):
        leaf = weight.detach().to(run_dtype, copy=True).requires_grad_()
        output = (
            function(ids, leaf, MIXED_SIZES, mode=mode)
            if function is multi_embedding
            else function(ids, leaf, MIXED_SIZES, mode)
        )
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(run_dtype)
        output.backward(upstream)
        results.append((output.detach(), leaf.grad))
    for actual, same_dtype, truth in zip(*results, strict=True):
        assert_accurate(actual, same_dtype, truth)


def test_an_accumulation_in_bfloat16_would_fail_the_judge(generator, assert_accurate):
    sizes = (3,) * 512
    ids = make_ids(31, sizes, generator)
    weight = (1 + torch.randn(sum(sizes), 16, generator=generator)).to(torch.bfloat16)
    truth = loop_of_tables(ids, weight.double(), sizes, "sum")
    same_dtype = multi_embedding(ids, weight, sizes)
    in_bfloat16 = torch.zeros(31, 16, dtype=torch.bfloat16)
    for column, table in enumerate(weight.split(sizes)):
        in_bfloat16 = in_bfloat16 + table[ids[:, column]]
    with pytest.raises(AssertionError, match="torch's own"):
        assert_accurate(in_bfloat16, same_dtype, truth)


def test_every_id_equal_adds_all_upstream_rows(generator):
    ids = torch.full((301, 2), 1)
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    upstream = torch.randn(301, 4, generator=generator, dtype=torch.float64)
    multi_embedding(ids, weight, (2, 3)).backward(upstream.float())
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[[1, 3]] = upstream.sum(0)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_leading_shapes_and_strides_are_those_of_the_ids(dtype, generator):
    ids = make_ids(24, (5, 7, 2), generator, dtype)
    weight = torch.randn(14, 6, generator=generator)
    expected = loop_of_tables(ids, weight, (5, 7, 2), "sum")
    torch.testing.assert_close(multi_embedding(ids.view(2, 3, 4, 3), weight, (5, 7, 2)), expected.view(2, 3, 4, 6))
    torch.testing.assert_close(multi_embedding(ids.t().contiguous().t(), weight, (5, 7, 2)), expected)
    torch.testing.assert_close(multi_embedding(ids[3], weight.t().contiguous().t(), (5, 7, 2)), expected[3])
    torch.testing.assert_close(multi_embedding(ids[::2], weight, (5, 7, 2)), expected[::2])


@pytest.mark.parametrize("value", [-1, 3])
@pytest.mark.parametrize("checked", ["cpu", "check_inputs"])
def test_an_id_out_of_range_is_named(value, checked):
    ids = torch.zeros(4, 2, 3, dtype=torch.int32)
    ids[2, 1, 1] = value
    message = rf"ids\[\.\.\., 1\] holds {value}, but table 1 has 3 rows"
    with pytest.raises(IndexError, match=message):
        multi_embedding(ids, torch.ones(9, 2), (3, 3, 3))
    if checked == "check_inputs":
        with check_inputs(), pytest.raises(IndexError, match=message):
            multi_embedding(ids, torch.ones(9, 2), (3, 3, 3))


def test_checks_and_the_reference_route_end_with_their_block():
    with check_inputs(), use_reference():
        with check_inputs(), use_reference():
            pass
        assert (switches.is_check_forced(), switches.is_reference_forced()) == (True, True)
    assert (switches.is_check_forced(), switches.is_reference_forced()) == (False, False)


def test_an_id_out_of_range_is_nan_where_nothing_checks():
    ids = torch.tensor([[0, 3], [-1, 1], [1, 2]])
    output = reference.multi_embedding(ids, torch.ones(5, 2), (2, 3), "sum")
    assert output.isnan().all(1).tolist() == [True, True, False]
    assert output[2].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(2, 2)}, TypeError, "ids is torch.float32"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"ids has shape \(2, 3\); want \(\.\.\., 2\)"),
        ({"weight": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "weight is torch.int64"),
        ({"weight": torch.zeros(5, 2, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        ({"weight": torch.zeros(5, 0)}, ValueError, "want at least one column"),
        ({"weight": torch.zeros(6, 2)}, ValueError, r"weight has shape \(6, 2\); want \(5, D\)"),
        ({"weight": torch.zeros(5, 2, device="meta")}, ValueError, "ids is on cpu, but weight on meta"),
        ({"table_sizes": (5, 0)}, ValueError, "one positive size per table"),
        ({"mode": "max"}, ValueError, "mode is 'max'; want one of sum, mean, concat"),
    ],
)
def test_each_wrong_argument_is_named(change, error, message):
    arguments = {
        "ids": torch.zeros(2, 2, dtype=torch.int64), "weight": torch.zeros(5, 2), "table_sizes": (2, 3), "mode": "sum",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        multi_embedding(**{**arguments, **change})


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
def test_gradcheck_of_the_reference(mode, generator):
    ids = make_ids(6, (2, 3, 4), generator)
    weight = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: reference.multi_embedding(ids, w, (2, 3, 4), mode), weight)


def test_output_keeps_the_weight_dtype_under_autocast(generator):
    ids = make_ids(9, (4, 5), generator)
    weight = torch.randn(9, 8, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = multi_embedding(ids, weight, (4, 5))
    assert output.dtype == torch.float32
    assert output.equal(multi_embedding(ids, weight, (4, 5)))


def gradient(ids: Tensor, weight: Tensor, sizes: tuple[int, ...], mode: str = "sum") -> Tensor:
    """The gradient of weight under uneven upstream gradients, the same for the same shapes."""
    leaf = weight.detach().clone().requires_grad_()
    output = multi_embedding(ids, leaf, sizes, mode=mode)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    return torch.autograd.grad(output, leaf, upstream)[0]


@pytest.fixture
def num_threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [MIXED_SIZES, LARGE_SIZES, (5,)], ids=["mixed", "large", "one"])
def test_any_number_of_threads_gives_the_same_bits(sizes, dtype, mode, generator, num_threads):
    ids = make_ids(2003, sizes, generator)
    weight = torch.randn(sum(sizes), 72, generator=generator).to(dtype)
    results = []
    for threads in (1, 2, 5):  # more threads than tables: columns are split too
        num_threads(threads)
        results.append((multi_embedding(ids, weight, sizes, mode=mode), gradient(ids, weight, sizes, mode)))
    for output, grad in results[1:]:
        assert output.equal(results[0][0])
        assert grad.equal(results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 7, 1500])
def test_a_large_table_gets_every_gradient_and_zeros_elsewhere(rows, dtype, generator, assert_accurate):
    ids = make_ids(rows, LARGE_SIZES, generator)
    ids[: rows // 2, 1] = 19_999
    weight = torch.randn(sum(LARGE_SIZES), 65, generator=generator).to(dtype)
    leaves = [weight.to(torch.float64).requires_grad_(), weight.clone().requires_grad_()]
    for leaf in leaves:
        output = loop_of_tables(ids, leaf, LARGE_SIZES, "sum")
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(leaf.dtype))
    actual = gradient(ids, weight, LARGE_SIZES)
    assert_accurate(actual, leaves[1].grad, leaves[0].grad)
    used = torch.cat([ids[:, 0], ids[:, 1] + 3, ids[:, 2] + 20_003])
    assert actual.any(1).nonzero().flatten().tolist() == used.unique().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_survives_a_lookup(dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(2048, 32)
    output = multi_embedding(torch.arange(2048)[:, None], weight, (2048,))
    assert output.isnan().equal(weight.isnan())
    assert output[~weight.isnan()].equal(weight[~weight.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_round_to_nearest_even(dtype, generator):
    bits = torch.randint(-(2**15), 2**15, (2 * 4096, 32), generator=generator).to(torch.int16)
    weight = bits.view(dtype)
    output = multi_embedding(torch.arange(4096)[:, None].expand(-1, 2), weight, (4096, 4096))
    expected = (weight[:4096].float() + weight[4096:].float()).to(dtype)
    assert output.isnan().equal(expected.isnan())
    assert output[~expected.isnan()].equal(expected[~expected.isnan()])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    rows=st.integers(0, 70), dim=st.integers(1, 200), mode=st.sampled_from(["sum", "mean", "concat"]),
    is_column_major=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape_matches_the_loop(sizes, rows, dim, mode, is_column_major, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = make_ids(rows, sizes, generator, torch.int32)
    ids = ids.t().contiguous().t() if is_column_major else ids
    weight = torch.randn(sum(sizes), dim, generator=generator)
    truth = weight.double().requires_grad_()
    output = loop_of_tables(ids, truth, sizes, mode)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).double())
    torch.testing.assert_close(multi_embedding(ids, weight, sizes, mode=mode), output.detach().float())
    torch.testing.assert_close(gradient(ids, weight, sizes, mode), truth.grad.float(), rtol=1e-5, atol=1e-5)


def test_one_weight_used_twice_adds_both_gradients(generator):
    sizes = (5, 7)
    weight = torch.randn(12, 8, generator=generator).requires_grad_()
    first, second = make_ids(20, sizes, generator), make_ids(30, sizes, generator)
    (multi_embedding(first, weight, sizes).sum() + 2 * multi_embedding(second, weight, sizes).sum()).backward()
    counts = torch.zeros(12)
    for ids, factor in ((first, 1.0), (second, 2.0)):
        counts.index_add_(0, (ids + torch.tensor([0, 5])).flatten(), torch.full((ids.numel(),), factor))
    torch.testing.assert_close(weight.grad, counts[:, None].expand(-1, 8))


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
def test_the_gradient_has_a_gradient(mode, generator):
    sizes = (3, 50, 7)
    ids = make_ids(33, sizes, generator)
    results = []
    for function in (multi_embedding, loop_of_tables):
        weight = torch.randn(60, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = function(ids, weight, sizes, mode=mode)
        (first,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
        results.append((first.detach(), torch.autograd.grad(first.square().sum(), weight)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
def test_opcheck(mode, generator):
    sizes = (3, 50, 7)
    ids = make_ids(33, sizes, generator)
    weight = torch.randn(60, 16, generator=generator).requires_grad_()
    width = 48 if mode == "concat" else 16
    grad = torch.randn(33, width, generator=generator).requires_grad_()
    operators = torch.ops.eventkern
    torch.library.opcheck(operators.multi_embedding.default, (ids, weight, list(sizes), mode, False))
    torch.library.opcheck(operators.multi_embedding_backward.default, (grad, ids, list(sizes), mode))


def test_compiled_equals_eager_and_does_not_compile_again_for_more_rows(generator):
    sizes = (3, 50, 7)
    weight = torch.randn(sum(sizes), 16, generator=generator)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._inductor.compile(graph, inputs)

    def run(function, ids):
        leaf = weight.clone().requires_grad_()
        output = function(ids, leaf, sizes)
        output.square().sum().backward()
        return output.detach(), leaf.grad

    torch.compiler.reset()
    compiled = torch.compile(multi_embedding, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 33, 128):
        ids = make_ids(rows, sizes, generator)
        eager, again = run(multi_embedding, ids), run(multi_embedding, ids)
        for value, repeated, lowered in zip(eager, again, run(compiled, ids), strict=True):
            assert value.equal(repeated)
            assert lowered.equal(value)
    assert len(compilations) == 1
    ids[3, 2] = 7
    with pytest.raises(IndexError, match="table 2 has 7 rows"):
        compiled(ids, weight, sizes)


def test_the_reference_route_gives_the_same_values(generator, monkeypatch):
    ids = make_ids(40, (4, 5), generator)
    weight = torch.randn(9, 8, generator=generator)
    calls = []
    real = reference.multi_embedding
    monkeypatch.setattr(reference, "multi_embedding", lambda *args: calls.append(args) or real(*args))
    expected = multi_embedding(ids, weight, (4, 5))
    assert not calls
    with use_reference():
        by_reference = multi_embedding(ids, weight, (4, 5))
        with pytest.raises(IndexError, match="table 1 has 5 rows"):
            multi_embedding(ids + torch.tensor([0, 5]), weight, (4, 5))
    assert len(calls) == 1
    torch.testing.assert_close(by_reference, expected)


def test_compiled_code_sees_the_reference_route(generator):
    ids = make_ids(40, (4, 5), generator)
    weight = torch.randn(9, 8, generator=generator)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(multi_embedding, fullgraph=True, backend=backend)
    compiled(ids, weight, (4, 5))
    with use_reference():
        compiled(ids, weight, (4, 5))
    assert ["eventkern.multi_embedding" in graph for graph in graphs] == [True, False]


def test_implementations_are_told():
    assert implementations()["multi_embedding"] == {"cpu": "C++", "cuda": "Triton", "mps": "reference"}


def test_distributed_data_parallel_reduces_its_gradient(generator, tmp_path):
    module = MultiEmbedding((4, 5), 8)
    ids = make_ids(20, (4, 5), generator)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(module)(ids).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    distributed, module.weight.grad = module.weight.grad, None
    module(ids).square().sum().backward()
    assert distributed.equal(module.weight.grad)
