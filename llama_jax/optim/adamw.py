"""AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optax

from llama_jax.optim.base import Limit, Moments, OptimizerConfig, check_stored, share, stored


@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW. Defaults are LLaMA's (Touvron et al. 2023, section 2.3)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments: Moments = 'float32'
    """How both moments are stored: 'bfloat16' takes 4 bytes per parameter less (DeepSeek-AI 2024,
    section 3.3). They are updated in float32 all the same."""

    def directions(self) -> optax.GradientTransformation:
        return adam(self)

    def limits(self) -> tuple[Limit, ...]:
        return adam_limits(self)

    def check(self) -> None:
        super().check()
        check_stored(self.moments, beta1=self.beta1, beta2=self.beta2)


def adam_limits(config: Any) -> tuple[Limit, ...]:
    """Of the settings that `adam` reads."""
    return (
        share('beta1', config.beta1),
        share('beta2', config.beta2),
        Limit('eps', config.eps, config.eps > 0, 'positive'),
    )


def adam(config: Any) -> optax.GradientTransformation:
    """Optax's Adam with the beta1, beta2, eps and moments of `config`."""
    return stored(optax.scale_by_adam(config.beta1, config.beta2, config.eps), config.moments)
