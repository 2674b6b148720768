"""What eventkern is measured against, every peer of a subject behind the signature of eventkern's own.

ATTENTION: build() gives a function of query, key and value (B, N, T, H) and of is_causal, with the same output.

EVENT_TRANSFORMER: build(model) takes an eventkern.models.EventTransformer and gives a module that maps a batch to the
same (H,) losses, with a copy of its weights and nothing else of it.

MULTI_EMBEDDING: build(weight, table_sizes) shares the packed weight and gives a module that maps prepare(ids), with ids
(N, C), to the same (N, D) sums.

MULTI_HEAD_CROSS_ENTROPY: build(weight, head_sizes) shares the packed weight and gives a module that maps hidden (N, D)
and targets (N, H) to the same (H,) mean losses.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eventkern.models import EventTransformer
from eventkern.models.event_transformer import EventBatchLike


@dataclass(frozen=True)
class Peer:
    """A way to do the same work without eventkern."""

    name: str
    build: Callable[..., Any]
    is_slow_to_start: bool = False
    """Needs seconds before its first result (a compiler), so it runs under `--full` only."""
    is_float32_only: bool = False


Attend = Callable[..., Tensor]


def math_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """torch's attention from whole products, all scores in memory."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The formula as one writes it."""
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ value


def compiled_attention() -> Attend:
    """The formula under torch.compile."""
    return torch.compile(plain_attention, dynamic=False)


ATTENTION = (
    Peer("F.scaled_dot_product_attention", lambda: F.scaled_dot_product_attention),
    Peer("F.scaled_dot_product_attention, math", lambda: math_attention),
    Peer("softmax written out", lambda: plain_attention),
    Peer("softmax written out, compiled", compiled_attention, is_slow_to_start=True),
)


class PlainEventTransformer(nn.Module):
    """The event transformer as one writes it with torch.nn: a table and a head per category, torch's own layers, loops.

    Shapes: B batch, K streams, S source events, T target events, C categories, D model width.
    """

    def __init__(self, model: EventTransformer) -> None:
        super().__init__()
        config = model.config
        width, num_heads = config.d_model, config.num_heads

        def options() -> dict[str, object]:
            return {"dropout": config.dropout, "activation": "gelu", "batch_first": True, "norm_first": True}

        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in config.category_sizes)
        self.source_positions = nn.Embedding(config.src_seq_len, width)
        self.target_positions = nn.Embedding(config.tgt_seq_len, width)
        self.encoders = nn.ModuleList(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(width, num_heads, 4 * width, **options()),  # type: ignore[arg-type]
                config.encoder_layers,
                norm=nn.LayerNorm(width),
                enable_nested_tensor=False,
            )
            for _ in range(config.num_streams)
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, num_heads, 4 * width, **options()),  # type: ignore[arg-type]
            config.decoder_layers,
            norm=nn.LayerNorm(width),
        )
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in config.category_sizes)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("causal_mask", nn.Transformer.generate_square_subsequent_mask(config.tgt_seq_len), False)
        self.to(model.embedding.weight.device)
        copy_weights(model, self)

    def embed(self, events: Tensor, positions: nn.Embedding) -> Tensor:
        states = torch.zeros((), device=events.device)
        for category, table in enumerate(self.tables):
            states = states + table(events[..., category])
        return self.dropout(states + positions.weight[: events.shape[-2]])

    def forward(self, batch: EventBatchLike) -> Tensor:
        vectors = []
        for stream, encoder in enumerate(self.encoders):
            states_BSD = encoder(self.embed(batch.sources[:, stream], self.source_positions))
            vectors.append(states_BSD[:, -1])
        memory_BKD = torch.stack(vectors, dim=1)
        states_BTD = self.embed(batch.targets[:, :-1], self.target_positions)
        num_events = states_BTD.shape[1]
        mask_TT = self.causal_mask[:num_events, :num_events]  # type: ignore[index]
        states_BTD = self.decoder(states_BTD, memory_BKD, tgt_mask=mask_TT, tgt_is_causal=True)
        labels_BTC = batch.targets[:, 1:].long()
        losses = []
        for category, head in enumerate(self.heads):
            logits = head(states_BTD).flatten(0, 1)
            losses.append(F.cross_entropy(logits.float(), labels_BTC[..., category].flatten(), ignore_index=0))
        return torch.stack(losses)


