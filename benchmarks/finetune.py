"""Speed and memory of fine-tuning: `python -m benchmarks.finetune`, or one row of it by `--only`.

- lora: a step of adapters, upon the base as it is, in int8 and in int4, beside a step of all
  parameters. Windows alternate, and medians are compared. Memory is what the compiled step takes on
  a device, arguments and temporaries together.
- sft: instruction tuning beside trl, and what packing gains (benchmarks/sft.py).

On an accelerator: `python -m benchmarks.finetune --only lora --presets llama3_1_8b --arms lora int8
int4 --compute.precision bfloat16 --compute.remat full --batch 4 --seq-len 2048`.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

import configs
from benchmarks import sft
from benchmarks.text import token_rows
from experiments import cli
from llama_jax import layout, trees
from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.tune import Full, LoRA, Tune
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.train.base import Kept
from llama_jax.train.step import State, initial_state, train_step

SHAPES = {
    '50m': ModelConfig(
        **{'vocab': 16384, 'dim': 512, 'layers': 12, 'heads': 8, 'kv_heads': 4, 'head_dim': 64},
        **{'ffn': 1536, 'context': 1024, 'tied': True},
    ),
    'smollm2': ModelConfig(
        **{'vocab': 49152, 'dim': 576, 'layers': 30, 'heads': 9, 'kv_heads': 3, 'head_dim': 64},
        **{'ffn': 1536, 'context': 1024, 'tied': True},
    ),
}
ARMS: dict[str, Tune] = {
    'full': Full(),
    'lora': LoRA(),
    'int8': LoRA(base='int8'),
    'int4': LoRA(base='int4'),
}


@dataclass(frozen=True)
class Options:
    only: str | None = None
    """The name of a row."""
    presets: tuple[str, ...] = ('50m', 'smollm2')
    """Shapes: 50m, smollm2, or names of configurations."""
    arms: tuple[str, ...] = tuple(ARMS)
    batch: int = 4
    seq_len: int = 256
    windows: int = 5
    """Timed steps of each contestant."""
    compute: Compute = field(default_factory=Compute)


def main(options: Options) -> None:
    rows: dict[str, Callable[[Options], None]] = {'lora': lora, 'sft': _sft}
    if options.only is not None and options.only not in rows:
        raise UserError(f'--only {options.only}: there are {", ".join(rows)}')
    for name, row in rows.items():
        if options.only in (None, name):
            print(f'# {name}', flush=True)
            row(options)


def _sft(options: Options) -> None:
    if importlib.util.find_spec('trl') is None and options.only is None:
        print("trl is absent: pip install '.[parity]' to compare")
        return
    sft.main(sft.Options(windows=options.windows))


def lora(options: Options) -> None:
    """Step time and memory of each arm, for each shape."""
    for preset in options.presets:
        model = SHAPES[preset] if preset in SHAPES else configs.get(preset).model
        model = replace(model, context=max(model.context, options.seq_len))
        n = trees.size(layers.abstract(model))
        print(f'{preset}: {n:,} parameters, {options.batch} x {options.seq_len} tokens', flush=True)
        arms = {name: _Arm(model, ARMS[name], options) for name in options.arms}
        for _ in range(options.windows):
            for arm in arms.values():
                arm.take()
        first = statistics.median(next(iter(arms.values())).seconds)
        print('arm    s/step  tokens/s  time   memory MB  state MB  kept MB')
        for name, arm in arms.items():
            median = statistics.median(arm.seconds)
            print(
                f'{name:5} {median:7.3f} {options.batch * options.seq_len / median:9,.0f}'
                f' {median / first:5.2f} {arm.memory / 1e6:10,.0f}'
                f' {arm.trained / 1e6:9,.1f} {arm.frozen / 1e6:8,.0f}',
                flush=True,
            )


class _Arm:
    """A contestant, warm."""

    def __init__(self, model: ModelConfig, tune: Tune, options: Options):
        self._mesh = mesh = meshes.make(MeshConfig())
        tx = optimizer(AdamW())
        self._state: State = initial_state(model, CausalLM(), tx, seed=0, mesh=mesh, tune=tune)
        if not isinstance(tune, Full):
            keep = Kept(tune, options.compute, mesh)
            base = layers.create(model, jax.random.key(0), mesh)
            self._state = replace(self._state, frozen=trees.map_named(keep, base))
        step = train_step(
            *(model, CausalLM(), tx),
            learning_rate=lambda _: 1e-4,  # type: ignore[arg-type, return-value]
            accumulate=1,
            compute=options.compute,
        )
        rows_BT = token_rows(options.batch, options.seq_len + 1, model.vocab)
        B, T = options.batch, options.seq_len
        host: dict[str, Any] = {
            **{'inputs': rows_BT[:, :-1], 'targets': rows_BT[:, 1:]},
            **{'weights': np.ones((B, T), np.float32), 'segments': np.ones((B, T), np.int32)},
            'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        }
        with jax.set_mesh(mesh):
            self._batch = {name: jax.device_put(x, layout.act('BT')) for name, x in host.items()}
            self._step = step.lower(self._state, self._batch).compile()
        used = self._step.memory_analysis()
        self.memory = used.argument_size_in_bytes + used.temp_size_in_bytes
        self.trained = trees.n_bytes((self._state.params, self._state.optimizer))
        self.frozen = trees.n_bytes(self._state.frozen)
        self.seconds: list[float] = []
        self.take()
        self.seconds.clear()

    def take(self) -> None:
        """A step, timed."""
        begin = time.perf_counter()
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._step(self._state, self._batch)
        float(metrics['nll'])
        self.seconds.append(time.perf_counter() - begin)


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.finetune', __doc__))
