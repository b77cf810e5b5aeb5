"""Pairs of answers from real text, for the tests of runs that learn from them."""

import json
from pathlib import Path

import numpy as np

from llama_jax.data.config import DataConfig, Source
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig

LICENCE = Path(__file__).parents[2] / 'LICENSE'


def written(path, *, n=40, seed=0):
    """Beginnings of lines of the licence; the better answer is how the line goes on, the worse one
    the same words in another order."""
    random = np.random.default_rng(seed)
    lines = [line.split() for line in LICENCE.read_text().splitlines()]
    lines = [words for words in lines if len(words) > 5 and len(set(words[2:])) > 2][:n]
    records = []
    for words in lines:
        worse = words[2:]
        while worse == words[2:]:
            random.shuffle(worse)
        records.append(
            {
                'prompt': ' '.join(words[:2]),
                'chosen': ' ' + ' '.join(words[2:])[:24],
                'rejected': ' ' + ' '.join(worse)[:23],
            }
        )
    path.write_text('\n'.join(map(json.dumps, records)), 'utf-8')
    return path


def data(directory):
    """Of bytes: the same on every machine and version."""
    bytes_tokenizer().save(directory / 'bytes.model')
    train, held_out = (
        written(directory / f'{name}.jsonl', seed=seed)
        for seed, name in enumerate(('train', 'held_out'))
    )
    return DataConfig(
        sources=(Source('records', files=(str(train),)),),
        validation=(Source('records', files=(str(held_out),), label='held_out'),),
        tokenizer=TokenizerConfig(path=str(directory / 'bytes.model')),
    )
