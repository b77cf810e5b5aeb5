"""Real text and real tokenizers for the tests of objectives, and examples packed into batches."""

import functools
import heapq
import inspect
import itertools
import shlex
import string
import textwrap

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from llama_jax.data import packing
from llama_jax.data.train_tokenizer import train
from llama_jax.text import files
from llama_jax.text.sentencepiece_model import SentencePiece, bytes_tokenizer
from tests.convert import written
from tests.data.corpus import CHINESE

CODE = tuple(inspect.getsource(module) for module in (heapq, shlex, string, textwrap))
MIXED = '\n'.join(
    line for pair in zip(CHINESE, CODE[1].splitlines()[20:], strict=False) for line in pair
)
"""Chinese and code by turns."""
NAMES = 'bpe', 'unigram', 'bytes', 'llama', 'byte-level'


@functools.cache
def tokenizer(name='bpe'):
    """Trained on the code alone, so that most Chinese is spelled in bytes: 'bpe', 'unigram'.
    'bytes': nothing but bytes. 'llama' and 'spaced bytes': put a space before every text, as LLaMA
    1 and 2 do.
    'byte-level': of the library `tokenizers`, as Llama 3's."""
    if name == 'byte-level':
        settings = written.vocabulary() | {'tokenizer.ggml.pre': 'llama-bpe'}
        return files.from_gguf(settings).vocabulary.extended()
    if name == 'bytes':
        return bytes_tokenizer()
    if name in ('llama', 'spaced bytes'):
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(tokenizer('bpe' if name == 'llama' else 'bytes')._content)
        proto.normalizer_spec.add_dummy_prefix = True
        return SentencePiece(proto.SerializeToString()).extended()
    return train([*CODE, *CHINESE[:2]], vocab=700, kind=name)


def packed(examples, objective, *, seq_len, rows, pad_id):
    """A batch of `rows` rows of the examples in order, each whole and in the next row where it does
    not fit. They may be endless, and end when the rows are full."""
    examples = iter(examples)
    first = next(examples)
    layout = packing.layout_of(first, pad_id=pad_id)
    lengths = objective.lengths(seq_len)
    most = objective.segments(seq_len)
    batch = packing.empty_rows(layout, rows=rows, lengths=lengths)
    row, segment, filled = 0, 0, dict.fromkeys(lengths, 0)
    for example in itertools.chain([first], examples):
        assert example.keys() == layout.keys()
        sizes = {key.rpartition('/')[0]: len(values) for key, values in example.items()}
        too_long = any(filled[stream] + n > lengths[stream] for stream, n in sizes.items())
        if too_long or segment == most > 0:
            row, segment, filled = row + 1, 0, dict.fromkeys(lengths, 0)
        if row == rows:
            break
        segment += 1
        for stream, n in sizes.items():
            here = slice(filled[stream], filled[stream] + n)
            of_stream = {key for key in layout if key.rpartition('/')[0] == stream}
            before = f'{stream}/' if stream else ''
            batch[f'{before}segments'][row, here] = segment
            batch[f'{before}positions'][row, here] = np.arange(n)
            for key in of_stream:
                batch[key][row, here] = example[key]
            filled[stream] += n
    return batch
