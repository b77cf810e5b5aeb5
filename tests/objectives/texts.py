"""Real text and real tokenizers for the tests of objectives, and examples packed into batches."""

import functools
import heapq
import inspect
import shlex
import string
import textwrap

from sentencepiece import sentencepiece_model_pb2

from llama_jax.data import packing
from llama_jax.data.tokenizer import Tokenizer, bytes_tokenizer
from llama_jax.data.train_tokenizer import train
from tests.data.corpus import CHINESE

CODE = tuple(inspect.getsource(module) for module in (heapq, shlex, string, textwrap))
MIXED = '\n'.join(
    line for pair in zip(CHINESE, CODE[1].splitlines()[20:], strict=False) for line in pair
)
"""Chinese and code by turns."""
NAMES = 'bpe', 'unigram', 'bytes', 'llama'


@functools.cache
def tokenizer(name='bpe'):
    """Trained on the code alone, so that most Chinese is spelled in bytes: 'bpe', 'unigram'.
    'bytes': nothing but bytes. 'llama': puts a space before every text, as LLaMA 1 and 2 do."""
    if name == 'bytes':
        return bytes_tokenizer()
    if name == 'llama':
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(tokenizer().__reduce__()[1][0])
        proto.normalizer_spec.add_dummy_prefix = True
        return Tokenizer(proto.SerializeToString())
    return train([*CODE, *CHINESE[:2]], vocab=700, kind=name)


def packed(examples, objective, *, seq_len, rows, pad_id):
    """A batch of `rows` rows, packed as the loader packs."""
    layout = packing.layout_of(examples[0], pad_id=pad_id)
    lengths = objective.lengths(seq_len)
    packer = packing.Packer(
        lambda k: [examples[k]] if k < len(examples) else None,
        layout=layout,
        lengths=lengths,
        splittable=objective.splittable,
        segments=objective.segments(seq_len),
        patience=1,
    )
    batch = packing.empty_rows(layout, rows=rows, lengths=lengths)
    for index in range(rows):
        packer.fill(batch, index)
    return batch
