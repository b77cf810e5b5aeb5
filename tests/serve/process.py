"""`experiments.serve` as people start it: a process with real weights, asked over a socket."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from llama_jax import trees
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from tests.convert import written

MODEL = ModelConfig(
    vocab=512, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=256
)
MARKS = ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>')
START_SECONDS = 300
"""Loading and compilation, on a machine that does other things too."""
END_SECONDS = 30


def write_model(path):
    """A directory of random weights of MODEL, with a tokenizer, a chat template and the marks of a
    model that infills."""
    rng = np.random.default_rng(5)
    params = trees.map_named(
        lambda _, x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), layers.abstract(MODEL)
    )
    directory = written.directory(path, MODEL, params)
    written.trained(MODEL.vocab, (*written.CONTROL, *MARKS)).save(str(directory / 'tokenizer.json'))
    return directory


@dataclass
class ServerProcess:
    """A server that answers. `log` is what it has written so far, line by line."""

    process: subprocess.Popen
    log: list[str] = field(default_factory=list)
    url: str = ''

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self.process.wait(END_SECONDS)


@contextlib.contextmanager
def serving(*options: object, **environment: str) -> Iterator[ServerProcess]:
    """A server on a free port, once it is healthy; it is gone behind the scope."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.serve', '--port', '0', *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            # One device, not the eight of the tests.
            'XLA_FLAGS': '--xla_backend_optimization_level=0',
            **environment,
        },
    )
    server = ServerProcess(process)
    told: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(server, told), daemon=True)
    reader.start()
    try:
        server.url = told.get(timeout=START_SECONDS)
        assert server.url, f'no server: {server.log}'
        with urllib.request.urlopen(f'{server.url}/health', timeout=10) as answer:
            assert answer.status == 200
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def _read(server: ServerProcess, told: queue.Queue[str]) -> None:
    for line in server.process.stderr:
        server.log.append(line.rstrip('\n'))
        if found := re.match(r'serving \S+ at (http://\S+?)[,;]', line):
            told.put(found[1])
    told.put('')
