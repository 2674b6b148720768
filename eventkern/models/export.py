"""The inference path as a file that torch runs alone: no class of this package, and none of its kernels."""

import functools
import io
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eventkern.models.event_transformer import EventTransformer
from eventkern.modes import evaluating


class Logits(nn.Module):
    """Known events to the logits of every category of the event after each."""

    def __init__(self, model: EventTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, sources: Tensor, events: Tensor) -> dict[str, Tensor]:
        states = self.model.decode(events, self.model.encode(sources))
        return {name: self.model.heads.logits(states, head) for head, name in enumerate(self.model.head_names)}


def export_logits(model: EventTransformer) -> ExportedProgram:
    """Traces a model's inference path.

    The program takes `sources` (B, K, S, C) and `events` (B, T, C), int32 as in the batches of `eventkern.data`, and
    returns the logits (B, T, V) of each category of the event after each, by name. B is any, and T is 1 to the
    configuration's tgt_seq_len. The embedding is a lookup for each table, so that the program needs torch alone;
    weights quantised by `eventkern.nn.quantize_int8` stay 8-bit integers in it.

    Args:
        model: on the device that the program will run on; each module is left in the mode (training or not) it was
            found in.

    Returns:
        What `torch.export.save` writes, `torch.compile` compiles and AOTInductor packages.
    """
    config = model.config
    device = next(model.parameters()).device
    categories = len(model.head_names)
    sources = torch.ones(2, config.num_streams, config.src_seq_len, categories, dtype=torch.int32, device=device)
    events = torch.ones(2, config.tgt_seq_len, categories, dtype=torch.int32, device=device)
    batch = Dim("batch")
    # a dimension that can only be 1 is no dynamic one
    num_events = {1: Dim("num_events", max=config.tgt_seq_len)} if config.tgt_seq_len > 1 else {}
    shapes = {"sources": {0: batch}, "events": {0: batch, **num_events}}
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch's use of its own
        program = torch.export.export(Logits(model), (sources, events), dynamic_shapes=shapes)
        return program.run_decompositions({torch.ops.eventkern.multi_embedding.default: _embedded})


def exported_bytes(model: EventTransformer) -> bytes:
    """The content of a .pt2 file with the program of `export_logits`; `torch.export.load(path).module()` runs it."""
    file = io.BytesIO()
    torch.export.save(export_logits(model), file)
    return file.getvalue()


def _embedded(ids: Tensor, weight: Tensor, table_sizes: list[int], mode: str, check: bool) -> Tensor:
    """The op, table by table, as torch's own lookups."""
    tables = weight.split(table_sizes)
    vectors = [F.embedding(column, table) for column, table in zip(ids.unbind(-1), tables, strict=True)]
    if mode == "concat":
        return torch.cat(vectors, -1)
    total = functools.reduce(torch.add, vectors)
    return total / len(vectors) if mode == "mean" else total
