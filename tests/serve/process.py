"""`experiments.serve` as people start it: a process with real weights, asked over a socket."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import numpy as np

from llama_jax import trees
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from tests.convert import written
from tests.flags import FAST_COMPILATION

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


class ServerProcess:
    """A server that starts; `url` waits until it is healthy."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.log: list[str] = []
        """What it has written so far."""
        self._told: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @functools.cached_property
    def url(self) -> str:
        url = self._told.get(timeout=START_SECONDS)
        assert url, f'no server: {self.log}'
        with urllib.request.urlopen(f'{url}/health', timeout=10) as answer:
            assert answer.status == 200
        return url

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self.process.wait(END_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line.rstrip('\n'))
            if found := re.match(r'serving \S+ at (http://\S+?)[,;]', line):
                self._told.put(found[1])
        self._told.put(None)


@contextlib.contextmanager
def serving(*options: object, **environment: str) -> Iterator[ServerProcess]:
    """A server on a free port; it is gone behind the scope."""
    server = ServerProcess(
        subprocess.Popen(
            [sys.executable, '-m', 'experiments.serve', '--port', '0', *map(str, options)],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                # One device, not the eight of the tests.
                'XLA_FLAGS': FAST_COMPILATION,
                **environment,
            },
        )
    )
    try:
        yield server
    finally:
        server.kill()
