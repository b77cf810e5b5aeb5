"""Lion (Chen et al. 2023): the sign of a momentum."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from llama_jax.optim.base import Limit, Moments, OptimizerConfig, check_stored, share, stored


@dataclass(frozen=True)
class Lion(OptimizerConfig):
    """Lion keeps one moment, 4 bytes per parameter less than AdamW.

    Every entry moves by the whole learning rate: take 3 to 10 times less than for AdamW, and so
    many times the weight decay (section 5).
    """

    beta1: float = 0.9
    """Share of the momentum in the direction, of which the sign is taken."""
    beta2: float = 0.99
    """Decay of the momentum that is kept."""
    moments: Moments = 'float32'
    """How the momentum is stored."""

    def directions(self) -> optax.GradientTransformation:
        return stored(optax.scale_by_lion(self.beta1, self.beta2), self.moments)

    def check(self) -> None:
        super().check()
        check_stored(self.moments, beta2=self.beta2)

    def limits(self) -> tuple[Limit, ...]:
        return share('beta1', self.beta1), share('beta2', self.beta2)
