"""Before any device is used: joining the processes of a run, one per host, and where compiled
programs are kept."""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.errors import UserError

COORDINATOR = 'LLAMA_JAX_COORDINATOR'
PROCESSES = 'LLAMA_JAX_PROCESSES'
PROCESS = 'LLAMA_JAX_PROCESS'


def initialize() -> None:
    """Join the other processes when the environment says that there are any; else do nothing.

    LLAMA_JAX_COORDINATOR is `host:port` of process 0, and LLAMA_JAX_PROCESSES and LLAMA_JAX_PROCESS
    say how many there are and which this is (tpu/local.py sets all three); or it is `auto`, where
    JAX finds them out by itself: on a TPU pod, under Slurm, under Open MPI. Call this before the
    first use of a device. Raises UserError for a half-set environment.
    """
    coordinator = os.environ.get(COORDINATOR)
    if not coordinator:
        return
    import jax  # here, so that tpu/local.py starts without it

    if jax.distributed.is_initialized():
        return
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    if coordinator == 'auto':
        jax.distributed.initialize()
        return
    jax.distributed.initialize(coordinator, _number(PROCESSES), _number(PROCESS))


def keep_programs(directory: Path) -> None:
    """Compiled programs are kept in `directory` and read from there the next time.

    JAX_COMPILATION_CACHE_DIR names another directory, or none where it is empty.
    """
    import jax  # here, so that tpu/local.py starts without it

    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.02)


def _number(variable: str) -> int:
    text = os.environ.get(variable, '')
    if not text.isdecimal():
        raise UserError(
            f'{variable} is {text!r}: with {COORDINATOR}=host:port it is a number; '
            f'set it, or {COORDINATOR}=auto where JAX finds the processes by itself'
        )
    return int(text)
