"""Fill in the middle: back to the document, in two scripts."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.fim import FillInMiddle, whole_characters
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

ALWAYS = FillInMiddle(rate=1.0)


def examples(objective, tokens, *, tokenizer, seq_len=4096, seed=0):
    return pieces.examples(
        objective, tokens, tokenizer=tokenizer, seq_len=seq_len, rng=np.random.default_rng(seed)
    )


def ids_of(example):
    """The stream of an example, first input to last target."""
    np.testing.assert_array_equal(example['inputs'][1:], example['targets'][:-1])
    assert example['weights'].all()  # all sections bear loss
    return np.append(example['inputs'], example['targets'][-1]).tolist()


def unpermuted(ids, tokenizer):
    """The order of a transformed stream and its sections, read off its controls. PSM without a
    prefix is SPM without a prefix as well."""
    control = tokenizer.control
    assert ids[0] == tokenizer.bos_id and ids.count(control['<eom>']) == 1
    if ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    assert ids[-1] == control['<eom>'] and ids[1] == control['<prefix>']
    suffix, middle = ids.index(control['<suffix>']), ids.index(control['<middle>'])
    assert 1 < suffix < middle
    if suffix == 2:
        return 'SPM', ids[3:middle], ids[middle + 1 : -1]
    return 'PSM', ids[2:suffix], ids[suffix + 1 : middle], ids[middle + 1 : -1]


def text_of(ids, tokenizer):
    """The text of a stream, transformed or not, in the order of the document, in bytes."""
    if tokenizer.control['<eom>'] not in ids:
        return tokenizer.to_bytes(ids)
    order, *sections = unpermuted(ids, tokenizer)
    if order == 'SPM':
        suffix, prefix_middle = sections
        return tokenizer.to_bytes(prefix_middle) + tokenizer.to_bytes(suffix)
    prefix, suffix, middle = sections
    return b''.join(tokenizer.to_bytes(part) for part in (prefix, middle, suffix))


@pytest.mark.parametrize('name', texts.NAMES)
@pytest.mark.parametrize('text', [texts.MIXED, texts.CODE[1][:3000], 'a', '。', ' \u2581x'])
def test_unpermutes_to_the_document(name, text):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(text)
    orders = set()
    for seed in range(8):
        (example,) = examples(ALWAYS, tokens, tokenizer=tokenizer, seed=seed)
        ids = ids_of(example)
        assert ids[-2:] == [tokenizer.control['<eom>'], tokenizer.eos_id]
        assert text_of(ids, tokenizer) == tokenizer.to_bytes(tokens)
        orders.add(unpermuted(ids, tokenizer)[0])
    assert orders == {'PSM', 'SPM'}


@pytest.mark.parametrize('name', texts.NAMES)
@pytest.mark.parametrize('rate', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('seq_len', [48, 100, 512])
def test_the_pieces_of_a_document_give_it_back_and_fit(name, rate, seq_len):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.MIXED + texts.CODE[1])
    found = examples(FillInMiddle(rate=rate), tokens, tokenizer=tokenizer, seq_len=seq_len)
    assert len(found) > 1
    data = b''
    for example in found:
        assert len(example['inputs']) <= seq_len
        ids = ids_of(example)
        if tokenizer.control['<eom>'] in ids:
            data += text_of(ids, tokenizer)
        else:
            data += tokenizer.to_bytes(ids[1:])  # the first is the target of the piece before
    assert data == tokenizer.to_bytes(tokens)
    moved = sum(tokenizer.control['<eom>'] in ids_of(example) for example in found)
    # The last piece may be nothing but the end.
    assert moved >= len(found) - 1 if rate == 1 else bool(rate) <= moved < len(found)


def test_splits_are_uniform_over_characters():
    """Of a text in which one character takes six bytes' tokens and most one."""
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode('abc滾滾z')
    counts = {}
    for seed in range(9800):
        (example,) = examples(
            FillInMiddle(rate=1.0, spm=0.0), tokens, tokenizer=tokenizer, seed=seed
        )
        order, *sections = unpermuted(ids_of(example), tokenizer)
        prefix, _, middle = sections if order == 'PSM' else ([], *sections)
        first = len(tokenizer.to_bytes(prefix).decode())
        second = first + len(tokenizer.to_bytes(middle).decode())
        counts[first, second] = counts.get((first, second), 0) + 1
    # 7 places; two draws, in order: every pair twice as often as a place with itself.
    assert len(counts) == 28
    expected = {pair: 200 * (1 if pair[0] == pair[1] else 2) for pair in counts}
    chi_square = sum((n - expected[pair]) ** 2 / expected[pair] for pair, n in counts.items())
    assert chi_square < 55.5  # 99.9%, 27 degrees of freedom


