"""The multi-stream event transformer.

Each stream (an entity's recent history) is encoded on its own and leaves one vector, its last; a causal decoder with
cross-attention to those K vectors predicts all categories of the key's next events under teacher forcing. The encoders
have one shape and run as one; of their last layer only the last position is computed, since nothing reads the others.

Shapes: B batch, K streams, S source events, T target events, C categories (= H heads), D model width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eventkern.nn import (
    CrossAttention,
    MultiEmbedding,
    MultiHeadCrossEntropy,
    SelfAttention,
    StackedLayerNorm,
    StackedLinear,
    StackedSelfAttention,
)
from eventkern.plain import check_fields

PADDING_CLASS = 0


class EventBatchLike(Protocol):
    """What the model reads of a batch (eventkern.data.EventBatch is one)."""

    @property
    def sources(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...


@dataclass(frozen=True)
class EventTransformerConfig:
    """Sizes of an event transformer.

    Args:
        category_names: the C categories, in the order of a batch's columns.
        category_sizes: classes of each category, padding (0) and missing (1) included.
        num_streams: K.
        src_seq_len: S, events of each stream.
        tgt_seq_len: T, events the decoder predicts.
        d_model: D, a multiple of num_heads.
        num_heads: attention heads. Flash attention on CUDA pads small head dims, so that one of 8 costs what a larger
            does; on a CPU, 2 to 8 heads of d_model 64 cost the same.
        encoder_layers: layers of each stream's encoder.
        decoder_layers: layers of the decoder.
        dropout: probability at the embeddings and after every attention and feed-forward block; attention weights have
            none, because flash attention on the CPU has none.
        positions: "learned" or "sinusoidal" positions; sources are S long, so theirs count back from the anchor.
        checkpoint_blocks: in training, keep only the inputs of every encoder and decoder layer and run its forward
            again in the backward (T. Chen et al., 2016): the same losses and gradients for less memory and more time.
            torch loads its compiler for that, which takes about 140 MiB of the host's memory.

    Raises:
        TypeError: a value of another type; it names the field.
        ValueError: a value out of its range.
    """

    category_names: tuple[str, ...]
    category_sizes: tuple[int, ...]
    num_streams: int
    src_seq_len: int
    tgt_seq_len: int
    d_model: int = 64
    num_heads: int = 8
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.0
    positions: Literal["learned", "sinusoidal"] = "learned"
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.category_names) != len(self.category_sizes):
            raise ValueError(
                f"category_sizes has {len(self.category_sizes)} entries; want {len(self.category_names)}, one each"
            )
        for name in (
            "num_streams",
            "src_seq_len",
            "tgt_seq_len",
            "d_model",
            "num_heads",
            "encoder_layers",
            "decoder_layers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want at least 1")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; want a divisor of d_model = {self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; want a number in [0, 1)")
        if self.positions not in ("learned", "sinusoidal"):
            raise ValueError(f"positions is {self.positions!r}; want 'learned' or 'sinusoidal'")


def _feed_forward(d_model: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))


def _run(layer: nn.Module, config: EventTransformerConfig, *inputs: Tensor | bool) -> Tensor:
    """A layer's output; in training under `checkpoint_blocks`, the backward makes what lies inside once more."""
    if not (config.checkpoint_blocks and layer.training):
        return layer(*inputs)
    # Only dropout draws numbers, and to keep the generators' states for it costs time.
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=config.dropout > 0)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward of all streams, each with its own weights."""

    def __init__(self, config: EventTransformerConfig) -> None:
        super().__init__()
        streams, width = config.num_streams, config.d_model
        self.attention_norm = StackedLayerNorm(streams, width)
        self.attention = StackedSelfAttention(streams, width, config.num_heads)
        self.feed_forward_norm = StackedLayerNorm(streams, width)
        self.feed_forward = nn.Sequential(
            StackedLinear(streams, width, 4 * width), nn.GELU(), StackedLinear(streams, 4 * width, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states_KBSD: Tensor, is_last_only: bool = False) -> Tensor:
        """(K, B, S, D) to the same, or with `is_last_only` to its last position, (K, B, 1, D)."""
        attended = self.attention(self.attention_norm(states_KBSD), is_last_only=is_last_only)
        if is_last_only:
            states_KBSD = states_KBSD[:, :, -1:]
        states_KBSD = states_KBSD + self.dropout(attended)
        return states_KBSD + self.dropout(self.feed_forward(self.feed_forward_norm(states_KBSD)))


class StreamEncoders(nn.Module):
    """The encoders of all streams: events to each stream's last vector."""

    def __init__(self, config: EventTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = StackedLayerNorm(config.num_streams, config.d_model)

    def forward(self, states_KBSD: Tensor) -> Tensor:
        """(K, B, S, D) to (K, B, D)."""
        last = self.layers[-1]
        for layer in self.layers:
            states_KBSD = _run(layer, self.config, states_KBSD, layer is last)
        return self.norm(states_KBSD[:, :, 0])

    def stream(self, index: int) -> dict[str, Tensor]:
        """The parameters of one stream's encoder by name, as views of those of all."""
        streams = self.config.num_streams
        return {
            name: parameter.unflatten(0, (streams, -1))[index] if parameter.ndim == 1 else parameter[index]
            for name, parameter in self.named_parameters()
        }


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention to the streams' vectors, and feed-forward."""

    def __init__(self, config: EventTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(config.d_model, config.num_heads, is_causal=True)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = CrossAttention(config.d_model, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = _feed_forward(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states_BTD: Tensor, memory_BKD: Tensor) -> Tensor:
        states_BTD = states_BTD + self.dropout(self.attention(self.attention_norm(states_BTD)))
        states_BTD = states_BTD + self.dropout(self.cross_attention(self.cross_attention_norm(states_BTD), memory_BKD))
        return states_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(states_BTD)))

    def step(self, states_BD: Tensor, cache_B2NTH: Tensor, position: int, memory: tuple[Tensor, Tensor]) -> Tensor:
        """What `forward` gives for one position, without dropout; `SelfAttention.step` tells what the cache holds.

        Args:
            states_BD: the states at the position.
            cache_B2NTH: self-attention's keys and values, written in place.
            position: of the states, from 0.
            memory: keys and values of the streams' vectors, from `cross_attention.keys_and_values`.
        """
        states_BD = states_BD + self.attention.step(self.attention_norm(states_BD), cache_B2NTH, position)
        states_BD = states_BD + self.cross_attention.step(self.cross_attention_norm(states_BD), *memory)
        return states_BD + self.feed_forward(self.feed_forward_norm(states_BD))


class Positions(nn.Module):
    """A (length, D) table added to embeddings of that length or less: a parameter, or sines (Vaswani et al., 2017)."""

    def __init__(self, length: int, d_model: int, kind: str) -> None:
        super().__init__()
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(length, d_model).normal_(std=0.02))
        else:
            self.register_buffer("table", _sinusoids(length, d_model), persistent=False)

    def forward(self, states_BLD: Tensor) -> Tensor:
        return states_BLD + self.table[: states_BLD.shape[-2]]


