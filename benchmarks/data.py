"""The input pipeline: `python -m benchmarks.data [--json PATH] [--tables packing mixture ...]`.

speed: tokens per second that the loader delivers with nobody else at work (median of several
windows) with a background thread and with two worker processes; MB/s of tokenising in one process;
tokens per second of planning alone; seconds to go on from the middle of an epoch.
packing: share of the positions that rows use, for every objective and length of row.
mixture: shares of the tokens of two sources of weight 1, for every batch size from 4 to 17.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from llama_jax.data import order, packing, sources, tokens
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.pieces import Maker
from llama_jax.data.plan import Cursor, Plan
from llama_jax.data.recipe import blocks_of
from llama_jax.data.tokens import Texts
from llama_jax.objectives import of_text
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2
from llama_jax.text.tokenizer import Tokenizer

OBJECTIVES: dict[str, Maker] = {
    **of_text(),
    'spans, encoder-decoder': SpanCorruption(encoder=True),
    'ul2, encoder-decoder': UL2(encoder=True),
    'contrastive, dropout': InfoNCE(views='dropout'),
}
CODE, DOCS = Source('python_corpus/stdlib_code'), Source('python_corpus/stdlib_docs')


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    tables: tuple[Literal['speed', 'packing', 'mixture'], ...] = ('speed', 'packing', 'mixture')
    batch: int = 16
    seq_len: int = 512
    windows: int = 7
    window_seconds: float = 2.0
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    rows: int = 1000
    """Rows of each cell of the packing table, or all of an epoch."""
    json: Path | None = None
    """Where the figures are written as well."""


def plan(
    texts: tuple[Texts, ...], maker: Maker, *, seq_len: int, batch: int = 16, epochs: int | None
) -> Plan:
    """The plan of a run on these sources, of equal weights."""
    stream = order.Stream(
        [blocks_of(text, seq_len) for text in texts], [1.0] * len(texts), seed=0, epochs=epochs
    )
    packer = packing.Packer(maker, seq_len=seq_len, seed=0)
    return Plan(stream, packer, texts, ends=maker.ends, batch=batch, seq_len=seq_len, seed=0)


def used(made: list[packing.Row], maker: Maker, seq_len: int) -> float:
    """Share of the positions of the rows that are planned for text, over all streams."""
    positions = sum(sum(placed.sizes) for row in made for placed in row)
    return positions / (len(made) * sum(maker.lengths(seq_len).values()))


def packing_table(
    settings: Settings, tokenizer: Tokenizer
) -> Iterator[tuple[str, str, dict[int, float]]]:
    """(corpus, objective, share of used positions by length of row)."""
    for source in (CODE, DOCS):
        texts = tokens.tokenised(open_source(source), tokenizer)
        for name, maker in OBJECTIVES.items():
            found = {}
            for seq_len in settings.lengths:
                planned = plan(texts, maker, seq_len=seq_len, epochs=None)
                rows = planned.rows(planned.beginning())
                most = min(settings.rows, max(8, texts[0].tokens // seq_len))
                found[seq_len] = used(
                    [row for row, _ in itertools.islice(rows, most)], maker, seq_len
                )
            yield source.name, name, found


def mixture_table(settings: Settings, tokenizer: Tokenizer) -> dict[int, float]:
    """Batch size to the first source's share of the tokens after 10,000 rows, at weights 1 : 1."""
    texts = tuple(
        text for source in (CODE, DOCS) for text in tokens.tokenised(open_source(source), tokenizer)
    )
    shares = {}
    for batch in range(4, 18):
        planned = plan(texts, CausalLM(), seq_len=256, batch=batch, epochs=None)
        *_, (_, cursor) = itertools.islice(planned.rows(planned.beginning()), 10_000)
        read = [units for units, _ in cursor.read]
        shares[batch] = read[0] / sum(read)
    return shares


def open_source(source: Source) -> sources.Corpus:
    return sources.open_sources(DataConfig(sources=(source,)), 'train')


