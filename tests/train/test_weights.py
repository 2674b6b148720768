"""The format is that of safetensors: its own library reads what was written."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import load

from eventkern.train.weights import DTYPES, write_safetensors


def written(weights: dict[str, torch.Tensor], **metadata: str) -> bytes:
    file = io.BytesIO()
    write_safetensors(weights, metadata, file)
    return file.getvalue()


def test_every_dtype_and_shape_is_read_back_bitwise() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = {
        f"{name} {shape}": torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        for dtype, name in DTYPES.items()
        for shape in ((), (0,), (3,), (5, 0, 2), (7, 3))
    }
    weights["a transposed one"] = torch.randn(5, 7, generator=generator).T
    weights["a name \u2192 in UTF-8"] = torch.randn(3, generator=generator).requires_grad_()
    read = load(written(weights, note="\u2192"))
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def test_every_tensor_starts_at_a_multiple_of_its_element() -> None:
    data = written({"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(1)})
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8 + length :] == b"\0\0\x80\x3f" + b"\x80\x3f" * 3 + b"\1" * 3


def test_shared_weights_are_there_under_every_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    other = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    other.load_state_dict(load(written(model.state_dict())))
    assert torch.equal(other[1].weight, model[0].weight)


def test_what_the_format_does_not_hold_is_named() -> None:
    for value, told in (
        (torch.zeros(2, dtype=torch.complex128), "is of torch.complex128, but safetensors are written of torch"),
        (torch.zeros(2, 2).to_sparse(), r"is torch.sparse_coo on cpu, but safetensors hold dense tensors with data"),
        (torch.zeros(2, device="meta"), r"is torch.strided on meta, but safetensors hold dense tensors with data"),
        ({"scale": 2.0}, "is of type dict, but safetensors hold tensors alone"),
    ):
        with pytest.raises(TypeError, match=rf"weights\['w'\] {told}"):
            written({"v": torch.zeros(1), "w": value})


def test_a_conjugate_is_written_as_its_numbers() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(load(written({"w": values.conj()}))["w"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(load(written({"w": values.conj().imag}))["w"], torch.tensor([-2.0, 4.0]))
