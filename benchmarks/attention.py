"""Cost of attention against length, all keys beside a window: `python -m benchmarks.attention`.

Forward and backward of one attention layer, by the backend that `auto` takes here. Floating-point
operations are those of the compiled program; times are medians, all patterns by turns. First, at
the shortest length, the gradients are compared with those of the backend `reference`: the norm of
the difference by the norm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from llama_jax import layout, mesh
from llama_jax.mesh import MeshConfig
from llama_jax.model import kernels
from llama_jax.model.config import AttentionBackend
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dense, Dilated, Pattern, Window
from llama_jax.precision import Precision, dtype


@dataclass(frozen=True)
class Options:
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    window: int = 256
    """Keys that a query sees under the patterns."""
    heads: int = 6
    kv_heads: int = 6
    head_dim: int = 48
    causal: bool = True
    precision: Precision = 'float32'
    backend: AttentionBackend = 'auto'
    runs: int = 5


def patterns(window: int) -> dict[str, Pattern]:
    """By name; each lets a query see about `window` keys."""
    return {
        'dense': Dense(),
        'window': Window(window),
        'dilated by 4': Dilated(window, 4),
        'blocks, 8 global': BlockGlobal(window, 8),
    }


def prepared(
    options: Options, pattern: Pattern, length: int
) -> tuple[float, Callable[[], tuple[jax.Array, ...]]]:
    """FLOPs of the compiled program, and a function that runs it once and gives the gradients."""
    segment_BT = jnp.ones((1, length), jnp.int32, out_sharding=layout.act('BT'))

    def loss(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        visible = Visibility(segment_BT, segment_BT, causal=options.causal, pattern=pattern)
        out_BTNH = kernels.attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend=options.backend)
        return jnp.square(out_BTNH.astype(jnp.float32)).sum()

    arrays = [
        jax.random.normal(key, (1, length, n, options.head_dim), dtype(options.precision))
        for key, n in zip(
            jax.random.split(jax.random.key(0), 3),
            (options.heads, options.kv_heads, options.kv_heads),
            strict=True,
        )
    ]
    arrays = [jax.reshard(x, layout.act('BTNH')) for x in arrays]
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    analysis = program.cost_analysis() or {}
    return analysis.get('flops', float('nan')), lambda: jax.block_until_ready(program(*arrays))


def difference(options: Options, pattern: Pattern) -> float:
    """Of the gradients from those of the reference, at the shortest length."""
    length = min(options.lengths)
    ours, theirs = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.device_get(run())])
        for _, run in (
            prepared(replace(options, backend=backend), pattern, length)
            for backend in (options.backend, 'reference')
        )
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main() -> None:
    options = tyro.cli(Options, prog='python -m benchmarks.attention', description=__doc__)
    names = list(patterns(options.window))
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {options}')
    print('length   ' + ''.join(f'{name:>27}' for name in names))
    with jax.set_mesh(mesh.make(MeshConfig(), jax.devices()[:1])):
        differences = [difference(options, p) for p in patterns(options.window).values()]
        print('reference' + ''.join(f'{d:27.1e}' for d in differences), flush=True)
        for length in options.lengths:
            ready = {
                name: prepared(options, pattern, length)
                for name, pattern in patterns(options.window).items()
            }
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(options.runs + 1):
                for name, (_, run) in ready.items():
                    start = time.perf_counter()
                    run()
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - start)
            cells = []
            for name in names:
                milliseconds = statistics.median(seconds[name]) * 1e3
                cells.append(f'{ready[name][0] / 1e9:10.2f} GFLOP {milliseconds:7.1f} ms')
            print(f'{length:6}   ' + ''.join(cells))


if __name__ == '__main__':
    main()
