"""The yardsticks: xz and zlib of text, in bits per byte."""

import lzma
import shutil
import subprocess
import zlib

import pytest

from llama_jax.errors import UserError
from llama_jax.report.compressors import compress
from tests.report import run

TEXTS = [*run.documents(), '滾滾長江東逝水，浪花淘盡英雄。' * 9]


def test_sizes_are_those_of_the_modules():
    data = [text.encode() for text in TEXTS]
    whole = b''.join(data)
    assert compress(iter(TEXTS)) == {
        'documents': len(TEXTS),
        'bytes': len(whole),
        'xz': 8 * len(lzma.compress(whole, preset=9)) / len(whole),
        'zlib_per_document': 8 * sum(len(zlib.compress(x, 9)) for x in data) / len(whole),
    }
    # More than a chunk of xz's output, which a shorter text never fills.
    many = [str(i**9) for i in range(30_000)]
    long = ''.join(many).encode()
    assert compress(many)['xz'] == 8 * len(lzma.compress(long, preset=9)) / len(long)


@pytest.mark.skipif(not shutil.which('xz'), reason='no xz on this machine')
def test_xz_is_the_program():
    whole = ''.join(TEXTS).encode()
    made = subprocess.run(['xz', '-9', '-T1', '-c'], input=whole, capture_output=True, check=True)
    assert compress(TEXTS)['xz'] == 8 * len(made.stdout) / len(whole)


@pytest.mark.parametrize('texts', [[], ['', '']])
def test_no_text(texts):
    with pytest.raises(UserError, match=f'no text to compress in {len(texts)} documents'):
        compress(texts)
