"""Memory and time of loading a model: `python -m benchmarks.load`.

A random model of the Llama shape (514 million parameters) is written as bfloat16 safetensors in
several files, and loaded for generation in a fresh process per case. Shown are the resident memory
at its peak and at the end, above what the process had with jax and before loading, beside the size
of the prepared weights; seconds; and the seconds to the first token after that, compilation
included. `--weights DIRECTORY` takes the tensors of a Hugging Face model instead.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from llama_jax import mesh as meshes
from llama_jax import trees
from llama_jax.convert import export_huggingface, huggingface, params
from llama_jax.convert.tensors import Tensors, fused, sizes_of
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.text.special import Special

CONFIG = ModelConfig(
    vocab=32000, dim=1536, layers=16, heads=16, kv_heads=4, head_dim=96, ffn=4352, context=2048
)
CASES: dict[str, tuple[Compute, Quantization]] = {
    'float32': (Compute(), Quantization()),
    'bfloat16': (Compute(precision='bfloat16'), Quantization()),
    'int8': (Compute(), Quantization(weights='int8')),
    'int4': (Compute(), Quantization(weights='int4')),
}
SHARD = 400_000_000
"""Bytes of a file, at most."""


@dataclass(frozen=True)
class Options:
    weights: Path | None = None
    """The directory of a Hugging Face model; None: a random one is written."""
    cases: tuple[str, ...] = tuple(CASES)
    case: str | None = None
    """Measure this one, in this process."""


def main() -> None:
    options = tyro.cli(Options, prog='python -m benchmarks.load', description=__doc__)
    if options.case is not None:
        assert options.weights is not None
        print(json.dumps(measured(options.weights, *CASES[options.case])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.weights or Path(scratch)
        if options.weights is None:
            write(directory, CONFIG)
        print(
            'case | weights MB | peak MB | (peak - largest) / weights | end MB | s | first token s'
        )
        for case in options.cases:
            command = [sys.executable, '-m', 'benchmarks.load', '--weights', str(directory)]
            run = subprocess.run([*command, '--case', case], stdout=subprocess.PIPE, check=True)
            x = json.loads(run.stdout.splitlines()[-1])
            share = (x['peak'] - x['largest']) / x['weights']
            sizes = f'{x["weights"] / 1e6:.0f} | {x["peak"] / 1e6:.0f} | {share:.2f}'
            print(
                f'{case} | {sizes} | {x["end"] / 1e6:.0f} | {x["seconds"]:.1f} | {x["first"]:.1f}',
                flush=True,
            )


def measured(directory: Path, compute: Compute, quantization: Quantization) -> dict[str, float]:
    """Bytes and seconds of loading, in a process that did nothing else."""
    mesh = meshes.make(MeshConfig())
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(9)))
    before = resident('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    begin = time.perf_counter()
    settings, tensors = huggingface.read(directory)
    config, unread = params.unread(huggingface.HUGGING_FACE, tensors, settings)
    generator = Generator(
        *(config, unread),
        mesh=mesh,
        compute=compute,
        eos_ids=(),
        pad_id=0,
        quantization=quantization,
    )
    seconds = time.perf_counter() - begin
    peak, end = resident('VmHWM') - before, resident('VmRSS') - before
    begin = time.perf_counter()
    next(generator.stream([1, 2, 3], max_tokens=2))
    return {
        'weights': trees.n_bytes(generator.programs.params),
        'largest': max(
            math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors
        ),
        'peak': peak,
        'end': end,
        'seconds': seconds,
        'first': time.perf_counter() - begin,
    }


def resident(what: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at the most."""
    lines = Path('/proc/self/status').read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(what)]
    return int(line.split()[1]) * 1024


class Random(Tensors):
    """Weights of a Hugging Face model, drawn one tensor at a time."""

    def __init__(self, config: ModelConfig):
        table, sizes = huggingface.HUGGING_FACE.table.items(), sizes_of(config)
        names = [
            (theirs.format(i=i), fused(groups, sizes))
            for path, (theirs, groups) in table
            for i in (range(config.layers) if path.startswith('blocks.') else (None,))
        ]
        self._shapes = dict(names)
        self._random = np.random.default_rng(0)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        return self._random.standard_normal(shape, np.float32) * shape[-1] ** -0.5

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)


def write(directory: Path, config: ModelConfig) -> None:
    """A random model in several files."""
    tensors, special = Random(config), Special(1, 2)
    export_huggingface.write(
        *(directory, config, tensors),
        dtype='bfloat16',
        ids=special,
        files={},
        shard_bytes=SHARD,
    )


if __name__ == '__main__':
    main()
