"""One setting for numerical precision: parameters are float32, compute is float32 or bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import jax
import jax.numpy as jnp

Precision = Literal['float32', 'bfloat16']


def dtype(precision: Precision) -> jnp.dtype:
    """Type of activations and of weights in use. Parameters at rest are always float32."""
    return jnp.dtype(precision)


def matmuls(precision: Precision) -> AbstractContextManager:
    """Scope in which float32 matrix products are float32 on TPU and GPU too.

    By default these multiply float32 inputs at the precision of bfloat16 or TF32.
    """
    return jax.default_matmul_precision('highest' if precision == 'float32' else 'default')
