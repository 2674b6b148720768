"""How the arrays of a store lie in store.bin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Section:
    """Where an array lies in store.bin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def map(self, file: Path, mode: Literal["r", "r+"] = "r") -> NDArray[Any]:
        """The section as an array over the file's pages."""
        if self.num_bytes == 0:  # an empty range cannot be mapped
            return np.empty(self.shape, self.dtype)
        return np.memmap(file, self.dtype, mode, self.offset, self.shape)


def code_dtype(sizes: tuple[int, ...]) -> str:
    """The narrowest dtype of rows that holds every code."""
    largest = max(sizes) - 1
    return "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "int32"


def lay_out(arrays: list[tuple[str, str, tuple[int, ...]]]) -> tuple[list[Section], int]:
    """Page-aligned sections for (name, dtype, shape) in turn, and the bytes that they take."""
    sections, end = [], 0
    for name, dtype, shape in arrays:
        sections.append(Section(name, dtype, shape, -(-end // PAGE_BYTES) * PAGE_BYTES))
        end = sections[-1].offset + sections[-1].num_bytes
    return sections, end
