"""MultiEmbedding: packing, views, initial variance."""

import pytest
import torch

from eventkern.nn import MultiEmbedding


@pytest.mark.parametrize(("mode", "width"), [("sum", 4), ("mean", 4), ("concat", 12)])
def test_forward_combines_its_tables(mode, width, generator):
    module = MultiEmbedding((2, 3, 5), 4, mode=mode)
    ids = torch.tensor([[1, 2, 4], [0, 0, 0]])
    rows = torch.stack([module.table(c)[ids[:, c]] for c in range(3)], 1)
    expected = {"sum": rows.sum(1), "mean": rows.mean(1), "concat": rows.flatten(1)}[mode]
    assert expected.shape == (2, width)
    torch.testing.assert_close(module(ids), expected)


def test_a_table_is_a_view_of_the_packed_weight():
    module = MultiEmbedding((2, 3), 4)
    with torch.no_grad():
        module.table(1)[2].fill_(7.0)
    assert module.weight[4].tolist() == [7.0] * 4
    assert module.table(1).data_ptr() == module.weight[2:].data_ptr()


@pytest.mark.parametrize("mode", ["sum", "mean", "concat"])
def test_output_starts_with_unit_variance(mode):
    torch.manual_seed(3)
    module = MultiEmbedding((200,) * 17, 64, mode=mode)
    output = module(torch.randint(0, 200, (500, 17)))
    assert abs(output.std().item() - 1.0) < 0.05
