"""What drafting is worth: `python -m benchmarks.speculative`.

A model continues code and prose of Python itself, one row at a time, with and without drafts;
ways take turns, and medians are compared. `int8 drafts` is the model itself with int8 weights as
the small one: exact text at the price of drafts that are cheap, not small; that it reads the
prompt too counts. With --checkpoint the model is a run, and its heads draft too, which
--objective multi-token trained; the other ways do without them. Engines generate for all prompts of
a text at once, in rows of that number, with drafts and without.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.text import CODE_AND_PROSE, encoded
from benchmarks.timing import timed
from experiments import cli, models
from llama_jax import mesh as meshes
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Event, Finish, Request
from llama_jax.generate.controls import Controls
from llama_jax.generate.generator import Completion, Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.generate.speculative.draft import Draft, Heads, Lookup
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.model.layers import Params


@dataclass(frozen=True)
class Options:
    weights: str = 'smollm2'
    """smollm2, a .gguf file, or the directory of a Hugging Face model."""
    checkpoint: str | None = None
    """A RUN in their place, whose heads draft."""
    files: tuple[Path, ...] = CODE_AND_PROSE
    prompt: int = 448
    """Tokens of each prompt."""
    tokens: int = 64
    """Tokens that are drawn, the likeliest."""
    prompts: int = 4
    """Places of each file."""
    repeats: int = 3
    rows: tuple[int, ...] = (1, 4)
    """Of the engines."""


Way = tuple[Generator, Lookup | Heads | Draft | None]


def main() -> None:
    options = tyro.cli(Options, prog='python -m benchmarks.speculative', description=__doc__)
    mesh = meshes.make(MeshConfig())
    if options.checkpoint is None:
        model, beside = models.from_weights(options.weights, mesh), None
    else:
        model = models.from_run(options.checkpoint, mesh)
        beside = models.from_run(options.checkpoint, mesh, heads=True)

    def generator(how: Quantization, params: Params = model.params) -> Generator:
        return Generator(
            model.config,
            params,
            mesh=mesh,
            compute=Compute(),
            eos_ids=(),
            pad_id=model.pad_id,
            quantization=how,
        )

    ours, int8 = generator(Quantization()), generator(Quantization(weights='int8'))
    ways: dict[str, Way] = {
        'plain': (ours, None),
        'lookup of 4': (ours, Lookup(n_draft=4)),
        'lookup of 8': (ours, Lookup(n_draft=8)),
        'int8 drafts 4': (ours, Draft(int8.programs, n_draft=4)),
    }
    if beside is not None:
        headed = generator(Quantization(), beside.params)
        ways['heads'] = headed, Heads(headed.programs.heads)
    print('text | way | tokens/s | times plain | accepted | tokens a run')
    for path in options.files:
        least = options.prompt + options.prompts
        ids = encoded(path, model.vocabulary, least=least).tolist()
        starts = range(0, len(ids) - options.prompt, len(ids) // (1 + options.prompts))
        prompts = [ids[at : at + options.prompt] for at in starts][1 : 1 + options.prompts]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        last: dict[str, list[Completion]] = {}
        for repeat in range(1 + options.repeats):  # the first compiles
            for name, (by, how) in ways.items():
                first, whole = 0.0, 0.0
                last[name] = []
                for prompt in prompts:
                    first += timed(lambda p=prompt, by=by: by([p], max_tokens=1))
                    begin = time.perf_counter()
                    last[name] += by([prompt], max_tokens=1 + options.tokens, speculate=how)
                    whole += time.perf_counter() - begin
                if repeat:
                    seconds[name].append(whole - first)
        for name in ways:
            pairs = zip(last[name], last['plain'], strict=True)
            if any(one.tokens != other.tokens for one, other in pairs):
                print(f'{name}: a text differs, by a near tie or a fault')
            report(path.name, name, seconds, last[name], len(prompts) * options.tokens)
        for rows in options.rows:
            compare_engines(ways, path.name, prompts, rows, options)


def compare_engines(
    ways: dict[str, Way], text: str, prompts: list[list[int]], rows: int, options: Options
) -> None:
    """Engines with `rows` rows, without drafts and with each that an engine takes."""
    length = options.prompt + options.tokens + 1
    engines = {}
    for name in ('plain', 'lookup of 4', 'heads'):
        if name in ways:
            by, how = ways[name]
            assert not isinstance(how, Draft)
            engines[name] = Engine(
                by.programs,
                token_bytes=lambda token: b'',
                rows=rows,
                length=length,
                speculate=how,
            )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(1 + options.repeats):  # the first compiles, and fills rows for the others
        for name, engine in engines.items():
            first = timed(lambda e=engine: complete(e, prompts, 1))
            whole = timed(lambda e=engine: complete(e, prompts, 1 + options.tokens))
            if repeat:
                seconds[name].append(whole - first)
    plain = statistics.median(seconds['plain'])
    for name, engine in engines.items():
        stats, took = engine.stats(), statistics.median(seconds[name])
        engine.close()
        speed = len(prompts) * options.tokens / took
        row = f'{text} | engine of {rows}, {name} | {speed:.1f} | {plain / took:.2f}'
        if stats.drafted_tokens_total:
            row += f' | {stats.accepted_tokens_total / stats.drafted_tokens_total:.0%}'
        print(row, flush=True)


def complete(engine: Engine, prompts: list[list[int]], n: int) -> None:
    """`n` tokens after each prompt, all asked for at once."""
    ended = threading.Semaphore(0)

    def on_event(event: Event) -> None:
        if isinstance(event, Finish):
            ended.release()

    controls = Controls(temperature=0.0, max_tokens=n, ignore_end=True)
    for prompt in prompts:
        engine.submit(Request(prompt, controls), on_event)
    for _ in prompts:
        ended.acquire()


def report(
    text: str, name: str, seconds: dict[str, list[float]], done: list[Completion], n: int
) -> None:
    took, plain = statistics.median(seconds[name]), statistics.median(seconds['plain'])
    row = f'{text} | {name} | {n / took:.1f} | {plain / took:.2f}'
    counts = [one.speculation for one in done if one.speculation is not None]
    if counts:
        drafted, accepted = (sum(getattr(c, k) for c in counts) for k in ('drafted', 'accepted'))
        tokens, steps = (sum(getattr(c, k) for c in counts) for k in ('tokens', 'steps'))
        row += f' | {accepted / max(drafted, 1):.0%} | {tokens / steps:.2f}'
    print(row, flush=True)


if __name__ == '__main__':
    cli.main(main)
