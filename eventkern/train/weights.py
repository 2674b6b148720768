"""The weights alone, in a file that other programs read: safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

DTYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.bool: "BOOL",
}


def unwritable(weights: Mapping[str, Any]) -> str | None:
    """Why safetensors cannot hold a state_dict, or None: a value that is no tensor, or a tensor of another kind."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            return f"weights[{name!r}] is of type {type(value).__name__}, but safetensors hold tensors alone"
        if value.dtype not in DTYPES:
            return (
                f"weights[{name!r}] is of {value.dtype}, but safetensors are written of {', '.join(map(str, DTYPES))}"
            )
        if value.layout != torch.strided or value.is_meta:
            return (
                f"weights[{name!r}] is {value.layout} on {value.device}, but safetensors hold dense tensors with data"
            )
    return None


def write_safetensors(weights: Mapping[str, Tensor], metadata: Mapping[str, str], file: IO[bytes]) -> None:
    """Writes tensors to an open file in the safetensors format, one after the other: no second copy of all in memory.

    The format: the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each
    tensor, and the metadata), and the bytes of the tensors without gaps. Tensors that share memory are written once
    under each name, so that a strict `load_state_dict` finds them all.

    Args:
        weights: contiguous or not, on any device.
        metadata: texts, kept in the header.
        file: open for writing in binary.

    Raises:
        TypeError: a value that the format or this writer does not know, as `unwritable` tells.

    Source: huggingface/safetensors, README, "Format".
    """
    if fault := unwritable(weights):
        raise TypeError(fault)
    # Larger elements first, so that each tensor starts at a multiple of its element's size.
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        file.write(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
