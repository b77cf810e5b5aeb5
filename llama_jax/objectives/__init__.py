"""Pre-training objectives: one file each."""

from __future__ import annotations

from llama_jax.objectives.weighted import Part, Weighted

AnyObjective = Part | Weighted
"""Every objective of the house: what a configuration may hold and the command line can set."""
