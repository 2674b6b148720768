"""What `torch.utils.flop_counter.FlopCounterMode` counts for our ops: the products of their definitions.

A multiply and an add each, as for torch's own products; what an implementation recomputes, and which of forward and
backward makes a gradient, is not told apart, so that a model counts the same on every device and under
`use_reference()`. Lookups have no products and count 0.

torch's module of counting loads triton, and knows the formulas that are registered when a counter is made: they are
registered when that module is first imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Scores and their weighted sums, causal ones in full."""
    return 2 * 2 * math.prod(query) * key[-2]


def attention_backward(grad: Shape, query: Shape, key: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * attention(query, key, key)


def multi_head_cross_entropy(hidden: Shape, weight: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The logits of all heads."""
    return 2 * math.prod(hidden) * weight[0]


def multi_head_cross_entropy_backward(
    grad: Shape, hidden: Shape, weight: Shape, *others: Any, out_shape: Any = None, **__: Any
) -> int:
    """The gradients of hidden and weight, each where it is needed."""
    needs_hidden, needs_weight, _ = others[-1]
    return (needs_hidden + needs_weight) * multi_head_cross_entropy(hidden, weight)


def multi_embedding(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return 0


FORMULAS = {
    "attention": attention,
    "attention_backward": attention_backward,
    "multi_embedding": multi_embedding,
    "multi_embedding_backward": multi_embedding,
    "multi_head_cross_entropy": multi_head_cross_entropy,
    "multi_head_cross_entropy_backward": multi_head_cross_entropy_backward,
}


def register() -> None:
    """Registers the formulas with torch's counter, or sees to it that they are when it is imported."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.eventkern, name)
        if packet not in flop_registry:
            register: Any = register_flop_formula(packet)
            register(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch's counter, once, as it would be found, and registers the formulas when it has run."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module
        return spec
