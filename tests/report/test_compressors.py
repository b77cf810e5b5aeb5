"""The yardsticks: xz and zlib of text, in bits per byte."""

import argparse
import inspect
import lzma
import random
import shutil
import subprocess
import zlib

import pytest

from llama_jax.errors import UserError
from llama_jax.report.compressors import compress
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
