"""Modules that own parameters and call the ops."""

from eventkern.nn.attention import CrossAttention, SelfAttention
from eventkern.nn.embedding import MultiEmbedding
from eventkern.nn.heads import MultiHeadCrossEntropy

__all__ = ["CrossAttention", "MultiEmbedding", "MultiHeadCrossEntropy", "SelfAttention"]
