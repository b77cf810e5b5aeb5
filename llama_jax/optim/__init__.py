"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from llama_jax.optim.adafactor import Adafactor
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import OptimizerConfig
from llama_jax.optim.lion import Lion
from llama_jax.optim.muon import Muon

REGISTRY: dict[str, type[OptimizerConfig]] = {
    'adamw': AdamW,
    'muon': Muon,
    'lion': Lion,
    'adafactor': Adafactor,
}
"""Name -> class: what --optimizer can name, and what a record can hold. A record of before there
were several is of the first."""