@torch.no_grad()
def copy_weights(model: EventTransformer, plain: PlainEventTransformer) -> None:
    """Give `plain` the weights of `model`, every one of them and each once."""
    config = model.config
    state = dict(model.state_dict())
    tables = state.pop("embedding.weight").split(config.category_sizes)
    copied = {f"tables.{category}.weight": table for category, table in enumerate(tables)}
    for kind in ("weight", "bias"):
        for category, part in enumerate(state.pop(f"heads.{kind}").split(config.category_sizes)):
            copied[f"heads.{category}.{kind}"] = part
    for name in ("source_positions", "target_positions"):
        copied[f"{name}.weight"] = getattr(model, name).table
        state.pop(f"{name}.table", None)
    for stream in range(config.num_streams):
        own = model.encoders.stream(stream)
        copied |= {plain_name(f"encoders.{stream}.{name}"): value for name, value in own.items()}
    for name, value in state.items():
        if not name.startswith("encoders."):
            copied.setdefault(plain_name(name), value)
    for layer in range(config.decoder_layers):
        for kind in ("weight", "bias"):
            # torch packs query, key and value of an attention in one projection.
            parts = [copied.pop(f"decoder.layers.{layer}.{part}.{kind}") for part in ("query", "key_value")]
            copied[f"decoder.layers.{layer}.multihead_attn.in_proj_{kind}"] = torch.cat(parts)
    plain.load_state_dict(copied, strict=True)


RENAMED = (
    (".cross_attention_norm.", ".norm2."),
    (".cross_attention.out.", ".multihead_attn.out_proj."),
    (".cross_attention.", "."),
    (".attention_norm.", ".norm1."),
    (".attention.qkv.", ".self_attn.in_proj_"),
    (".attention.out.", ".self_attn.out_proj."),
    (".feed_forward.0.", ".linear1."),
    (".feed_forward.2.", ".linear2."),
)


def plain_name(name: str) -> str:
    """The name that torch's transformer layers give to a weight of EventTransformer."""
    is_decoder = name.startswith("decoder.")
    name = f"decoder.layers.{name.removeprefix('decoder.')}" if is_decoder else name
    name = f"decoder.{name}" if name.startswith("norm.") else name
    for ours, theirs in (*RENAMED, (".feed_forward_norm.", ".norm3." if is_decoder else ".norm2.")):
        name = name.replace(ours, theirs)
    return name


def compiled(model: EventTransformer) -> nn.Module:
    """The plain model under torch.compile."""
    plain = PlainEventTransformer(model)
    plain.compile()
    return plain


EVENT_TRANSFORMER = (
    Peer("plain torch", PlainEventTransformer),
    Peer("plain torch, compiled", compiled, is_slow_to_start=True),
)


class TableLoop(nn.Module):
    """One F.embedding a table, as plain model code has it."""

    def __init__(self, weight: Tensor, table_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(table) for table in weight.split(table_sizes))

    def prepare(self, ids: Tensor) -> Tensor:
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        total = torch.zeros((), device=ids.device)
        for column, table in enumerate(self.tables):
            rows = F.embedding(ids[:, column], table)
            total = total + rows if column else rows
        return total


