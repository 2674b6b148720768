"""multi_embedding against a float64 loop over tables: values, gradients, errors, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern.ops import check_inputs, implementations, multi_embedding, switches, use_reference
from eventkern.ops.multi_embedding import reference

MIXED_SIZES = (1, 2, 3, 17, 60, 1000, 4097)


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
    with check_inputs(), check_inputs(), use_reference():
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


def test_compiled_equals_eager_and_repeats_bitwise(generator):
    sizes = (3, 50, 7)
    weight = torch.randn(sum(sizes), 16, generator=generator)

    def run(function, ids):
        leaf = weight.clone().requires_grad_()
        output = function(ids, leaf, sizes)
        output.square().sum().backward()
        return output.detach(), leaf.grad

    torch.compiler.reset()
    compiled = torch.compile(multi_embedding, fullgraph=True, dynamic=True)
    for rows in (5, 33, 128):
        ids = make_ids(rows, sizes, generator)
        eager = run(multi_embedding, ids)
        again = run(multi_embedding, ids)
        for value, repeated, lowered in zip(eager, again, run(compiled, ids), strict=True):
            assert value.equal(repeated)
            torch.testing.assert_close(lowered, value, rtol=1e-5, atol=1e-5)


def test_the_reference_route_gives_the_same_values(generator):
    ids = make_ids(40, (4, 5), generator)
    weight = torch.randn(9, 8, generator=generator)
    with use_reference():
        by_reference = multi_embedding(ids, weight, (4, 5))
    torch.testing.assert_close(multi_embedding(ids, weight, (4, 5)), by_reference)
    assert implementations()["multi_embedding"]["mps"] == "reference"


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
