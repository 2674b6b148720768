"""Next events of sequences: the decoder run one event at a time, over a cache of keys and values.

Shapes: B batch, K streams, S source events, T target events of a window, C categories (= H heads), D model width, N
attention heads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern import _C
from eventkern.models.decoder_step import PackedLayers, can_pack, padded_length
from eventkern.models.event_transformer import DecoderLayer, EventTransformer
from eventkern.modes import evaluating
from eventkern.ops.switches import is_reference_forced

MISSING_CLASS = 1
COLDEST = 1e-30
"""Temperatures below it take the likeliest class: a difference of logits over one of them can leave float32."""
FIRST_CLASS = 2
"""The first class that stands for a value: 0 is padding, 1 missing or out-of-vocabulary."""


class HistoryLike(Protocol):
    """What B sequences look back on (eventkern.data.History is one)."""

    @property
    def anchors(self) -> Tensor:
        """The newest known event of each sequence, (B, C) integers."""
        ...

    def sources(self, generated_BNC: Tensor) -> Tensor:
        """The streams (B, K, S, C) before the newest event: the last of the N generated, or the anchor where N is 0."""
        ...


class CachedDecoder:
    """The decoder of a model, one event at a time: each costs what it adds, not what came before it again.

    Keys and values lie in one buffer of T positions a layer, where each event writes its own, and which every window
    uses again; those of the streams' vectors are computed once a window. The states are those of
    `EventTransformer.decode` up to rounding.

    Args:
        model: whose decoder runs, without dropout and without gradients.
        batch_size: B.

    Devices:
        On the CPU in float32, d_model a multiple of 16 and head dims of 4, 8, 16 and 32: all layers in one call of the
        extension, with the weights that the model had when the window was begun. Else, and under `use_reference()`,
        the modules one by one.
    """

    def __init__(self, model: EventTransformer, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.position = 0
        self._layers = [cast(DecoderLayer, layer) for layer in model.decoder]
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._caches: Tensor | None = None
        self._packed: PackedLayers | None = None

    @torch.no_grad()
    def begin(self, memory_BKD: Tensor) -> None:
        """Start a window at the streams' vectors.

        Raises:
            ValueError: vectors of another number of sequences.
        """
        if len(memory_BKD) != self.batch_size:
            raise ValueError(f"memory has {len(memory_BKD)} sequences; want {self.batch_size}, the batch_size")
        self.position = 0
        self._memory = [layer.cross_attention.keys_and_values(memory_BKD) for layer in self._layers]
        config, like = self.model.config, self._memory[0][0]  # of autocast's dtype under autocast
        if self._caches is None or (self._caches.dtype, self._caches.device) != (like.dtype, like.device):
            shape = (2, config.num_heads, padded_length(config.tgt_seq_len), config.d_model // config.num_heads)
            self._caches = like.new_empty(len(self._memory), self.batch_size, *shape)
        is_plain = like.dtype == torch.float32 and can_pack(self._layers, config)
        self._packed = PackedLayers(self._layers, self._memory) if is_plain else None

    @torch.no_grad()
    def step(self, events_BC: Tensor) -> Tensor:
        """The next event (B, C) of the window to the state (B, D) that predicts the one after it.

        Raises:
            ValueError: no window was begun, or it has had its T events; or events of another number of sequences.
        """
        if len(events_BC) != self.batch_size:
            raise ValueError(f"events has {len(events_BC)} sequences; want {self.batch_size}, the batch_size")
        if self._caches is None or self.position >= self.model.config.tgt_seq_len:
            raise ValueError(
                f"event {self.position} of a window; begin one, of at most {self.model.config.tgt_seq_len}"
            )
        states_BD = self.model.embedding(events_BC) + self.model.target_positions.table[self.position]
        if self._packed is not None and not is_reference_forced():
            self._packed.step(states_BD, self._caches, self.position)
        else:
            for layer, cache, memory in zip(self._layers, self._caches, self._memory, strict=True):
                states_BD = layer.step(states_BD, cache, self.position, memory)
        self.position += 1
        return self.model.norm(states_BD)


@dataclass(frozen=True)
class ClassSampler:
    """Draws a class of every head from its logits, each head on its own, by inversion of its distribution.

    p(class) is the softmax of logits / temperature over the top_k classes of the largest logits; class 0, padding, is
    never drawn. On the CPU the extension finds the k largest, all heads in one call; elsewhere, and where all classes
    can be drawn, heads that follow one another and have one size are drawn at once by torch's own operations.

    Args:
        head_sizes: classes of each of the H heads, at least 2 of each.
        temperature: 0, or below 1e-30, takes the class of the largest logit.
        top_k: classes of a head that can be drawn; None: all.
        allow_missing: whether class 1, missing or out-of-vocabulary, can be drawn; where it is the only class but
            padding it is drawn all the same.

    Raises:
        ValueError: a temperature below 0 or not finite, top_k below 1, or a head with no class but padding.
    """

    head_sizes: tuple[int, ...]
    temperature: float = 1.0
    top_k: int | None = None
    allow_missing: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; want a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; want at least 1, or None for all classes")
        if min(self.head_sizes) < 2:
            raise ValueError(f"head_sizes holds {min(self.head_sizes)}; want at least 2: class 0 is padding")

    def __call__(self, logits_BV: Tensor, uniforms_BH: Tensor | None) -> Tensor:
        """Packed logits (B, sum(head_sizes)) and float32 numbers in [0, 1), (B, H), to classes (B, H) int32.

        Raises:
            ValueError: logits or numbers of another shape, or numbers of another dtype.
        """
        if logits_BV.ndim != 2 or logits_BV.shape[1] != sum(self.head_sizes):
            raise ValueError(f"logits has shape {tuple(logits_BV.shape)}; want (B, {sum(self.head_sizes)})")
        wanted = (len(logits_BV), len(self.head_sizes))
        if uniforms_BH is not None and (uniforms_BH.shape != wanted or uniforms_BH.dtype != torch.float32):
            seen = f"shape {tuple(uniforms_BH.shape)} and dtype {uniforms_BH.dtype}"
            raise ValueError(f"uniforms has {seen}; want {wanted} and torch.float32")
        if logits_BV.is_cpu and not is_reference_forced() and (self._is_greedy or self.top_k is not None):
            return self._draw_on_cpu(logits_BV.float(), uniforms_BH)
        classes, start, head = [], 0, 0
        for size, run in itertools.groupby(self.head_sizes):
            num_heads = len(list(run))
            left_out = self._num_left_out(size)
            packed = logits_BV.narrow(-1, start, num_heads * size).float()
            uniforms = None if uniforms_BH is None else uniforms_BH.narrow(-1, head, num_heads)
            drawn = self._draw(packed.unflatten(-1, (num_heads, size))[..., left_out:], uniforms)
            classes.append(drawn + left_out)
            start, head = start + num_heads * size, head + num_heads
        return torch.cat(classes, dim=-1).int()

    @property
    def _is_greedy(self) -> bool:
        return self.temperature < COLDEST

    def _num_left_out(self, size: int) -> int:
        """Classes of a head, from padding on, that are never drawn."""
        return FIRST_CLASS if not self.allow_missing and size > FIRST_CLASS else MISSING_CLASS

    def _draw_on_cpu(self, logits_BV: Tensor, uniforms_BH: Tensor | None) -> Tensor:
        logits_BV = logits_BV.contiguous()
        is_greedy = self._is_greedy or uniforms_BH is None
        uniforms = None if is_greedy or uniforms_BH is None else uniforms_BH.contiguous()
        classes = torch.empty(len(logits_BV), len(self.head_sizes), dtype=torch.int32, device="cpu")
        _C.draw_classes_cpu(
            logits_BV.data_ptr(),
            logits_BV.shape[1],
            len(logits_BV),
            self.head_sizes,
            [self._num_left_out(size) for size in self.head_sizes],
            0 if uniforms is None else uniforms.data_ptr(),
            0.0 if is_greedy else 1.0 / self.temperature,
            1 if is_greedy else self.top_k or 1,
            torch.get_num_threads(),
            classes.data_ptr(),
        )
        return classes

    def _draw(self, logits_BHV: Tensor, uniforms_BH: Tensor | None) -> Tensor:
        if self._is_greedy or uniforms_BH is None:
            return logits_BHV.argmax(-1)
        classes = None
        if self.top_k is not None:
            logits_BHV, classes = logits_BHV.topk(min(self.top_k, logits_BHV.shape[-1]))
        below_largest = logits_BHV - logits_BHV.amax(-1, keepdim=True)
        sums = (below_largest / self.temperature).softmax(-1).cumsum(-1)
        # A float32 below 1 times the total rounds below the total, so that a class is found unless a logit is NaN.
        drawn = torch.searchsorted(sums, uniforms_BH.unsqueeze(-1) * sums[..., -1:], right=True)
        drawn = drawn.clamp(max=sums.shape[-1] - 1)
        return (drawn if classes is None else classes.gather(-1, drawn)).squeeze(-1)


def generate(
    model: EventTransformer,
    history: HistoryLike,
    num_events: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seeds: Sequence[int] | None = None,
    allow_missing: bool = True,
    given: Sequence[int] = (),
) -> Tensor:
    """The next events of B sequences, each drawn from what the model says after all before it.

    The newest known event is the anchor of a window, and T events follow it; then the newest of those is the anchor of
    the next window, with sources of its own. All categories of an event are drawn independently, as the model has them:
    given the past. The model is used in evaluation mode, and each of its modules is left in the
    mode it was found in.

    Args:
        model: on the device where the events are made; under `torch.autocast` in its dtype.
        history: the sequences' newest known events, and what their streams hold before any event.
        num_events: events of each sequence, at least 1.
        temperature: of the distributions, as in `ClassSampler`; 0 takes the likeliest class.
        top_k: classes of a category that can be drawn; None: all.
        seeds: one a sequence, which alone decides its numbers, whatever other sequences are in the batch and on
            whatever device it is; not needed at temperature 0.
        allow_missing: whether class 1 (missing or out-of-vocabulary) can be drawn. It is an outcome like others: a
            cancelled flight has no time in the air.
        given: columns that are known and not drawn: all events have the anchor's class there (a sequence's own key).

    Returns:
        (B, num_events, C) int32 on the model's device.

    Raises:
        ValueError: an argument out of its range, or as many seeds as there are not sequences.
        FloatingPointError: logits that are not finite, as weights that are not give.

    Source:
        Holtzman et al., 2020, section 5, for sampling with a temperature and among the k likeliest.
    """
    sampler = ClassSampler(model.config.category_sizes, temperature, top_k, allow_missing)
    if num_events < 1:
        raise ValueError(f"num_events is {num_events}; want at least 1")
    device = model.heads.weight.device
    events_BC = history.anchors.to(device, torch.int32)
    batch_size, num_categories = events_BC.shape
    uniforms = None
    if temperature > 0:
        if seeds is None or len(seeds) != batch_size:
            raise ValueError(
                f"seeds has {0 if seeds is None else len(seeds)} entries; want {batch_size}, one a sequence"
            )
        uniforms = _uniforms(seeds, (num_events, num_categories)).to(device)
    anchors = events_BC
    columns = list(given)
    generated_BNC = torch.zeros(batch_size, num_events, num_categories, dtype=torch.int32, device=device)
    trouble = torch.zeros((), dtype=torch.float32, device=device)  # stays 0 while all logits are finite, nobody waits
    with evaluating(model), torch.inference_mode():
        decoder = CachedDecoder(model, batch_size)
        for step in range(num_events):
            if step % model.config.tgt_seq_len == 0:
                decoder.begin(model.encode(history.sources(generated_BNC[:, :step]).to(device)))
            logits_BV = F.linear(decoder.step(events_BC), model.heads.weight, model.heads.bias)
            trouble += 0 * logits_BV.sum(dtype=torch.float32)
            events_BC = sampler(logits_BV, None if uniforms is None else uniforms[:, step])
            if columns:
                events_BC[:, columns] = anchors[:, columns]
            generated_BNC[:, step] = events_BC
    if not trouble.isfinite():
        raise FloatingPointError(
            f"the logits of {num_events} events are not all finite: the model's weights are broken"
        )
    return generated_BNC


def _uniforms(seeds: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """(B, *shape) float32 in [0, 1), the numbers of each sequence from its own seed; made on the CPU."""
    numbers = [_drawn(seed, shape) for seed in seeds]
    return torch.stack(numbers) if numbers else torch.empty(0, *shape, dtype=torch.float32, device="cpu")


def _drawn(seed: int, shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu")
