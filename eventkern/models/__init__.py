"""Models of event sequences, built on eventkern.nn."""

from eventkern.models.event_transformer import EventTransformer, EventTransformerConfig

__all__ = ["EventTransformer", "EventTransformerConfig"]
