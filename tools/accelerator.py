"""Which extra of setup.py brings JAX for the accelerator of this machine.

usage: python tools/accelerator.py auto|cuda|cuda12|cuda13|tpu|cpu

Prints the name of the extra, or nothing for a CPU; on standard error, what was found and decided.
`auto` takes CUDA where there is a GPU that it runs on, and `cuda` wants one. Other names are taken
as they are, as for an image that is built on a machine without a GPU. Needs no package: it runs
before anything is installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any, NamedTuple

NAMES = ('auto', 'cuda', 'cuda12', 'cuda13', 'tpu', 'cpu')


class Gpus(NamedTuple):
    """What the driver says."""

    cuda: int
    """The newest CUDA that it runs: 13000 is 13.0, since driver 580; 12000 is 12.0, since 525."""
    capabilities: tuple[tuple[int, int], ...]
    """Of each GPU, such as (9, 0)."""


NEEDS = (('cuda13', 13000, (7, 5)), ('cuda12', 12000, (5, 2)))
"""The extra, the CUDA of the driver and the compute capability that it needs, newest first:
https://docs.jax.dev/en/latest/installation.html"""


class NoneFits(Exception):  # noqa: N818  what is asked for cannot be had here
    """The message says why, and what to do."""


def gpus(load: Any = ctypes.CDLL) -> Gpus | None:
    """What libcuda says, which JAX itself loads. None where there is no driver or no GPU.

    Raises NoneFits where there is a GPU that the driver's library does not get at.
    """
    try:
        cuda = load('libcuda.so.1')
    except OSError:
        if os.path.exists('/proc/driver/nvidia/version') or os.path.exists('/dev/nvidia0'):
            raise NoneFits(
                'there is an NVIDIA driver, but libcuda.so.1 is not found: in a container give it '
                'the GPU (docker run --gpus all), else install the whole driver'
            ) from None
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0)
    if code == 100:  # no device
        return None
    if code != 0:
        raise NoneFits(
            f'the NVIDIA driver does not start (cuInit says {code}): nvidia-smi says more; a '
            'restart helps after its update'
        )
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    value, capabilities = ctypes.c_int(), []
    for number in range(count.value):
        parts = []
        for attribute in (75, 76):  # compute capability, major and minor
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
            parts.append(value.value)
        capabilities.append((parts[0], parts[1]))
    return Gpus(version.value, tuple(capabilities)) if capabilities else None


def fitting(found: Gpus) -> str:
    """The newest extra that runs on these GPUs. Raises NoneFits."""
    least = min(found.capabilities)
    for extra, cuda, capability in NEEDS:
        if found.cuda >= cuda and least >= capability:
            return extra
    if least < capability:  # that of the oldest
        raise NoneFits(
            f'the GPU has compute capability {least[0]}.{least[1]}, and JAX needs '
            f'{capability[0]}.{capability[1]} or more'
        )
    better = ', better 580' if least >= NEEDS[0][2] else ''
    raise NoneFits(
        f'the NVIDIA driver runs CUDA up to {found.cuda // 1000}.{found.cuda % 1000 // 10}, and '
        f'JAX needs 12.0: install driver 525 or newer{better}'
    )


def main(asked: str) -> str:
    """The extra. Raises NoneFits where `cuda` is asked for and cannot be had."""
    if asked not in NAMES:
        raise NoneFits(f'ACCELERATOR={asked}: it is one of {", ".join(NAMES)}')
    if asked not in ('auto', 'cuda'):
        return '' if asked == 'cpu' else asked
    here = sys.platform == 'linux' and platform.machine() in ('x86_64', 'aarch64')
    try:
        found = gpus() if here else None
        if found is None and asked == 'cuda':
            raise NoneFits(
                'ACCELERATOR=cuda: there is no NVIDIA GPU here; to install for another machine, '
                'Linux on x86_64 or aarch64, name cuda13 or cuda12'
            )
        if found is None:
            return ''
        extra = fitting(found)
    except NoneFits as reason:
        if asked == 'cuda':
            raise
        print(f'{reason}. Until then the CPU is used', file=sys.stderr)
        return ''
    n = len(found.capabilities)
    print(
        f'found {n} NVIDIA GPU{"s" * (n > 1)}: JAX comes with {extra}, 2.5 GB more to download '
        '(make ACCELERATOR=cpu leaves it out)',
        file=sys.stderr,
    )
    return extra


if __name__ == '__main__':
    try:
        print(main(sys.argv[1] if len(sys.argv) > 1 else 'auto'))
    except NoneFits as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(1) from None
