"""Grouped-query attention (Ainslie et al. 2023): of a sequence to itself, or to another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import kernels
from llama_jax.model.cache import LayerCache, LayerParts
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.linear import bias, close, in_use, project, shifted
from llama_jax.model.masks import Visibility
from llama_jax.model.rope import Rotation, rotate
from llama_jax.model.width import width_of


class Attention(nnx.Module):
    """Projections of one attention layer. `sublayers` add to the residual stream in all."""

    def __init__(self, config: ModelConfig, *, sublayers: int, key: jax.Array):
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_dim
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        # Drawn as matrices: a CPU takes four times as long to compile a draw of three dimensions.
        q_DNH = fan_in(q_key, (D, N * H), D).reshape(D, N, H)
        self.q_DNH = nnx.Param(q_DNH * width_of(config).query)
        self.k_DKH = nnx.Param(fan_in(k_key, (D, K * H), D).reshape(D, K, H))
        self.v_DKH = nnx.Param(fan_in(v_key, (D, K * H), D).reshape(D, K, H))
        self.out_NHD = nnx.Param(fan_in(out_key, (N * H, D), N * H * sublayers).reshape(N, H, D))
        self.q_bias_NH = bias(config, N, H)
        self.k_bias_KH = bias(config, K, H)
        self.v_bias_KH = bias(config, K, H)
        self.out_bias_D = bias(config, D)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        rope: Rotation | None,
        visible: Visibility,
        compute: Compute,
        memory: jax.Array | LayerCache | None = None,
        memory_rope: Rotation | None = None,
        cache: LayerCache | None = None,
        at_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend from `x_BTD` to itself, or to a memory [B, S, D], whose keys are rotated by
        `memory_rope`, or to its `keys_and_values`. A cache is written from place `at_B` on, and
        what it held before is attended to as well; `at_B` None: it held nothing."""
        dtype = x_BTD.dtype
        q_DNH = in_use(self.q_DNH, 'DNH', dtype)
        out_NHD = in_use(self.out_NHD, 'NHD', dtype)
        q_BTNH = shifted(project(x_BTD, q_DNH, 'DNH'), self.q_bias_NH, 'NH')
        if rope is not None:
            q_BTNH = rotate(q_BTNH, rope)
        q_BTNH = checkpoint_name(q_BTNH, 'query')
        kept = memory if isinstance(memory, LayerCache | LayerParts) else None
        if not isinstance(memory, LayerCache | LayerParts):
            read = (x_BTD, rope) if memory is None else (memory, memory_rope)
            k_BSKH, v_BSKH = self._projected(*read)
            if cache is not None:
                cache = cache.write(k_BSKH, v_BSKH, at_B=at_B, pattern=visible.pattern)
                kept = None if at_B is None else cache
        if kept is None:
            attended_BTNH = kernels.attend(
                q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=compute.attention
            )
        else:
            attended_BTNH = kept.attend(q_BTNH, visible=visible, backend=compute.attention)
        attended_BTNH = checkpoint_name(attended_BTNH, 'attended')
        out_BTD = close(attended_BTNH, out_NHD, 'NHD')
        return shifted(out_BTD, self.out_bias_D, 'D'), cache

    def keys_and_values(self, memory_BSD: jax.Array) -> LayerCache:
        """Of a memory that is attended to again and again."""
        k_BSKH, v_BSKH = self._projected(memory_BSD, None)
        return LayerCache(jnp.einsum('BSKH->BKHS', k_BSKH), jnp.einsum('BSKH->BKSH', v_BSKH))

    def _projected(
        self, source_BSD: jax.Array, rope: Rotation | None
    ) -> tuple[jax.Array, jax.Array]:
        dtype = source_BSD.dtype
        k_DKH = in_use(self.k_DKH, 'DKH', dtype)
        v_DKH = in_use(self.v_DKH, 'DKH', dtype)
        k_BSKH = shifted(project(source_BSD, k_DKH, 'DKH'), self.k_bias_KH, 'KH')
        v_BSKH = shifted(project(source_BSD, v_DKH, 'DKH'), self.v_bias_KH, 'KH')
        if rope is not None:
            k_BSKH = rotate(k_BSKH, rope)
        return checkpoint_name(k_BSKH, 'key'), checkpoint_name(v_BSKH, 'value')
