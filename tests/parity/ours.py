"""Our side of the comparison: the converted model's logits, loss and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax import layout, mesh
from llama_jax.convert import huggingface
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute

DEFAULT = Compute()


def results(config, tensors, token_BT, compute=DEFAULT):
    """Logits [B, T, V], loss and gradients by name of the Hugging Face tensor, all numpy."""
    one = mesh.make(MeshConfig(), jax.devices()[:1])
    params = huggingface.params_from_huggingface(tensors, config)
    with jax.set_mesh(one):
        params = jax.device_put(params, layout.shardings(params, one))
        (loss, logits_BTV), gradients = _evaluate(config, compute)(params, jnp.asarray(token_BT))
    return (
        np.asarray(logits_BTV),
        np.asarray(loss),
        huggingface.params_to_huggingface(gradients, config),
    )


@functools.cache
def _evaluate(config, compute):
    def loss(params, token_BT):
        logits_BTV, _ = layers.bind(config, params)(token_BT, compute=compute)
        # Not by index: to pick from a sharded vocabulary would move data.
        target_BTV = jax.nn.one_hot(token_BT[:, 1:], config.vocab)
        return optax.softmax_cross_entropy(logits_BTV[:, :-1], target_BTV).mean(), logits_BTV

    return jax.jit(jax.value_and_grad(loss, has_aux=True))
