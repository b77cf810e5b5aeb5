"""What packing counts on, of every objective: sizes that are known before the text is."""

import itertools

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.data.pieces import FEWEST, Piece
from llama_jax.data.record import Text
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2, Denoiser
from llama_jax.objectives.weighted import Weighted
from tests.objectives import texts
from tests.train.every import EVERY

OF_TEXT = {name: one for name, (one, _) in EVERY.items() if one.reads is Text}
OBJECTIVES = OF_TEXT | {
    'ul2 encoder': UL2(encoder=True),
    'ul2 without ends': UL2(denoisers=(Denoiser('[R]', 0.15, 3.0), Denoiser('[X]', 0.5, 1.0))),
    'ul2 long prefix': UL2(
        encoder=True, denoisers=(Denoiser('[X]', 0.9, 9.0), Denoiser('[S]', 0.01))
    ),
    'many spans': SpanCorruption(density=0.9, mean_span=1.0),
    'many insertions': Bart(rate=0.05, mean_span=0.2),
    'always fim': FillInMiddle(rate=1.0),
    'three': Weighted(
        parts=(MaskedLM(), FillInMiddle(), SpanCorruption()),
        weights=(1.0, 1.0, 1.0),
        shares=(0.4, 0.3, 0.3),
    ),
}
SEQ_LEN = 256
DRAWS = (0.0, 0.1, 0.3, 0.49, 0.5, 0.8, 0.95, 1 - 2**-53)


def every(test):
    return pytest.mark.parametrize('objective', OBJECTIVES.values(), ids=OBJECTIVES)(test)


def example_of(objective, piece, *, tokenizer, seed=0):
    return objective.example(
        piece, tokenizer=tokenizer, seq_len=SEQ_LEN, rng=np.random.default_rng(seed)
    )


def hand_cut(objective, tokens, *, seed):
    """Pieces of all lengths that a row takes, wherever they end."""
    rng = np.random.default_rng(seed)
    room = tuple(objective.lengths(SEQ_LEN).values())
    start, end = 0, len(tokens) + objective.ends
    while start < end:
        draw = rng.random()
        most = int(rng.integers(1, 1 + rng.integers(1, SEQ_LEN)))
        n = pieces.longest(objective, min(most, end - start), room=room, seq_len=SEQ_LEN, draw=draw)
        if n:
            sizes = objective.sizes(n, seq_len=SEQ_LEN, draw=draw)
            yield Piece(tokens, start, start + n, draw, sizes, identity=7)
        start += max(n, 1)


@every
def test_sizes_grow_with_the_text_and_are_of_the_streams(objective):
    streams = len(objective.lengths(SEQ_LEN))
    for draw in DRAWS:
        found = [objective.sizes(n, seq_len=SEQ_LEN, draw=draw) for n in range(1, 700)]
        too_few = next(i for i, sizes in enumerate(found) if sizes is not None)
        assert too_few < FEWEST
        known = [*itertools.takewhile(lambda sizes: sizes is not None, found[too_few:])]
        assert not any(found[too_few + len(known) :])
        assert all(len(sizes) == streams for sizes in known)
        assert all(type(size) is int and size > 0 for sizes in known for size in sizes)
        for one, two in itertools.pairwise(known):
            assert all(a <= b for a, b in zip(one, two, strict=True))


@every
@pytest.mark.parametrize('name', ['bpe', 'unigram', 'bytes'])
def test_no_example_is_longer_than_its_sizes(objective, name):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.MIXED + texts.CODE[1])[:4000]
    keys, made, n_pieces = set(), 0, 0
    for piece in hand_cut(objective, tokens, seed=0):
        n_pieces += 1
        example = example_of(objective, piece, tokenizer=tokenizer)
        if example is None:
            # Of nothing but the end, or with a token that has no place for a span.
            assert piece.stop > len(tokens) and piece.stop - piece.start <= 2
            continue
        made += 1
        keys.add(frozenset(example))
        sizes = dict(zip(objective.lengths(SEQ_LEN), piece.sizes, strict=True))
        for key, values in example.items():
            stream = key.rpartition('/')[0]
            n = len(example[f'{stream}/inputs' if stream else 'inputs'])
            assert len(values) == n and 0 < n <= sizes[stream]
            is_weight = key.endswith('weights')
            assert values.dtype == (np.float32 if is_weight else np.int32)
            # Denoisers of spans leave out the end, for which there is room.
            ended = piece.stop > len(tokens) and not isinstance(objective, CausalLM | PrefixLM)
            if exact(objective, stream) and not ended:
                assert n == sizes[stream]
    assert len(keys) == 1 and made > 0.9 * n_pieces > 10


def exact(objective, stream):
    """Whether the size of every example in a stream is known to the position."""
    if isinstance(objective, Weighted):
        part = objective.parts[int(stream.partition('/')[0] or 0)]
        return exact(part, stream.partition('/')[2])
    # Block diffusion has room for a whole last block, which only an end fills.
    return not isinstance(objective, FillInMiddle | BlockDiffusion) and not (
        isinstance(objective, Bart) and stream == 'encoder'
    )


@every
def test_an_example_depends_on_its_piece_and_the_generator_alone(objective):
    tokenizer = texts.tokenizer('bpe')
    tokens = tokenizer.encode(texts.CODE[1])
    short = tokens.astype(np.uint16)  # as a cache of small vocabularies may keep them
    short.flags.writeable = False
    changed = 0
    for piece in itertools.islice(hand_cut(objective, tokens, seed=1), 12):
        one, two, other = (
            example_of(objective, piece._replace(tokens=ids), tokenizer=tokenizer, seed=seed)
            for ids, seed in ((tokens, 0), (short, 0), (tokens, 1))
        )
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
            assert one[key].dtype == two[key].dtype
        changed += any(
            len(one[key]) != len(other[key]) or (one[key] != other[key]).any() for key in one
        )
    if isinstance(objective, MaskedLM | SpanCorruption | UL2 | Bart | PrefixLM | FillInMiddle):
        assert changed
    assert not (changed and type(objective) is CausalLM)


def test_equal_documents_share_an_identity():
    tokens = np.arange(5)
    assert pieces.identity_of(tokens) == pieces.identity_of(tokens.astype(np.uint16))
    found = {pieces.identity_of(np.arange(n)) for n in range(2000)}
    assert len(found) == 2000 and all(0 <= identity < 2**31 for identity in found)


def test_a_document_is_cut_into_pieces_that_fill_rows():
    found = pieces.examples(
        CausalLM(),
        np.arange(24),
        tokenizer=texts.tokenizer(),
        seq_len=10,
        rng=np.random.default_rng(0),
    )
    assert [len(example['inputs']) for example in found] == [10, 10, 5]
