"""Fused ops for models of event sequences. A folder is an op: its reference, its kernels, one public function."""

from eventkern.ops import flops
from eventkern.ops.attention.api import attention
from eventkern.ops.multi_embedding.api import multi_embedding
from eventkern.ops.multi_head_cross_entropy.api import multi_head_cross_entropy
from eventkern.ops.switches import check_inputs, use_reference

__all__ = [
    "attention",
    "check_inputs",
    "implementations",
    "multi_embedding",
    "multi_head_cross_entropy",
    "use_reference",
]

flops.register()


def implementations() -> dict[str, dict[str, str]]:
    """Which implementation serves each op on each device type: {op: {device type: name}}."""
    served = {"cpu": "C++", "cuda": "Triton", "mps": "reference"}
    flash = {"cpu": "C++", "cuda": "torch", "mps": "torch"}
    return {"attention": flash, "multi_embedding": served, "multi_head_cross_entropy": served}
