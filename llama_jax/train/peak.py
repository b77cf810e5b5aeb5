"""Peak FLOP/s of a device, the denominator of MFU."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

_DATASHEET_BF16 = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
}


def peak_flops(device: jax.Device) -> tuple[float | None, str]:
    """FLOP/s of one device and where the figure is from; None for a device not known."""
    kind = device.device_kind
    for name in sorted(_DATASHEET_BF16, key=len, reverse=True):
        if kind.startswith(name):
            return _DATASHEET_BF16[name], f'datasheet of {name}, dense bfloat16'
    if device.platform == 'cpu':
        # Virtual devices share one processor: what it does is divided among them.
        share = jax.local_device_count()
        return measured_matmul() / share, 'float32 matrix product of 2048^3 measured at start'
    return None, f'no peak is known for {kind}'


def measured_matmul(size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a float32 matrix product on the first local device, the best of a few."""
    device = jax.local_devices()[0]
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


CONVENTION = (
    'MFU = model FLOPs per second / (devices x peak). Model FLOPs: 6 per weight and position '
    '(head included, embedding look-up not) and causal attention counted once, for an unpacked '
    'row; recomputation is not counted'
)
