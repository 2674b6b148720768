"""Modules that own parameters and call the ops."""

from eventkern.nn.attention import CrossAttention, SelfAttention, StackedSelfAttention
from eventkern.nn.embedding import MultiEmbedding
from eventkern.nn.heads import MultiHeadCrossEntropy
from eventkern.nn.quantization import quantize_int8
from eventkern.nn.stacked import StackedLayerNorm, StackedLinear

__all__ = [
    "CrossAttention",
    "MultiEmbedding",
    "MultiHeadCrossEntropy",
    "SelfAttention",
    "StackedLayerNorm",
    "StackedLinear",
    "StackedSelfAttention",
    "quantize_int8",
]
