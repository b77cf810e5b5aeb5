"""Speed of the input pipeline: `python -m benchmarks.data [--json PATH]`.

Tokens per second that the loader delivers with nobody else at work (median of several windows),
with a background thread and with two worker processes, and where one document's time goes.
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from experiments import cli
from llama_jax.data import packing, sources
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    data: DataConfig = DataConfig(sources=(Source('python_corpus/stdlib_code'),))
    batch: int = 16
    seq_len: int = 512
    windows: int = 7
    window_seconds: float = 2.0
    json: Path | None = None
    """Where the figures are written as well."""


def causal(
    tokens: np.ndarray, *, tokenizer: Tokenizer, seq_len: int, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Next-token prediction, so that the figures do not depend on an objective's own work."""
    del seq_len, rng
    ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
    return [
        dict(inputs=ids[:-1], targets=ids[1:], weights=np.ones(len(ids) - 1, np.float32)),
    ]


def throughput(settings: Settings, tokenizer: Tokenizer, *, workers: int) -> dict[str, float]:
    """Tokens per second of every window, and seconds until the first batch."""
    start = time.perf_counter()
    rates = []
    with Loader(
        dataclasses.replace(settings.data, workers=workers),
        split='train',
        tokenizer=tokenizer,
        example=causal,
        splittable=True,
        batch=settings.batch,
        seq_len=settings.seq_len,
        seed=0,
    ) as loader:
        next(loader)
        first_batch = time.perf_counter() - start
        # What was read ahead while the clock stood still must not count.
        for _ in range(2 * settings.data.prefetch * max(workers, 1)):
            next(loader)
        for _ in range(settings.windows):
            tokens, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < settings.window_seconds:
                tokens += int((next(loader)['segments'] > 0).sum())
            rates.append(tokens / elapsed)
    return {
        'tokens_per_second': statistics.median(rates),
        'slowest_window': min(rates),
        'fastest_window': max(rates),
        'seconds_to_first_batch': first_batch,
    }


def shares(settings: Settings, tokenizer: Tokenizer, *, documents: int = 300) -> dict[str, float]:
    """Share of the time of reading, tokenising and packing, one after another in one thread."""
    (source, *_) = sources.open_sources(settings.data, 'train').sources
    count = min(documents, len(source))
    clock = [time.perf_counter()]
    texts = [source[i] for i in range(count)]
    clock.append(time.perf_counter())
    tokens = [tokenizer.encode(text) for text in texts]
    clock.append(time.perf_counter())
    rng = np.random.default_rng(0)
    made = [causal(t, tokenizer=tokenizer, seq_len=settings.seq_len, rng=rng) for t in tokens]
    layout = packing.layout_of(made[0][0], pad_id=tokenizer.pad_id)
    packer = packing.Packer(
        lambda k: made[k] if k < count else None,
        layout=layout,
        lengths={'': settings.seq_len},
        splittable=True,
        patience=1,
    )
    more = True
    while more:
        rows = packing.empty_rows(layout, rows=settings.batch, lengths={'': settings.seq_len})
        more = all(packer.fill(rows, index) for index in range(settings.batch))
    clock.append(time.perf_counter())
    seconds = np.diff(clock)
    parts = dict(zip(('reading', 'tokenising', 'packing'), seconds / seconds.sum(), strict=True))
    return {name: float(part) for name, part in parts.items()}


def main(settings: Settings) -> None:
    """Measures, prints a table and the figures as JSON."""
    tokenizer = load_tokenizer(settings.data)
    figures = {
        'command': 'python -m benchmarks.data',
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, Python '
        f'{platform.python_version()}',
        'batch': settings.batch,
        'seq_len': settings.seq_len,
        'workers': {str(w): throughput(settings, tokenizer, workers=w) for w in (0, 2)},
        'shares': shares(settings, tokenizer),
    }
    for workers, row in figures['workers'].items():
        print(
            f'{workers} workers: {row["tokens_per_second"]:,.0f} tokens/s '
            f'({row["slowest_window"]:,.0f} to {row["fastest_window"]:,.0f}), '
            f'first batch after {row["seconds_to_first_batch"]:.1f} s'
        )
    print(', '.join(f'{name} {share:.0%}' for name, share in figures['shares'].items()))
    text = json.dumps(figures, indent=1)
    print(text)
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(text + '\n')


if __name__ == '__main__':
    main(cli.options(Settings, 'benchmarks.data', __doc__))
