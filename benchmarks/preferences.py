"""A step of DPO beside what it cannot do without: `python -m benchmarks.preferences`.

The policy reads both answers and goes back, which is a forward and a backward pass; a reference
that runs beside it is one more forward pass. These are timed alone, as the log-probabilities of the
same answers and as the cross-entropy of the same tokens with its gradient; both, and steps of DPO,
take turns in one run, and medians are compared. A reference that is computed before the first step
saves its pass, and is found by LoRA turned off otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.timing import timed
from experiments import cli
from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.data import packing
from llama_jax.data.pieces import Encoded, Piece
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.tune import LoRA, combined, trained
from llama_jax.objectives.pairs import both, features
from llama_jax.objectives.preference import DPO, answer_log_probs
from llama_jax.objectives.softmax import cross_entropy

COMPUTE = Compute()
TUNE = LoRA(rank=8)


@dataclass(frozen=True)
class Options:
    rows: int = 4
    """Rows of a batch, each with a half for either answer."""
    seq_len: int = 256
    dim: int = 256
    layers: int = 4
    vocab: int = 16_000
    rounds: int = 5


def main(options: Options) -> None:
    config = ModelConfig(
        vocab=options.vocab,
        dim=options.dim,
        layers=options.layers,
        heads=options.dim // 64,
        kv_heads=options.dim // 64,
        head_dim=64,
        ffn=3 * options.dim,
        context=options.seq_len,
    )
    devices = meshes.make(MeshConfig())
    arrays = _batch(config, options)
    params = layers.create(config, jax.random.key(0), devices)
    with jax.set_mesh(devices):
        batch = jax.device_put(arrays, jax.NamedSharding(devices, layout.rows()))
        adapters = trained(TUNE, params, config, jax.random.key(1))
        runs = _runs(config, params, adapters, batch)
        for run in runs.values():
            jax.block_until_ready(run())
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                seconds[name].append(timed(lambda run=run: jax.block_until_ready(run())))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f'{options.rows} rows of {options.seq_len} positions, {jax.devices()[0].device_kind}')
    for name, value in median.items():
        print(f'{name:42} {value:8.3f} s')
    whole = median['forward and backward']
    print(f'DPO, reference before, by it: {median["DPO, reference before"] / whole:.2f}')
    floor = median['forward and backward, adapters'] + median['forward']
    print(
        'DPO, adapters off, by it with adapters and a forward pass: '
        f'{median["DPO, adapters off"] / floor:.2f}'
    )


def _batch(config: ModelConfig, options: Options) -> dict[str, np.ndarray]:
    """Pairs of random tokens, half of each the prompt, two in a row."""
    objective, random = DPO(), np.random.default_rng(0)
    n = options.seq_len // 4
    rows = []
    for _ in range(options.rows):
        row = []
        for _ in range(2):
            prompt, *answers = random.integers(1, config.vocab, (3, n // 2)).astype(np.int32)
            parts = tuple(np.concatenate([prompt, answer]) for answer in answers)
            weight = np.repeat(np.array([0, 1], np.float32), n // 2)
            piece = Piece(
                *(parts[0], 0, 1, 0.0, (len(weight) - 1,) * 2, 0),
                encoded=Encoded(parts, (weight, weight)),
                given=np.full(2, -100, np.float32),
            )
            row.append(
                objective.example(
                    piece, tokenizer=None, seq_len=options.seq_len, rng=np.random.default_rng(0)
                )
            )
        rows.append(row)
    lengths = objective.lengths(options.seq_len)
    arrays = packing.empty_rows(
        packing.layout_of(rows[0][0], pad_id=0), rows=options.rows, lengths=lengths
    )
    for i, row in enumerate(rows):
        packing.lay(arrays, i, row, lengths=lengths)
    return arrays


def _runs(
    config: ModelConfig, params: Any, adapters: Any, batch: dict[str, jax.Array]
) -> dict[str, Callable[[], Any]]:
    def bound(adapters: Any, params: Any) -> Any:
        whole = params if adapters is None else combined(TUNE, adapters, params)
        return layers.bind(config, whole)

    def forward(params: Any, batch: Any) -> Any:
        return answer_log_probs(bound(None, params), batch, compute=COMPUTE, key=None)

    def floor(model: Any, batch: Any) -> jax.Array:
        x_BTD = features(model, batch, compute=COMPUTE, key=None)
        arrays = both(batch, 'targets'), both(batch, 'weights')
        return cross_entropy(x_BTD, model.head()[...], *arrays, 0.0).total

    def dpo(objective: DPO) -> Callable[[Any, Any], jax.Array]:
        def total(model: Any, batch: Any) -> jax.Array:
            return objective.loss(model, batch, extra={}, compute=COMPUTE, key=None).total

        return total

    def of_all(total: Callable[[Any, Any], jax.Array]) -> Callable[[], Any]:
        step = jax.jit(jax.value_and_grad(lambda params, batch: total(bound(None, params), batch)))
        return lambda: step(params, batch)

    def of_adapters(total: Callable[[Any, Any], jax.Array]) -> Callable[[], Any]:
        step = jax.jit(
            jax.value_and_grad(lambda own, params, batch: total(bound(own, params), batch))
        )
        return lambda: step(adapters, params, batch)

    forward_step = jax.jit(forward)
    return {
        'forward': lambda: forward_step(params, batch),
        'forward and backward': of_all(floor),
        'DPO, reference before': of_all(dpo(DPO())),
        'forward and backward, adapters': of_adapters(floor),
        'DPO, adapters off': of_adapters(dpo(DPO(reference='adapters_off'))),
    }


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.preferences', __doc__))
