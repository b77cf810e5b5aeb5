"""The yardsticks: xz and zlib of text, in bits per byte."""

import argparse
import inspect
import json
import lzma
import random
import shutil
import subprocess
import zlib
from dataclasses import replace

import pytest

from llama_jax.data import sources
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.documents import Documents
from llama_jax.data.sources import Corpus
from llama_jax.errors import UserError
from llama_jax.report import compressors
from llama_jax.report.compressors import compress, sample, write_baselines
from tests.report import run

TEXTS = [inspect.getsource(argparse), *run.documents(), '滾滾長江東逝水，浪花淘盡英雄。' * 9]


def test_sizes_are_those_of_the_modules():
    data = [text.encode() for text in TEXTS]
    whole = b''.join(data)
    assert compress(iter(TEXTS)) == {
        'documents': len(TEXTS),
        'bytes': len(whole),
        'xz': 8 * len(lzma.compress(whole, preset=9)) / len(whole),
        'zlib_per_document': 8 * sum(len(zlib.compress(x, 9)) for x in data) / len(whole),
    }
    assert sum(len(zlib.compress(x, 9)) for x in data) < sum(len(zlib.compress(x)) for x in data)


def test_xz_sees_a_repetition_8_megabytes_back():
    # As `xz -9` does; the default, of level 6, does not look so far.
    noise = random.Random(0).randbytes(50_000).hex()
    texts = [noise, 'a' * (9 << 20), noise]
    whole = ''.join(texts).encode()
    xz = compress(texts)['xz'] * len(whole) / 8
    assert xz == pytest.approx(len(lzma.compress(whole, preset=9)), abs=0.5)
    assert xz < 0.6 * len(lzma.compress(whole, preset=6))


@pytest.mark.skipif(not shutil.which('xz'), reason='no xz on this machine')
def test_xz_is_the_program():
    whole = ''.join(TEXTS).encode()
    made = subprocess.run(['xz', '-9', '-T1', '-c'], input=whole, capture_output=True, check=True)
    assert compress(TEXTS)['xz'] == 8 * len(made.stdout) / len(whole)


@pytest.mark.parametrize('texts', [[], ['', '']])
def test_no_text(texts):
    with pytest.raises(UserError, match=f'no text to compress in {len(texts)} documents'):
        compress(texts)


def corpus(*sources):
    """A corpus of these lists of documents."""
    made = [
        Documents(
            'made',
            [{'text': text.encode()} for text in texts],
            'text',
            '',
            0,
            ValueError,
            Source('made'),
        )
        for texts in sources
    ]
    return Corpus(tuple(made), (1.0,) * len(made))


def test_a_sample_is_spread_over_all_sources_and_in_order():
    first, second = [f'a{i:04}' for i in range(300)], [f'b{i:04}' for i in range(700)]
    texts = sample(corpus(first, second), 5 * 100)
    assert len(texts) == len(set(texts)) == 100 and texts == sorted(texts)
    assert 25 <= sum(text.startswith('a') for text in texts) <= 35
    places = [int(text[1:]) + 300 * (text[0] == 'b') for text in texts]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert max(gaps) <= 20  # 10 on average
    assert texts == sample(corpus(first, second), 5 * 100)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 6, 9, 55, 610])
def test_a_small_corpus_is_taken_whole(n):
    texts = [str(i) for i in range(n)]
    assert sample(corpus(texts), 10**6) == texts


def test_a_long_document_is_cut_between_characters():
    assert sample(corpus(['滾' * 50]), 100) == ['滾' * 33]


def test_baselines_are_made_once_for_the_same_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(tmp_path / 'cache'))
    path, text = tmp_path / 'baselines.json', tmp_path / 'text.jsonl'

    def data(n):
        lines = [json.dumps({'text': f'{i} ' * 50}) for i in range(n)]
        text.write_text('\n'.join(lines))
        return DataConfig(sources=(Source('text_files', files=(str(text),)),))

    config = data(300)
    write_baselines(config, path)
    made = json.loads(path.read_text())
    texts = list(sources.documents(config, 'validation'))
    assert made['xz'] == compress(texts)['xz'] and made['split'] == 'validation'
    assert made['documents'] == made['of_documents'] == len(texts)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f'compressing {made["bytes"]:,} bytes of held-out text with xz and zlib, to compare with'
    )
    with monkeypatch.context() as patch:
        patch.setattr(compressors, 'compress', None)
        write_baselines(config, path)
    write_baselines(data(400), path)  # other data
    again = json.loads(path.read_text())
    assert again['of_documents'] > made['of_documents']
    monkeypatch.setattr(compressors, 'SAMPLE_BYTES', 1000)
    path.write_text('{')  # damaged
    write_baselines(config, path)
    cut = json.loads(path.read_text())
    assert cut['bytes'] == 1000 and cut['documents'] < cut['of_documents']
    held = tuple(Source('text_files', files=config.sources[0].files, label=x) for x in 'ab')
    write_baselines(replace(config, validation=held), path)
    named = json.loads(path.read_text())
    assert named['split'] == 'a, b' and named['of_documents'] == 800