def _sinusoids(length: int, d_model: int) -> Tensor:
    """On torch's default device, in its default dtype, as parameters are made."""
    positions = torch.arange(length, dtype=torch.float32)[:, None]
    columns = torch.arange(d_model, dtype=torch.float32)
    angles = positions * 10_000.0 ** (-(columns - columns % 2) / d_model)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).to(torch.get_default_dtype())


class EventTransformer(nn.Module):
    """A multi-stream encoder-decoder over events; forward gives one loss per category.

    Args:
        config: the sizes.

    Attributes:
        head_names: the C category names, in the order of the losses.
    """

    def __init__(self, config: EventTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.head_names = config.category_names
        self.embedding = MultiEmbedding(config.category_sizes, config.d_model)
        self.source_positions = Positions(config.src_seq_len, config.d_model, config.positions)
        self.target_positions = Positions(config.tgt_seq_len, config.d_model, config.positions)
        self.encoders = StreamEncoders(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.heads = MultiHeadCrossEntropy(config.d_model, config.category_sizes, ignore_index=PADDING_CLASS)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        # N(0, 0.02^2), residual outputs shrunk by the number of residual additions: GPT-2 (Radford et al., 2019).
        additions = 2 * self.config.encoder_layers + 3 * self.config.decoder_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | StackedLinear):
                is_residual = name.endswith((".out", ".feed_forward.2"))
                nn.init.normal_(module.weight, std=0.02 * (additions**-0.5 if is_residual else 1.0))
                nn.init.zeros_(module.bias)

    def encode(self, sources_BKSC: Tensor) -> Tensor:
        """Source events (B, K, S, C) to the streams' last vectors, memory (B, K, D).

        Raises:
            ValueError: another number or length of streams than the configuration's.
        """
        self._check_sources(sources_BKSC)
        return self._encode(self.embedding(sources_BKSC.transpose(0, 1)))

    def _encode(self, events_KBSD: Tensor) -> Tensor:
        return self.encoders(self.dropout(self.source_positions(events_KBSD))).transpose(0, 1)

    def decode(self, events_BTC: Tensor, memory_BKD: Tensor) -> Tensor:
        """Events 0..T-1 (B, T, C) and memory (B, K, D) to the states (B, T, D) that predict events 1..T.

        Raises:
            ValueError: more events than the configuration's tgt_seq_len.
        """
        self._check_events(events_BTC)
        return self._decode(self.embedding(events_BTC), memory_BKD)

    def _decode(self, events_BTD: Tensor, memory_BKD: Tensor) -> Tensor:
        states_BTD = self.dropout(self.target_positions(events_BTD))
        for layer in self.decoder:
            states_BTD = _run(layer, self.config, states_BTD, memory_BKD)
        return self.norm(states_BTD)

    def states(self, batch: EventBatchLike) -> Tensor:
        """The states (B, T, D) that predict a batch's labels: encode and decode, with one lookup for all events."""
        sources_KBSC, events_BTC = batch.sources.transpose(0, 1), batch.targets[:, :-1]
        self._check_sources(batch.sources)
        self._check_events(events_BTC)
        leading = sources_KBSC.shape[:-1], events_BTC.shape[:-1]
        vectors = self.embedding(torch.cat([sources_KBSC.flatten(0, -2), events_BTC.flatten(0, -2)]))
        sources, events = vectors.split([math.prod(shape) for shape in leading])
        return self._decode(events.unflatten(0, leading[1]), self._encode(sources.unflatten(0, leading[0])))

    def _check_sources(self, sources_BKSC: Tensor) -> None:
        shape = (self.config.num_streams, self.config.src_seq_len, len(self.head_names))
        if sources_BKSC.shape[1:] != shape:
            raise ValueError(f"sources has shape {tuple(sources_BKSC.shape)}; want (B, K, S, C) with K, S, C = {shape}")

    def _check_events(self, events_BTC: Tensor) -> None:
        most = self.config.tgt_seq_len
        if events_BTC.shape[1] > most:
            raise ValueError(f"{events_BTC.shape[1]} events to decode; want at most tgt_seq_len = {most}")

    def forward(self, batch: EventBatchLike) -> Tensor:
        """The (H,) float32 losses: per category, the mean in nats over the labels that are not padding."""
        return self.heads(self.states(batch), batch.targets[:, 1:])

    @torch.no_grad()
    def metrics(self, batch: EventBatchLike) -> dict[str, Tensor]:
        """{"loss": (H,) nats, "top1": (H,) share}, each a mean over the batch's labels that are not padding."""
        states_BTD = self.states(batch)
        labels_BTC = batch.targets[:, 1:]
        return {"loss": self.heads(states_BTD, labels_BTC), "top1": self.heads.accuracy(states_BTD, labels_BTC)}

    @torch.no_grad()
    def scores(self, batch: EventBatchLike, top_k: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
        """What `eventkern.nn.MultiHeadCrossEntropy.scores` sums, over the batch's labels that are not padding."""
        return self.heads.scores(self.states(batch), batch.targets[:, 1:], top_k)

    def tokens(self, batch: EventBatchLike) -> int:
        """Events that go through the network, from the shapes alone: B (K S + T), padding included."""
        batch_size, streams, source_events = batch.sources.shape[:3]
        return batch_size * (streams * source_events + batch.targets.shape[1] - 1)

    def flops(self, batch: EventBatchLike) -> int:
        """Floating-point operations of a forward and a backward, from the shapes alone.

        Counted are the products of matrices, a multiply and an add each: linear layers, attention's scores and their
        weighted sums (causal ones in full), and the heads; of the last encoder layer what its one position needs. The
        backward has two products for each of the forward; what an implementation recomputes is not counted, nor are
        lookups, norms and activations.

        Source:
            Chowdhery et al., 2022 (PaLM), appendix B: model FLOPs.
        """
        config, width = self.config, self.config.d_model
        batch_size, streams, source_events = batch.sources.shape[:3]
        target_events = batch.targets.shape[1] - 1
        sources, targets, vectors = (batch_size * each for each in (streams * source_events, target_events, streams))
        block = 12 * width**2  # an event's multiply-adds: 4 D^2 of self-attention, 8 D^2 of the feed-forward
        encoder = sources * (block + 2 * source_events * width)
        last_encoder = sources * 2 * width**2 + vectors * (block - 2 * width**2 + 2 * source_events * width)
        decoder = targets * (block + 2 * target_events * width)
        cross_attention = targets * (2 * width**2 + 2 * streams * width) + vectors * 2 * width**2
        heads = targets * width * sum(config.category_sizes)
        encoders = (config.encoder_layers - 1) * encoder + last_encoder
        return 3 * 2 * (encoders + config.decoder_layers * (decoder + cross_attention) + heads)
