"""What a grammar costs the rows beside it: `python -m benchmarks.constrained --weights smollm2`.

An engine writes as many texts as it has rows: all of them free, one of them JSON of a schema, all
of them JSON, and one alone, free or JSON. Told are tokens per second of a row, of each kind.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from experiments import cli, models
from llama_jax import mesh as meshes
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Event, Finish, Grammar, Piece, Request
from llama_jax.generate.controls import Controls
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.serve.grammar import Compiler

SCHEMA = {
    'type': 'array',
    'minItems': 1000,  # it does not end before the others
    'items': {
        'type': 'object',
        'properties': {
            'name': {'type': 'string', 'maxLength': 40},
            'age': {'type': 'integer'},
            'tags': {'type': 'array', 'items': {'enum': ['red', 'green', 'blue']}},
        },
        'required': ['name', 'age', 'tags'],
        'additionalProperties': False,
    },
}


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = None
    """RUN, RUN@STEP or RUN@best; or --weights."""
    weights: str | None = None
    rows: int = 4
    tokens: int = 64
    """Of each free text; constrained ones go on until these have ended."""
    repeats: int = 5
    """The best counts: others may use the machine."""
    json: Path | None = None


@dataclass
class Text:
    """One text on its way, and when its tokens came."""

    free: bool
    times: list[tuple[float, int]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece) and event.tokens:
            self.times.append((time.perf_counter(), len(event.tokens)))
        elif isinstance(event, Finish):
            assert event.reason in ('length', 'cancelled'), event
            self.done.set()

    def rate(self) -> float:
        """Tokens per second behind the first piece."""
        (first, _), *rest = self.times
        return sum(n for _, n in rest) / (rest[-1][0] - first)


def main(options: Options) -> None:
    mesh = meshes.make(MeshConfig())
    model = models.load(options.checkpoint, options.weights, mesh)
    length = min(1024, model.config.context)
    engine = Engine(
        model.programs(mesh, Compute()),
        token_bytes=model.vocabulary.token_bytes,
        rows=options.rows,
        length=length,
    )
    compiler = Compiler(model.vocabulary, vocab=model.config.vocab, end_ids=model.end_ids)
    rows, prompt = options.rows, [*model.begin, *model.vocabulary.encode('A list:\n').tolist()]
    kinds = {
        'all free': (rows, 0),
        'one constrained': (rows - 1, 1),
        'all constrained': (0, rows),
        'one alone, free': (1, 0),
        'one alone, constrained': (0, 1),
    }
    rates: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    try:
        for turn in range(options.repeats + 1):
            for kind, (n_free, n_bound) in kinds.items():
                grammars = [None] * n_free + [compiler.json_schema(SCHEMA) for _ in range(n_bound)]
                most = {True: options.tokens, False: length - len(prompt) - 1}
                if not n_free:
                    most[False] = options.tokens
                for text in written(engine, prompt, grammars, most):
                    if turn:  # the first one compiles
                        name = 'free' if text.free else 'constrained'
                        rates[kind].setdefault(name, []).append(text.rate())
    finally:
        engine.close()
    figures = {
        kind: {name: round(max(values), 2) for name, values in of.items()}
        for kind, of in rates.items()
    }
    print(f'{model.name}, {rows} rows, {os.cpu_count()} cores; tokens/s of a row:')
    for kind, of in figures.items():
        print(f'  {kind:24s}' + '  '.join(f'{name} {value:8.1f}' for name, value in of.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')


def written(
    engine: Engine, prompt: list[int], grammars: list[Grammar | None], most: dict[bool, int]
) -> list[Text]:
    texts, tickets = [], []
    for i, grammar in enumerate(grammars):
        text = Text(grammar is None)
        controls = Controls(
            max_tokens=most[text.free], ignore_end=text.free, temperature=0.8, seed=i
        )
        tickets.append(engine.submit(Request(prompt, controls, grammar=grammar), text))
        texts.append(text)
    free = [text for text in texts if text.free]
    for text in free or texts:
        text.done.wait()
    for text, ticket in zip(texts, tickets, strict=True):
        ticket.cancel()
        text.done.wait()
    return texts


if __name__ == '__main__':
    cli.main(lambda: main(cli.options(Options, 'benchmarks.constrained', __doc__)))