def test_shares_of_transformed_and_of_the_two_orders():
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1][:500])
    orders = []
    for seed in range(2000):
        (example,) = examples(FillInMiddle(), tokens, tokenizer=tokenizer, seed=seed)
        ids = ids_of(example)
        moved = tokenizer.control['<eom>'] in ids
        orders.append(unpermuted(ids, tokenizer)[0] if moved else 'causal')
    for order, share in (('causal', 0.5), ('PSM', 0.25), ('SPM', 0.25)):
        # Five standard deviations of the mean.
        assert orders.count(order) / 2000 == pytest.approx(share, abs=0.056)


@pytest.mark.parametrize('name', texts.NAMES)
def test_as_many_pieces_are_transformed_as_are_asked_for(name):
    """Wherever they are cut: most of these bytes are Chinese, three to a character."""
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(texts.MIXED)
    objective, rng = FillInMiddle(rate=0.7), np.random.default_rng(0)
    moved = []
    for _ in range(300):
        n, draw = int(rng.integers(1, 60)), rng.random()
        start = int(rng.integers(len(tokens) - n))
        sizes = objective.sizes(n, seq_len=128, draw=draw)
        piece = pieces.Piece(tokens, start, start + n, draw, sizes, identity=0)
        example = objective.example(piece, tokenizer=tokenizer, seq_len=128, rng=rng)
        ids = ids_of(example)
        moved.append(tokenizer.control['<eom>'] in ids)
        assert moved[-1] == (draw < 0.7)
        spelled = text_of(ids, tokenizer) if moved[-1] else tokenizer.to_bytes(ids[1:])
        assert spelled == tokenizer.to_bytes(tokens[start : start + n])
    assert np.mean(moved) == pytest.approx(0.7, abs=0.13)  # five standard deviations


def test_rate_0_is_the_causal_example():
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1])
    for seq_len in (100, len(tokens) + 1):
        causal, never = (
            examples(objective, tokens, tokenizer=tokenizer, seq_len=seq_len)
            for objective in (CausalLM(), FillInMiddle(rate=0.0))
        )
        assert len(never) == -(-(len(tokens) + 1) // seq_len)
        for one, two in zip(never, causal, strict=True):
            assert one.keys() == two.keys()
            for key in two:
                np.testing.assert_array_equal(one[key], two[key])
                assert one[key].dtype == two[key].dtype


@pytest.mark.parametrize('name', ['bytes', 'bpe'])
@pytest.mark.parametrize('text', ['滾滾z長江', 'é𝄞a𝄞'])
def test_characters_that_a_piece_cuts_stay_at_its_edges(name, text):
    tokenizer = texts.tokenizer(name)
    tokens = tokenizer.encode(text)
    for start, stop in itertools.combinations(range(len(tokens) + 1), 2):
        before, whole, after = whole_characters(tokens[start:stop], tokenizer=tokenizer)
        data = [tokenizer.to_bytes(part) for part in (before, after)]
        assert b''.join([data[0], whole.encode(), data[1]]) == tokenizer.to_bytes(
            tokens[start:stop]
        )
        # Nothing but the inside of a character, and a beginning without an end.
        assert all(byte & 0xC0 == 0x80 for byte in data[0])
        assert not data[1] or data[1][0] >= 0xC0
        assert len(data[0]) < 4 and len(data[1]) < 4


def test_tokens_that_hold_parts_of_two_characters():
    """Vocabularies of bytes merge them as they come."""
    spelled = [' 滾'.encode()[:2], '滾'.encode()[1:] + '長'.encode()[:1], '長'.encode()[1:], b'z']
    tokenizer = SimpleNamespace(
        to_bytes=lambda ids: b''.join(spelled[i] for i in ids),
        byte_lengths=np.array([len(part) for part in spelled]),
    )
    for ids, found in (
        ([0, 1, 2], ([], ' 滾長', [])),
        ([1, 2, 3, 0], ([1, 2], 'z', [0])),
        ([3, 0, 1], ([], 'z', [0, 1])),
        ([2, 3, 3], ([2], 'zz', [])),
        ([0, 1], ([], '', [0, 1])),
        ([1], ([1], '', [])),
        ([2], ([2], '', [])),
        ([0, 3, 2], ([0, 3, 2], '', [])),  # no text at all
    ):
        before, text, after = whole_characters(np.array(ids), tokenizer=tokenizer)
        assert (before.tolist(), text, after.tolist()) == found


def test_a_piece_in_the_midst_of_a_document_is_transformed_without_its_end():
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode('滾滾長江')
    piece = pieces.Piece(tokens, 1, 8, 0.0, ALWAYS.sizes(7, seq_len=64, draw=0.0), identity=0)
    example = ALWAYS.example(piece, tokenizer=tokenizer, seq_len=64, rng=np.random.default_rng(0))
    ids = ids_of(example)
    assert ids[-1] == tokenizer.control['<eom>'] and len(ids) == 7 + 5
    assert text_of(ids, tokenizer) == '滾滾長江'.encode()[1:8]


def test_a_piece_that_fits_nowhere_stays_causal():
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1])
    piece = pieces.Piece(tokens, 5, 25, 0.0, (20,), identity=0)
    (made, causal) = (
        objective.example(piece, tokenizer=tokenizer, seq_len=64, rng=np.random.default_rng(0))
        for objective in (ALWAYS, CausalLM())
    )
    np.testing.assert_array_equal(made['inputs'], causal['inputs'])
    np.testing.assert_array_equal(made['targets'], causal['targets'])


