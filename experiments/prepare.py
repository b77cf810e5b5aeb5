"""Prepare the data of a configuration, apart from training:
`python -m experiments.prepare quickstart --data.files 'books/*.txt'`.

Stopped at any time, it goes on where it stopped. Training with the same data settings finds what
was prepared.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from experiments import cli
from llama_jax.data import sources, tokens
from llama_jax.data.config import labels
from llama_jax.data.encoded import encoded
from llama_jax.data.load_tokenizer import check as check_tokenizer
from llama_jax.data.record import Text
from llama_jax.errors import Stopped, UserError
from llama_jax.train.experiment import Experiment, with_tokenizer
from llama_jax.train.start import chat_read
from llama_jax.units import size


def main() -> None:
    experiment, options = cli.read('prepare', __doc__, processes=(int | None, None))
    if options.processes is not None and options.processes < 1:
        raise UserError(f'--processes is {options.processes}: give 1 or more, or leave it out')
    with _stopping():
        prepare(experiment, options.processes)


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGINT raise Stopped here."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> NoReturn:
    name = signal.Signals(number).name
    raise Stopped(f'stopped by {name}; the same command goes on from here', exit_code=128 + number)


def prepare(experiment: Experiment, processes: int | None = None) -> None:
    """Prepares and tokenises every source, and prints what is in each of its splits."""
    reads = experiment.objective.reads
    sources.check(experiment.data, reads)
    check_tokenizer(
        experiment.data.tokenizer, rows=experiment.model.vocab, marks=experiment.objective.marks
    )
    for number, source in enumerate(experiment.data.sources):
        files = f' ({", ".join(source.files)})' if source.files else ''
        print(f'source {number}: {source.name}{files}, weight {source.weight:g}', flush=True)
        begin = time.time()
        builder = sources.builder(source, processes, reads=reads)
        seconds = time.time() - begin
        splits = builder.info.splits
        for split in splits:
            found = splits[split]
            print(f'  {split:<11}{found.num_examples:>13,} documents{size(found.num_bytes):>12}')
        total = sum(splits[split].num_bytes for split in splits)
        how = f'in {seconds:.1f} s, {size(total / seconds)}/s'
        print(f'  {how if _written_since(begin, builder) else "was there"}: {builder.data_path}')
    _count_tokens(experiment, processes)


def _count_tokens(experiment: Experiment, processes: int | None) -> None:
    """Tokenise what the configuration trains and validates on, which training finds as well."""
    data, objective = experiment.data, experiment.objective
    experiment, tokenizer = with_tokenizer(experiment)
    per_step = experiment.train.batch * experiment.train.seq_len
    for split in ('train', 'validation'):
        if split == 'validation' and not experiment.evaluation.every:
            continue
        begin, total = time.perf_counter(), 0
        corpus = sources.open_sources(data, split, objective.reads)
        made: Sequence[tokens.Texts]
        if objective.reads is Text:
            made = tokens.tokenised(corpus, tokenizer, processes)
        else:
            chat = chat_read(experiment)
            made = encoded(
                corpus, tokenizer, objective, chat, bad=data.bad_records, processes=processes
            )
        for label, texts in zip(labels(data.of(split)), made, strict=True):
            total += texts.tokens
            print(
                f'{split} of {label}: {texts.tokens:,} tokens, {len(texts):,} documents, '
                f'{texts.bytes / max(texts.tokens, 1):.2f} bytes a token'
            )
        steps = f', {total / per_step:,.0f} steps of {per_step:,}' if split == 'train' else ''
        print(f'  {total:,} tokens{steps}; {time.perf_counter() - begin:.1f} s')


def _written_since(seconds: float, builder: Any) -> bool:
    path = Path(str(builder.data_path)) / 'dataset_info.json'
    return path.exists() and path.stat().st_mtime >= seconds - 0.01  # their clock ticks


if __name__ == '__main__':
    cli.main(main)
