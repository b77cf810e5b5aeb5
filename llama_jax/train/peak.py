"""Peak FLOP/s of a device, the denominator of MFU."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp

_DATASHEET_BF16 = {
    'TPU v4': 275e12,
    'TPU v5 lite|TPU v5e': 197e12,
    'TPU v5|TPU v5p': 459e12,
    'TPU v6 lite|TPU v6e': 918e12,
    'TPU7x': 2307e12 / 2,  # a chip is two devices
    'NVIDIA A100(-SXM4|-PCIE)?[- ](40|80)GB( PCIe)?': 312e12,
    'NVIDIA A10': 125e12,
    'NVIDIA A10G': 70e12,
    'NVIDIA L4': 121e12,
    'NVIDIA L40': 181.05e12,
    'NVIDIA L40S': 362.05e12,
    'NVIDIA GeForce RTX 4090': 165.2e12,  # sums in float32
    r'NVIDIA H100 \d+GB HBM\w+': 989.4e12,  # SXM5
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835.5e12,
    'NVIDIA H200': 989.4e12,  # SXM5
    'NVIDIA H200 (NVL|PCIe)': 835.5e12,
    r'NVIDIA GH200 \d+GB?( HBM\w+)?': 989.4e12,
    'NVIDIA B200': 2250e12,
    'NVIDIA B300( SXM6 AC)?': 2250e12,
    'NVIDIA GB200|NVIDIA GB300': 2500e12,
}
"""FLOP/s of dense matrices by the whole `device_kind`, as regular expressions. Vendors often print
twice as much, for matrices of which half is zero. One name stands for cards of several speeds: a
part of it is no match, so that a laptop's RTX 4090, a slice of a GPU (MIG) or an H100 of unsaid
form have no peak, and not a wrong one."""


def datasheet(kind: str) -> float | None:
    """bfloat16 FLOP/s of the device that JAX calls `kind`; None where it is not known."""
    found = (peak for name, peak in _DATASHEET_BF16.items() if re.fullmatch(name, kind))
    return next(found, None)


def peak_flops(device: jax.Device) -> tuple[float | None, str]:
    """FLOP/s of one device and where the figure is from; None for a device not known."""
    kind = device.device_kind
    peak = datasheet(kind)
    if peak is not None:
        return peak, f'datasheet of {kind}, dense bfloat16'
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
