"""Training of the same batch, by us and by others: a loss and its gradients in float32."""

import functools

import jax
import numpy as np

from llama_jax import layout, mesh
from llama_jax.convert import huggingface, huggingface_config
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute
from llama_jax.train.place import place
from tests.parity.cases import weights

COMPUTE = Compute(attention='reference')


@functools.cache
def devices():
    return mesh.make(MeshConfig(), jax.devices()[:1])


def params_of(config, seed=0):
    params = huggingface.params_from_huggingface(weights(config, seed), config)
    return jax.device_put(params, layout.shardings(params, devices()))


def ours(config, objective, batch, extra):
    """Loss, and its gradients to the model and to the objective's own parameters."""

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def mean(params, extra, batch):
        model = layers.bind(config, params)
        loss = objective.loss(model, batch, extra=extra, compute=COMPUTE, key=None)
        return loss.total / loss.weight

    with jax.set_mesh(devices()):
        return jax.device_get(mean(params_of(config), extra, place(batch, devices())))


def peer(config, *, seed=0, head=None, **settings):
    """transformers' model with our weights; with `head` [classes, D], as a classifier."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    own = huggingface_config.config_to_huggingface(config)
    tensors = {name: torch.tensor(x) for name, x in weights(config, seed).items()}
    if head is not None:
        del tensors['lm_head.weight']
        tensors['score.weight'] = torch.tensor(head)
    model = (LlamaForCausalLM if head is None else LlamaForSequenceClassification)(
        LlamaConfig(**own | settings, attn_implementation='eager')
    )
    model.load_state_dict(tensors, strict=True)
    return model


def settings(tmp_path):
    """Of a trainer of trl: on the CPU, without extras."""
    return dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        gradient_checkpointing=None,
        activation_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
    )


def assert_gradients_equal(gradients, model, config):
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    mine = huggingface.params_to_huggingface(gradients, config)
    assert len(theirs.keys() & mine.keys()) > 20
    for name in theirs.keys() & mine.keys():
        error = np.linalg.norm(mine[name] - theirs[name])
        assert error < 1e-5 * np.linalg.norm(theirs[name]) + 1e-7, name
