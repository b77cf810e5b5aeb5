"""Grouped-query attention (Ainslie et al. 2023): of a sequence to itself, or to another."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model import kernels
from llama_jax.model.cache import LayerCache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.linear import bias, close, in_use, project, shifted
from llama_jax.model.masks import Visibility
from llama_jax.model.rope import Rotation, rotate


class Attention(nnx.Module):
    """Projections of one attention layer. `sublayers` add to the residual stream in all."""

    def __init__(self, config: ModelConfig, *, sublayers: int, key: jax.Array):
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_dim
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        # Drawn as matrices: a CPU takes four times as long to compile a draw of three dimensions.
        self.q_DNH = nnx.Param(fan_in(q_key, (D, N * H), D).reshape(D, N, H))
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
        memory_BSD: jax.Array | None = None,
        cache: LayerCache | None = None,
        at_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend from `x_BTD` to `memory_BSD`, or to itself. A cache is written from place `at_B`
        on, and what it held before is attended to as well; `at_B` None: it held nothing."""
        dtype = x_BTD.dtype
        q_DNH = in_use(self.q_DNH, 'DNH', dtype)
        k_DKH = in_use(self.k_DKH, 'DKH', dtype)
        v_DKH = in_use(self.v_DKH, 'DKH', dtype)
        out_NHD = in_use(self.out_NHD, 'NHD', dtype)

        source_BSD = x_BTD if memory_BSD is None else memory_BSD
        q_BTNH = shifted(project(x_BTD, q_DNH, 'DNH'), self.q_bias_NH, 'NH')
        k_BSKH = shifted(project(source_BSD, k_DKH, 'DKH'), self.k_bias_KH, 'KH')
        v_BSKH = shifted(project(source_BSD, v_DKH, 'DKH'), self.v_bias_KH, 'KH')
        if rope is not None:
            q_BTNH, k_BSKH = rotate(q_BTNH, rope), rotate(k_BSKH, rope)
        q_BTNH = checkpoint_name(q_BTNH, 'query')
        k_BSKH = checkpoint_name(k_BSKH, 'key')
        v_BSKH = checkpoint_name(v_BSKH, 'value')
        if cache is not None:
            cache = cache.write(k_BSKH, v_BSKH, at_B=at_B)
        if cache is None or at_B is None:
            attended_BTNH = kernels.attend(
                q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=compute.attention
            )
        else:
            attended_BTNH = kernels.attend_cached(
                q_BTNH, cache.k_BKHS, cache.v_BKSH, visible=visible, backend=compute.attention
            )
        attended_BTNH = checkpoint_name(attended_BTNH, 'attended')
        out_BTD = close(attended_BTNH, out_NHD, 'NHD')
        return shifted(out_BTD, self.out_bias_D, 'D'), cache
