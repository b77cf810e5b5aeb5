"""Serve a model over HTTP, in the shape of OpenAI's API, with a page to try it at /.

python -m experiments.serve --checkpoint DIRECTORY
python -m experiments.serve --weights smollm2 --port 8080
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

from experiments import cli, models
from llama_jax import installed
from llama_jax import mesh as meshes
from llama_jax.engine.engine import Engine
from llama_jax.engine.queue import open_to_one
from llama_jax.errors import UserError
from llama_jax.generate.programs import is_cpu
from llama_jax.generate.quantized import Quantization
from llama_jax.generate.speculative.draft import Heads, Lookup
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.text import template_files

KEYS = 'LLAMA_JAX_API_KEYS'
"""Environment variable: API keys, with commas between them."""

PIECE = 64
"""Tokens of a prompt that are read at a time, between the steps of the others. On a CPU more would
take no less time each, and others would wait for longer."""
ACCELERATED = 256
"""The same on an accelerator."""


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = None
    """The --workdir of a training, RUN, or RUN@STEP, RUN@best or RUN@mean:N; or --weights."""
    weights: str | None = None
    """smollm2, a .gguf file, or the directory of a model, Hugging Face's or Meta's."""
    name: str | None = None
    """What the model is called in the API."""
    chat_template: str | None = None
    """Instead of the model's own: a file with a Jinja template, or chatml, llama2, llama3, llama4.
    """
    host: str = '127.0.0.1'
    """0.0.0.0 to be reached from other machines; then set LLAMA_JAX_API_KEYS."""
    port: int = 8000
    rows: int = 8
    """Requests that are generated at a time."""
    length: int | None = None
    """Longest prompt and output together. None: 2048, or the context of the model if that is less.
    """
    steps: int = 8
    """Tokens of a text that may come at a time; fewer, where so many take longer than 20 ms, for
    which whoever asks next would wait."""
    queue: int = 256
    """Requests that may wait; the next is told to come back (429)."""
    timeout: float = 600.0
    """Seconds after which a request is cut off."""
    cors: tuple[str, ...] = ()
    """Origins of pages that may ask the server, such as https://example.org; '*': any."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: Compute = field(default_factory=Compute)
    quantization: Quantization = field(default_factory=Quantization)
    lookup: int = 0
    """Draft so many tokens at a time: those that followed before where a text's last ones stood.
    Texts stay what they are. 0: none."""
    draft: Literal['heads'] | None = None
    """heads: those of the run draft, which --objective multi-token trained. Texts stay as they are.
    """


def main() -> None:
    options = cli.options(Options, 'serve', __doc__)
    for package in ('starlette', 'uvicorn', 'llguidance'):
        if not importlib.util.find_spec(package):
            raise UserError(f'a server takes {package}: {installed.extra("serve")}')
    from llama_jax.serve import app, cors, run
    from llama_jax.serve.grammar import Compiler
    from llama_jax.serve.served import Limits, Served
    from llama_jax.serve.warm import warm

    if not 0 < options.timeout < float('inf'):
        raise UserError(f'--timeout {options.timeout}: give seconds above 0')
    for name, value, least in (
        ('rows', options.rows, 1),
        ('queue', options.queue, 1),
        ('steps', options.steps, 1),
        ('length', options.length, 2),
    ):
        if value is not None and value < least:
            raise UserError(f'--{name} {value}: at least {least}')
    cors.check(options.cors)
    if options.chat_template is not None:
        template_files.chosen(options.chat_template)  # it is there
    if options.lookup and options.draft is not None:
        raise UserError('--lookup and --draft: one of them drafts, leave the other out')
    speculate: Lookup | Heads | None = Lookup(n_draft=options.lookup) if options.lookup else None
    given = os.environ.get(KEYS, '')
    keys = [key.strip() for key in given.split(',') if key.strip()]
    if given and not keys:
        raise UserError(f'{KEYS} is {given!r}, which holds no key: give one, or unset it')
    with run.bind(options.host, options.port) as socket:
        mesh = meshes.make(options.mesh)
        own = options.draft == 'heads'
        model = models.load(options.checkpoint, options.weights, mesh, heads=own)
        model = model.chatting(options.chat_template)
        programs = model.programs(mesh, options.compute, options.quantization)
        if own:
            speculate = Heads(programs.heads)
        piece = PIECE if is_cpu(mesh) else ACCELERATED
        begin = time.perf_counter()
        engine = Engine(
            programs,
            token_bytes=model.vocabulary.token_bytes,
            control=model.vocabulary.control,
            rows=options.rows,
            length=options.length or min(2048, model.config.context),
            queue=options.queue,
            prefill_chunk=piece,
            steps=options.steps,
            speculate=speculate,
            warm=True,
        )
        model = model.without_params()
        try:
            grammars = Compiler(model.vocabulary, vocab=model.config.vocab, end_ids=model.end_ids)
            read_source = functools.partial(model.source, most=engine.source_length)
            warm(engine, piece=piece, source_length=engine.source_length)
            served = Served(
                options.name or model.name,
                engine,
                model.vocabulary,
                begin=model.begin,
                chat=model.chat,
                make_grammar=grammars.make_grammar,
                read_source=read_source if model.config.encoder_layers else None,
                source_length=engine.source_length,
                infill=model.infill,
            )
            choices = min(Limits.choices, open_to_one(options.queue))
            limits = Limits(seconds=options.timeout, choices=choices)
            made = app.build(served, keys=keys, limits=limits, origins=options.cors)
            host, port = socket.getsockname()[:2]
            anyone = (
                '' if keys or host == '127.0.0.1' else f'; anyone may ask it: {KEYS} is not set'
            )
            server = run.Server(made)
            places = server.connections
            print(
                f'{places.most} connections at a time, {places.of_one} of one address, by the '
                'limit of open files',
                file=sys.stderr,
            )
            print(
                f'serving {served.name} at http://{host}:{port}, compiled in '
                f'{time.perf_counter() - begin:.0f} s{anyone}',
                file=sys.stderr,
                flush=True,
            )
            server.run(sockets=[socket])
        except KeyboardInterrupt:  # which the server raises again when it has ended
            pass
        finally:
            engine.close()


if __name__ == '__main__':
    cli.main(main)