def test_short_documents():
    tokenizer = texts.tokenizer()
    (example,) = examples(ALWAYS, np.zeros(0, np.int32), tokenizer=tokenizer)
    assert ids_of(example) == [tokenizer.bos_id, tokenizer.eos_id]


def test_chance_is_that_of_rng_alone():
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1])
    one, two, three = (
        [
            ids_of(e)
            for e in examples(FillInMiddle(), tokens, tokenizer=tokenizer, seq_len=64, seed=s)
        ]
        for s in (1, 1, 2)
    )
    assert one == two != three


@pytest.mark.parametrize('fields', [{'rate': -0.1}, {'rate': 1.1}, {'spm': 2.0}])
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError, match='must be in'):
        FillInMiddle(**fields)


def test_a_row_without_room_for_a_transformation_is_refused():
    with pytest.raises(UserError, match='a row of 9 positions has no room'):
        FillInMiddle().lengths(9)
    assert FillInMiddle().lengths(10) == FillInMiddle(rate=0.0).lengths(10) == {'': 10}


def test_a_document_sees_itself_and_what_comes_before():
    batch = reading.make_batch(ALWAYS, seq_len=64, sizes=[12, 20])
    segment = batch['segments'][0]
    found = reading.reach(ALWAYS, DECODER, batch)
    seen = reading.same(segment, segment) & np.tri(64, dtype=bool)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])
    # Transformed one by one: each has its own controls.
    for k in (1, 2):
        ids = batch['targets'][0][segment == k]
        assert (ids == texts.tokenizer().control['<eom>']).sum() == 1
    assert ALWAYS.loss_tokens(batch) == (segment > 0).sum()


def test_rate_0_is_the_causal_loss_bit_for_bit():
    never = FillInMiddle(rate=0.0)
    batch = reading.make_batch(never, seq_len=40, sizes=[12, 19])
    plain = reading.make_batch(CausalLM(), seq_len=40, sizes=[12, 19])
    for key in plain:
        np.testing.assert_array_equal(batch[key], plain[key])
    ours, causal = (reading.loss(o, DECODER, batch) for o in (never, CausalLM()))
    assert ours.total == causal.total and ours.metrics == causal.metrics


def test_an_encoder_is_refused():
    ALWAYS.check(DECODER)
    with pytest.raises(UserError, match='set --model.encoder-layers 0'):
        ALWAYS.check(BOTH)
    assert ALWAYS.flops(DECODER, 64) == CausalLM().flops(DECODER, 64)
