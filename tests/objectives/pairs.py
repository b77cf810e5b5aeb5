"""InfoNCE as loops over pairs in float64, and the meshes on which it is compared."""

import itertools

import jax
import numpy as np
from jax.sharding import NamedSharding

from llama_jax import layout, mesh
from llama_jax.mesh import MeshConfig

MESHES = {
    'one device': (1, MeshConfig()),
    'fsdp 8': (8, MeshConfig()),
    'data 2 fsdp 2 tensor 2': (8, MeshConfig(data=2, fsdp=2, tensor=2)),
}


def make_mesh(name):
    n_devices, config = MESHES[name]
    return mesh.make(config, jax.devices()[:n_devices])


def place(arrays, devices):
    return jax.device_put(arrays, NamedSharding(devices, layout.rows()))


def oracle(a_PD, b_PD, documents, temperature):
    """Sums over pairs and gradients of the total to a, b and the log of the temperature."""
    n = len(a_PD)
    candidate = np.array(
        [[i == j or documents[i] != documents[j] for j in range(n)] for i in range(n)]
    )
    cos = a_PD @ b_PD.T
    logit = np.where(candidate, cos / temperature, -np.inf)
    p_ab = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    p_ba = np.exp(logit) / np.exp(logit).sum(0, keepdims=True)
    total = -(np.log(np.diag(p_ab)) + np.log(np.diag(p_ba))).sum() / 2
    dlogit = (p_ab + p_ba) / 2 - np.eye(n)
    correct = (
        (logit.argmax(1) == np.arange(n)).sum() + (logit.argmax(0) == np.arange(n)).sum()
    ) / 2
    apart = [(i, j) for i, j in itertools.product(range(n), repeat=2) if candidate[i, j] and i != j]
    near = [np.exp(-2 * np.sum((a_PD[i] - b_PD[j]) ** 2)) for i, j in apart]
    return {
        'total': total,
        'weight': n,
        'correct': correct,
        'alignment': np.sum((a_PD - b_PD) ** 2),
        'uniformity': np.log(np.mean(near)),
        'candidates': candidate.sum(),
        'da': dlogit @ b_PD / temperature,
        'db': dlogit.T @ a_PD / temperature,
        'dlog_temperature': -(dlogit * np.where(candidate, cos, 0)).sum() / temperature,
    }
