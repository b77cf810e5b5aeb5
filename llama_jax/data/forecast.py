"""How far some rows of a plan will read, and how many it takes to read so far.

Both follow from lengths alone. What is beyond a sample of the first rows is extrapolated: blocks
are shuffled, so that every window is packed about alike.
"""

from __future__ import annotations

import itertools

from llama_jax.data.plan import Plan

SAMPLE = 16_384
"""Rows that are planned to measure, of as many tokens at most:"""
TOKENS = 2**25
LEAST = 1024
"""Rows that are planned however long they are."""

Read = tuple[tuple[int, int], ...]
"""(units, documents) of each source."""


def reading(plan: Plan, rows: int) -> Read:
    """What the first `rows` (1 or more) of an endless plan read."""
    planned = min(rows, _sample(plan))
    *_, (_, cursor) = itertools.islice(plan.rows(plan.beginning()), planned)
    share = rows / planned
    return tuple((round(share * units), round(share * n)) for units, n in cursor.read)


def rows_for(plan: Plan, units: float) -> float:
    """Rows of an endless plan that read so many units, of all sources together."""
    read, sample = 0, _sample(plan)
    for row, (_, cursor) in enumerate(plan.rows(plan.beginning()), start=1):
        read = sum(of_source for of_source, _ in cursor.read)
        if read >= units:
            return row
        if row == sample:
            break
    return units * sample / read


def _sample(plan: Plan) -> int:
    return min(SAMPLE, max(LEAST, TOKENS // plan.seq_len))
