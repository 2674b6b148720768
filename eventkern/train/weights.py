"""The weights alone, in a file that other programs read: safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
        TypeError: a dtype that the format or this writer does not know.

    Source: huggingface/safetensors, README, "Format".
    """
    # Larger elements first, so that each tensor starts at a multiple of its element's size.
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise TypeError(f"weights[{name!r}] is of {tensor.dtype}, but safetensors are written of {known}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
