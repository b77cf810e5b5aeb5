"""Training speed beside Hugging Face transformers: `python -m benchmarks.train`.

The same shape, batch, precision and AdamW, side by side in one run: windows of steps alternate
between the contestants, and medians are compared, so that a noisy machine disturbs both alike. The
peer needs the extra `parity` (PyTorch and transformers); without it our figures stand alone.
On an accelerator: `python -m benchmarks.train --preset llama3_2_1b --compute.precision bfloat16`.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

import configs
from benchmarks.text import token_rows
from experiments import cli
from llama_jax import layout, trees
from llama_jax import mesh as meshes
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import ScheduleConfig, schedule
from llama_jax.train.peak import measured_matmul, peak_flops
from llama_jax.train.step import initial_state, train_step

SMALL = ModelConfig(
    vocab=32000,
    dim=288,
    layers=6,
    heads=6,
    kv_heads=6,
    head_dim=48,
    ffn=768,
    context=256,
    tied=False,
)

Steps = Callable[[int], float]
"""Takes so many steps and returns the last loss; the work is done when it returns."""


@dataclass(frozen=True)
class Options:
    preset: str = 'small'
    """'small' (24 million parameters, vocabulary 32,000), or the name of a configuration."""
    batch: int = 16
    seq_len: int = 256
    windows: int = 5
    """Timed windows of each contestant."""
    steps: int = 4
    """Steps per window."""
    peers: bool = True
    """Also measure transformers, eager and compiled, where it is installed."""
    compute: Compute = field(default_factory=Compute)
    json: Path | None = None


def main(options: Options) -> None:
    model = SMALL if options.preset == 'small' else configs.get(options.preset).model
    model = replace(model, context=options.seq_len)
    rows = token_rows(options.batch, options.seq_len + 1, model.vocab)
    contestants: dict[str, Steps] = {'llama_jax': ours(model, options, rows)}
    if options.peers and jax.default_backend() == 'cpu':
        if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
            contestants['transformers eager'] = theirs(model, rows, compiled=False)
            contestants['transformers torch.compile'] = theirs(model, rows, compiled=True)
        else:
            print("transformers is absent: pip install '.[parity]' to compare")

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, take in contestants.items():
        print(f'{name}: compiling and warming up; loss {take(2):.3f}', flush=True)
    for window in range(options.windows):
        for name, take in contestants.items():
            begin = time.perf_counter()
            take(options.steps)
            seconds[name].append((time.perf_counter() - begin) / options.steps)
        shown = ', '.join(f'{name} {s[-1]:.3f}' for name, s in seconds.items())
        print(f'window {window + 1}/{options.windows}, seconds per step: {shown}', flush=True)

    flops = CausalLM().flops(model, options.seq_len)
    peak, source = peak_flops(jax.devices()[0])
    if jax.default_backend() == 'cpu':
        peak, source = measured_matmul(), 'float32 2048^3 matrix product in this run'
    n_tokens = options.batch * options.seq_len
    result = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        result[name] = {
            'tokens_per_second': n_tokens / median,
            'tflops': n_tokens * flops / median / 1e12,
            'mfu': n_tokens * flops / median / peak / jax.device_count() if peak else None,
            'ratio_of_ours': median / statistics.median(seconds['llama_jax']),
        }
    print(f'\n{trees_size(model):,} parameters, {options.batch} x {options.seq_len} tokens,')
    print(f'{options.compute.precision}; peak {peak or 0:.3g} FLOP/s: {source}')
    print(f'{"":28} tokens/s   TFLOP/s   MFU    llama_jax is')
    for name, r in result.items():
        mfu = f'{r["mfu"]:6.1%}' if r['mfu'] else '     -'
        print(
            f'{name:28} {r["tokens_per_second"]:8,.0f}  {r["tflops"]:8.3f}  {mfu}'
            f'  {r["ratio_of_ours"]:.2f} times as fast'
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def trees_size(model: ModelConfig) -> int:
    from llama_jax.model import layers

    return trees.size(layers.abstract(model))


def ours(model: ModelConfig, options: Options, rows_BT: np.ndarray) -> Steps:
    """The step that experiments.pretrain runs, on one batch."""
    mesh = meshes.make(MeshConfig())
    config = AdamW(schedule=ScheduleConfig(peak=3e-4, warmup_steps=10, kind='constant'))
    tx = optimizer(config)
    state = initial_state(model, CausalLM(), tx, seed=0, mesh=mesh)
    step = train_step(
        model,
        CausalLM(),
        tx,
        learning_rate=schedule(config.schedule, 1000),
        accumulate=1,
        compute=options.compute,
    )
    B, T = rows_BT[:, 1:].shape
    host = {
        'inputs': rows_BT[:, :-1],
        'targets': rows_BT[:, 1:],
        'weights': np.ones((B, T), np.float32),
        'segments': np.ones((B, T), np.int32),
        'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }
    with jax.set_mesh(mesh):
        batch = {name: jax.device_put(x, layout.act('BT')) for name, x in host.items()}

    def take(n: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(n):
                state, metrics = step(state, batch)
        return float(metrics['nll'])

    return take


def theirs(model: ModelConfig, rows_BT: np.ndarray, *, compiled: bool) -> Steps:
    """LlamaForCausalLM with AdamW, clipping included, as its users train it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.dim,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.context,
        rope_theta=model.rope_theta,
        tie_word_embeddings=model.tied,
        use_cache=False,
    )
    network = LlamaForCausalLM(config).train()
    tx = torch.optim.AdamW(
        network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(network) if compiled else network
    ids = torch.from_numpy(rows_BT[:, :-1].astype(np.int64))

    def take(n: int) -> float:
        for _ in range(n):
            tx.zero_grad(set_to_none=True)
            loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            tx.step()
        return float(loss)

    return take


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.train', __doc__))
