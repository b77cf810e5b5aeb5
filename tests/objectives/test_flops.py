"""Model FLOPs against the count of the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llama_jax import mesh
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.patterns import BlockGlobal, Dilated, Window, mask
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import places_in
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.objectives.retromae import RetroMAE

COMPUTE = Compute(attention='reference')  # forms all pairs of query and key
CONFIG = ModelConfig(
    vocab=384, dim=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=320, context=256
)


@pytest.mark.parametrize('T', [32, 256])
def test_equals_the_count_of_the_compiler(T):
    B = 2

    def loss(params, token_BT):
        # Unrolled: the compiler counts a loop's body once, however often it runs.
        logits_BTV, _ = layers.bind(CONFIG, layers.unstack(params))(token_BT, compute=COMPUTE)
        return jnp.sum(jnp.square(logits_BTV))

    key = jax.random.key(0)
    with jax.set_mesh(mesh.make(MeshConfig(), jax.devices()[:1])):
        params = jax.eval_shape(lambda: layers.split(Transformer(CONFIG, key=key)))
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
        counted = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()
    # The compiler also counts norms, activations and softmax: a few per cent at this size.
    all_pairs = decoder_flops(CONFIG, T, causal=False) * B * T
    assert 1.0 < counted['flops'] / all_pairs < 1.05


def test_causal_attention_is_counted_once():
    T = 64
    masked = T * T - T * (T + 1) // 2  # pairs of query and key per head that the mask removes
    forward = CONFIG.layers * masked * CONFIG.heads * 2 * 2 * CONFIG.head_dim
    causal = CausalLM().flops(CONFIG, T) * T
    assert causal == pytest.approx(decoder_flops(CONFIG, T, causal=False) * T - 3 * forward)


def test_a_published_count():
    """Llama 3.1 405B (Grattafiori et al. 2024, section 3.4): 3.8e25 FLOPs for 15.6T tokens."""
    config = ModelConfig(
        vocab=128256,
        dim=16384,
        layers=126,
        heads=128,
        kv_heads=8,
        head_dim=128,
        ffn=53248,
        context=8192,
    )
    assert decoder_flops(config, 8192, causal=True) * 15.6e12 == pytest.approx(3.8e25, rel=0.05)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('pattern', [Window(5), Dilated(3, 2), BlockGlobal(8, 2)])
def test_a_sparse_pattern_is_counted_by_its_mask(pattern, causal):
    T = 64
    sparse = dataclasses.replace(CONFIG, pattern=pattern)
    saved = decoder_flops(CONFIG, T, causal=causal) - decoder_flops(sparse, T, causal=causal)
    dense = T * (T + 1) / 2 if causal else T * T
    pairs = dense - mask(pattern, T, T, causal=causal).sum()
    assert saved * T == pytest.approx(
        6 * CONFIG.layers * 2 * CONFIG.heads * CONFIG.head_dim * pairs
    )


def test_what_stands_beside_the_model_by_hand():
    """Weights and pairs of query and key, 6 FLOPs each in training and 2 in a forward pass."""
    T, D, V = 64, CONFIG.dim, CONFIG.vocab
    wide, narrow = (n * CONFIG.head_dim for n in (CONFIG.heads, CONFIG.kv_heads))
    weights = 2 * D * wide + 2 * D * narrow + 3 * D * CONFIG.ffn  # of a layer

    def layers_of(n, keys):
        return n * (weights + 2 * wide * keys)

    causal, full = (layers_of(CONFIG.layers, keys) for keys in ((T + 1) / 2, T))
    # The teacher has a forward pass; two matrices predict its features.
    latent = 6 * (causal + V * D) + 2 * causal + 6 * 2 * D * CONFIG.ffn
    assert LatentPrediction().flops(CONFIG, T) == pytest.approx(latent)
    assert DenseRetrieval().flops(CONFIG, T) == pytest.approx(6 * full)
    # Half of a row are queries and half keys, which have a forward pass; each place of the queries
    # meets the queue, which has no gradient.
    halves = layers_of(CONFIG.layers, T / 2)
    queue = places_in(T // 2) * 100 * D
    moco = (6 + 2) / 2 * halves + 4 * queue / T
    assert MomentumContrast(queue=100).flops(CONFIG, T) == pytest.approx(moco)
    # One layer more, and the head at every token but the begin token; a vector for each token.
    bert = 6 * (full + V * D * MaskedLM(rate=0.3).selected(T - 1) / T)
    decoder = 6 * (layers_of(1, T) + V * D * (T - 1) / T) + 4 * T * D
    assert RetroMAE(rate=0.3).flops(CONFIG, T) == pytest.approx(bert + decoder)
