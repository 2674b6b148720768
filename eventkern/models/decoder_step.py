"""The decoder's layers for one event of each sequence, in one call of the extension on the CPU.

Shapes: L layers, B batch, K streams, T positions, D model width, N attention heads, H = D / N.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from eventkern import _C
from eventkern.models.event_transformer import DecoderLayer, EventTransformerConfig
from eventkern.ops.attention.api import HEAD_DIMS

LANES = 16
"""Of the extension: widths are multiples of it, and so are the positions of what it reads keys from."""


def padded_length(length: int) -> int:
    """Positions that a buffer of keys and values has, for `length` of them to be used."""
    return -(-length // LANES) * LANES


class PackedLayers:
    """A decoder's weights and memory as the extension reads them, and the step that it makes of them.

    The step is that of `DecoderLayer.step`, layer by layer, up to rounding, and no module is called. Weights are
    copied; those that change later need another one.

    Args:
        layers: of the decoder, of which `can_pack` is true.
        memory: each layer's keys and values (B, N, K, H) of the streams' vectors.

    Numerics:
        Float32, each sequence on its own and in one order: the same bits in any batch and for any number of threads.

    Source:
        GELU by Abramowitz and Stegun, 1964, equation 7.1.26, to within 1.5e-7 of erf.
    """

    def __init__(self, layers: Sequence[DecoderLayer], memory: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._weights = torch.cat([part.flatten() for layer in layers for part in _parts(layer)])
        self._num_memory = memory[0][0].shape[2]
        padding = padded_length(self._num_memory) - self._num_memory
        self._memory_LB2NKH = torch.stack(
            [F.pad(torch.stack(pair, 1), (0, 0, 0, padding)).contiguous() for pair in memory]
        )
        self._epsilon = layers[0].attention_norm.eps

    def step(self, states_BD: Tensor, caches_LB2NTH: Tensor, position: int) -> None:
        """The states at a position, in place, to what the last layer makes of them.

        Args:
            states_BD: float32, contiguous.
            caches_LB2NTH: every layer's keys and values of the positions before, T a `padded_length`; their own are
                written there.
            position: from 0.
        """
        num_layers, batch_size, _, num_heads, cache_size, _ = caches_LB2NTH.shape
        _C.decoder_step_cpu(
            num_layers, batch_size, states_BD.shape[1], num_heads, cache_size, position, self._num_memory,
            self._memory_LB2NKH.shape[4], self._epsilon, torch.get_num_threads(), self._weights.data_ptr(),
            caches_LB2NTH.data_ptr(), self._memory_LB2NKH.data_ptr(), states_BD.data_ptr(),
        )  # fmt: skip


def can_pack(layers: Sequence[DecoderLayer], config: EventTransformerConfig) -> bool:
    """Whether the extension computes what these layers do: float32 on the CPU, of a width and a head dim that it has.

    Layers that are not as the model makes them are left to their modules: modules of another class (adapters, say),
    hooks that would be passed by, a forward of an object's own, weights that are missing or of another shape, another
    GELU, norms of different epsilons. Weights that are parametrised, as integers are, are read as modules read them.
    """
    if config.d_model % LANES or config.d_model // config.num_heads not in HEAD_DIMS:
        return False
    wanted = _as_made(config)
    if any(_plain_modules(layer) != wanted for layer in layers):
        return False
    norms = (module for layer in layers for module in layer.modules() if isinstance(module, nn.LayerNorm))
    return len({norm.eps for norm in norms}) == 1


@functools.cache
def _as_made(config: EventTransformerConfig) -> dict[str, object]:
    with torch.device("meta"):
        layer = DecoderLayer(config)
    return _plain_modules(layer.to_empty(device="cpu").float())


def _plain_modules(layer: nn.Module) -> dict[str, object]:
    """What each module of a layer is, as far as the extension takes it for granted; empty where one has a hook."""
    found: dict[str, object] = {}
    pending = [("", layer)]
    while pending:
        name, module = pending.pop()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return {}
        weights = (getattr(module, leaf, None) for leaf in ("weight", "bias"))
        shapes = [(weight.shape, weight.dtype, weight.device) for weight in weights if isinstance(weight, Tensor)]
        found[name] = (type_before_parametrizations(module), shapes, getattr(module, "approximate", None))
        pending += [(f"{name}.{child}", part) for child, part in module.named_children() if child != "parametrizations"]
    return found


def _parts(layer: DecoderLayer) -> list[Tensor]:
    """A layer's weights in the order in which the extension carves them; inputs before outputs."""
    first, _, second = layer.feed_forward
    modules = [
        layer.attention_norm, layer.attention.qkv, layer.attention.out,
        layer.cross_attention_norm, layer.cross_attention.query, layer.cross_attention.out,
        layer.feed_forward_norm, first, second,
    ]  # fmt: skip
    parts: list[Tensor] = []
    for module in modules:
        assert isinstance(module, nn.Linear | nn.LayerNorm)
        parts += [module.weight.t() if isinstance(module, nn.Linear) else module.weight, module.bias]
    return parts
