"""Fill in the middle: back to the document, in two scripts."""

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.fim import FillInMiddle, cuts
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
    assert moved <= len(found) * rate if rate in (0, 1) else 0 < moved < len(found)
    # Hardly any piece is too long for its row after all.
    assert rate < 1 or moved > 0.95 * len(found)


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


def test_rate_0_is_the_causal_example():
    tokenizer = texts.tokenizer()
    tokens = tokenizer.encode(texts.CODE[1])
    (causal,) = examples(CausalLM(), tokens, tokenizer=tokenizer)
    never = FillInMiddle(rate=0.0)
    (example,) = examples(never, tokens, tokenizer=tokenizer, seq_len=len(tokens) + 1)
    found = examples(never, tokens, tokenizer=tokenizer, seq_len=100)
    assert len(found) == -(-(len(tokens) + 1) // 100)
    for key in causal:
        np.testing.assert_array_equal(example[key], causal[key])
        assert example[key].dtype == causal[key].dtype
        np.testing.assert_array_equal(np.concatenate([e[key] for e in found]), causal[key])


@pytest.mark.parametrize('size', [5, 16, 100])
def test_pieces_are_cut_between_characters(size):
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode(texts.MIXED)
    places = cuts(tokens, tokenizer=tokenizer, size=size)
    assert places[0] == 0 and places[-1] == len(tokens) + 1
    assert min(np.diff(places)) > 0 and max(np.diff(places)) <= size + 2
    for start, stop in zip(places[:-1], places[1:], strict=True):
        tokenizer.to_bytes(tokens[start:stop]).decode()  # raises inside a character


def test_a_text_that_begins_inside_a_character_stays_causal():
    tokenizer = texts.tokenizer('bytes')
    tokens = tokenizer.encode('滾滾長江')[1:]
    (causal,) = examples(CausalLM(), tokens, tokenizer=tokenizer)
    (example,) = examples(ALWAYS, tokens, tokenizer=tokenizer)
    np.testing.assert_array_equal(example['inputs'], causal['inputs'])


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
