"""Counts of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What the engine is doing and has done; totals since it was made."""

    rows: int
    rows_busy: int
    waiting: int
    requests_total: dict[str, int]
    """By finish reason."""
    prompt_tokens_total: int
    cached_tokens_total: int
    """Of these, how many a row held already."""
    generated_tokens_total: int
    steps_total: int
    """Steps of decoding, of all rows at once."""
    drafted_tokens_total: int
    accepted_tokens_total: int
    """Drafts that are part of a text."""
    uptime_seconds: float