def throughput(settings: Settings, tokenizer: Tokenizer, *, workers: int) -> dict[str, float]:
    """Tokens per second of every window, and seconds until the first batch."""
    config = DataConfig(sources=(CODE,), workers=workers)
    start = time.perf_counter()
    rates = []
    with _loader(settings, config, tokenizer) as loader:
        next(loader)
        first_batch = time.perf_counter() - start
        # What was read ahead while the clock stood still must not count.
        for _ in range(2 * config.prefetch * max(workers, 1)):
            next(loader)
        for _ in range(settings.windows):
            n, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < settings.window_seconds:
                n += int((next(loader)['segments'] > 0).sum())
            rates.append(n / elapsed)
    return {
        'tokens_per_second': statistics.median(rates),
        'slowest_window': min(rates),
        'fastest_window': max(rates),
        'seconds_to_first_batch': first_batch,
    }


def parts(settings: Settings, tokenizer: Tokenizer) -> dict[str, float]:
    """Speed of tokenising and of planning, each alone, and how long it takes to go on."""
    (documents,) = open_source(CODE).sources
    texts = [documents[i] for i in range(min(200, len(documents)))]
    begin = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    tokenising = sum(len(text.encode()) for text in texts) / (time.perf_counter() - begin)
    cached = tokens.tokenised(open_source(CODE), tokenizer)
    planned = plan(cached, CausalLM(), seq_len=settings.seq_len, epochs=None)
    begin = time.perf_counter()
    rows = list(itertools.islice(planned.rows(planned.beginning()), 4000))
    planning = len(rows) * settings.seq_len / (time.perf_counter() - begin)
    cursor = Cursor.loads(rows[-1][1].dumps())
    begin = time.perf_counter()
    next(planned.rows(cursor))
    return {
        'tokenising_bytes_per_second': tokenising,
        'planning_tokens_per_second': planning,
        'seconds_to_go_on': time.perf_counter() - begin,
    }


def _loader(settings: Settings, config: DataConfig, tokenizer: Tokenizer) -> Loader:
    return Loader(
        config,
        split='train',
        tokenizer=tokenizer,
        maker=CausalLM(),
        batch=settings.batch,
        seq_len=settings.seq_len,
        seed=0,
    )


def main(settings: Settings) -> None:
    """Measures, prints tables and the figures as JSON."""
    tokenizer = load_tokenizer(DataConfig(sources=(CODE, DOCS)))
    figures: dict[str, Any] = {
        'command': 'python -m benchmarks.data',
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, Python '
        f'{platform.python_version()}',
        'batch': settings.batch,
        'seq_len': settings.seq_len,
    }
    if 'speed' in settings.tables:
        figures['workers'] = {str(w): throughput(settings, tokenizer, workers=w) for w in (0, 2)}
        for workers, row in figures['workers'].items():
            print(
                f'{workers} workers: {row["tokens_per_second"]:,.0f} tokens/s '
                f'({row["slowest_window"]:,.0f} to {row["fastest_window"]:,.0f}), '
                f'first batch after {row["seconds_to_first_batch"]:.1f} s'
            )
        figures['parts'] = found = parts(settings, tokenizer)
        print(
            f'tokenising {found["tokenising_bytes_per_second"] / 1e6:.1f} MB/s, planning '
            f'{found["planning_tokens_per_second"] / 1e6:.1f} million tokens/s, going on after '
            f'{found["seconds_to_go_on"]:.2f} s'
        )
    if 'packing' in settings.tables:
        figures['packing'] = []
        print('| corpus | objective | ' + ' | '.join(map(str, settings.lengths)) + ' |')
        print('|---' * (2 + len(settings.lengths)) + '|')
        for corpus, name, by_length in packing_table(settings, tokenizer):
            figures['packing'].append({'corpus': corpus, 'objective': name, **by_length})
            cells = ' | '.join(f'{100 * share:.1f}%' for share in by_length.values())
            print(f'| {corpus} | {name} | {cells} |', flush=True)
    if 'mixture' in settings.tables:
        figures['mixture'] = shares = mixture_table(settings, tokenizer)
        print('shares of the first of two sources at weights 1 : 1 after 10,000 rows, by batch:')
        print(', '.join(f'{batch}: {100 * share:.2f}%' for batch, share in shares.items()))
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main(tyro.cli(Settings))
