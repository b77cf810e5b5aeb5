"""Pre-training objectives: one file each."""

from __future__ import annotations

from llama_jax.objectives.causal import CausalLM

AnyObjective = CausalLM
"""Every objective of the house: what a configuration may hold and the command line can set."""
