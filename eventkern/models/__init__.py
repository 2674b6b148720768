"""Models of event sequences, built on eventkern.nn."""

from eventkern.models.event_transformer import EventTransformer, EventTransformerConfig
from eventkern.models.generation import generate

__all__ = ["EventTransformer", "EventTransformerConfig", "generate"]