class PackedTable(nn.Module):
    """All tables in one weight, ids moved to their tables' rows: F.embedding and a sum, or F.embedding_bag."""

    first_rows: Tensor

    def __init__(self, weight: Tensor, table_sizes: tuple[int, ...], *, is_bag: bool, is_offset_before: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.is_bag = is_bag
        self.is_offset_before = is_offset_before
        sizes = torch.tensor(table_sizes, device=weight.device)
        self.register_buffer("first_rows", sizes.cumsum(0) - sizes)

    def prepare(self, ids: Tensor) -> Tensor:
        return ids + self.first_rows.to(ids.dtype) if self.is_offset_before else ids

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids if self.is_offset_before else ids + self.first_rows.to(ids.dtype)
        if self.is_bag:
            return F.embedding_bag(rows, self.weight, mode="sum")
        return F.embedding(rows, self.weight).sum(1)


class FbgemmTables(nn.Module):
    """FBGEMM's table-batched embedding with dense gradients, which concatenates, and a sum over the tables."""

    def __init__(self, weight: Tensor, table_sizes: tuple[int, ...]) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
        self.num_tables, self.dim = len(table_sizes), weight.shape[1]
        specs = [(size, self.dim) for size in table_sizes]
        self.tables = DenseTableBatchedEmbeddingBagsCodegen(
            specs, pooling_mode=PoolingMode.SUM, use_cpu=weight.device.type == "cpu"
        )
        self.tables.weights = nn.Parameter(weight.flatten())

    def prepare(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.long().t().flatten(), torch.arange(ids.numel() + 1, device=ids.device)

    def forward(self, prepared: tuple[Tensor, Tensor]) -> Tensor:
        return self.tables(*prepared).view(-1, self.num_tables, self.dim).sum(1)


def has_fbgemm() -> bool:
    """Whether FBGEMM is here and loads beside this torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fbgemm_gpu
    except (ImportError, OSError):
        return False
    return fbgemm_gpu is not None


def compiled_module(build: Callable[..., nn.Module], weight: Tensor, sizes: tuple[int, ...]) -> nn.Module:
    """A peer under torch.compile."""
    module = build(weight, sizes)
    module.compile(dynamic=False)
    return module


MULTI_EMBEDDING = (
    Peer("F.embedding_bag, packed", partial(PackedTable, is_bag=True, is_offset_before=False)),
    Peer("F.embedding_bag, packed, ids offset before", partial(PackedTable, is_bag=True, is_offset_before=True)),
    Peer("F.embedding, packed", partial(PackedTable, is_bag=False, is_offset_before=False)),
    Peer("F.embedding, loop", TableLoop),
    Peer("F.embedding, loop compiled", partial(compiled_module, TableLoop), is_slow_to_start=True),
    *((Peer("FBGEMM dense TBE", FbgemmTables, is_float32_only=True),) if has_fbgemm() else ()),
)


class HeadLoop(nn.Module):
    """One linear head and F.cross_entropy after another, as plain model code has it."""

    def __init__(self, weight: Tensor, head_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ParameterList(nn.Parameter(head) for head in weight.split(head_sizes))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        losses = [F.cross_entropy(F.linear(hidden, head), targets[:, column]) for column, head in enumerate(self.heads)]
        return torch.stack(losses)


class OneProduct(nn.Module):
    """All logits from one product with the packed weight, then F.cross_entropy on each head's part."""

    def __init__(self, weight: Tensor, head_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.head_sizes = head_sizes

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        parts = F.linear(hidden, self.weight).split(self.head_sizes, 1)
        return torch.stack([F.cross_entropy(part, targets[:, column]) for column, part in enumerate(parts)])


class LinearCrossEntropyLoop(HeadLoop):
    """torch's own fused F.linear_cross_entropy, head after head; chunked, or not (its reference path)."""

    def __init__(self, weight: Tensor, head_sizes: tuple[int, ...], *, is_chunked: bool) -> None:
        super().__init__(weight, head_sizes)
        self.options = torch.nn.LinearCrossEntropyOptions() if is_chunked else None

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        losses = [
            F.linear_cross_entropy(hidden, head, targets[:, column], options=self.options)
            for column, head in enumerate(self.heads)
        ]
        return torch.stack(losses)


class LigerLoop(HeadLoop):
    """Liger-Kernel's fused linear cross-entropy, head after head; for CUDA."""

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        losses = [fused(hidden, head, targets[:, column]) for column, head in enumerate(self.heads)]
        return torch.stack(losses)


class CutCrossEntropyLoop(HeadLoop):
    """Apple's Cut Cross Entropy, head after head; for CUDA and 16-bit inputs."""

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        losses = [linear_cross_entropy(hidden, head, targets[:, column]) for column, head in enumerate(self.heads)]
        return torch.stack(losses)


MULTI_HEAD_CROSS_ENTROPY: tuple[Peer, ...] = (
    Peer("F.cross_entropy, loop", HeadLoop),
    Peer("F.cross_entropy, loop compiled", partial(compiled_module, HeadLoop), is_slow_to_start=True),
    Peer("one product", OneProduct),
    Peer("one product compiled", partial(compiled_module, OneProduct), is_slow_to_start=True),
)
if hasattr(F, "linear_cross_entropy"):
    MULTI_HEAD_CROSS_ENTROPY += (
        Peer("F.linear_cross_entropy, loop", partial(LinearCrossEntropyLoop, is_chunked=False)),
        Peer("F.linear_cross_entropy, loop, chunked", partial(LinearCrossEntropyLoop, is_chunked=True)),
    )
if torch.cuda.is_available() and find_spec("liger_kernel"):
    MULTI_HEAD_CROSS_ENTROPY += (Peer("Liger-Kernel, loop", LigerLoop),)
if torch.cuda.is_available() and find_spec("cut_cross_entropy"):
    MULTI_HEAD_CROSS_ENTROPY += (Peer("Cut Cross Entropy, loop", CutCrossEntropyLoop),)
