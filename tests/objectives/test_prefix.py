"""Prefix language modelling: its examples, and who sees whom."""

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.prefix import PrefixLM
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

TOKENIZER = texts.tokenizer()
TOKENS = TOKENIZER.encode(texts.CODE[1])


def examples(objective, tokens, *, seq_len, seed=0):
    return pieces.examples(
        objective, tokens, tokenizer=TOKENIZER, seq_len=seq_len, rng=np.random.default_rng(seed)
    )


@pytest.mark.parametrize('seq_len', [2, 16, 100, 512])
def test_examples_are_pieces_of_the_causal_one(seq_len):
    causal = examples(CausalLM(), TOKENS, seq_len=seq_len)
    found = examples(PrefixLM(), TOKENS, seq_len=seq_len)
    for one, two in zip(found, causal, strict=True):
        for key in ('inputs', 'targets'):
            np.testing.assert_array_equal(one[key], two[key])
    ids = [TOKENIZER.bos_id, *TOKENS, TOKENIZER.eos_id]
    np.testing.assert_array_equal(np.concatenate([e['inputs'] for e in found]), ids[:-1])
    np.testing.assert_array_equal(np.concatenate([e['targets'] for e in found]), ids[1:])
    assert max(len(e['inputs']) for e in found) <= seq_len
    assert len(found) == -(-(len(TOKENS) + 1) // seq_len)


def test_weight_is_on_the_suffix():
    for example in examples(PrefixLM(), TOKENS, seq_len=64):
        prefix = int(example['prefix'].sum())
        in_view = example['inputs'][:prefix]
        rest = example['targets'][example['weights'] > 0]
        # All that the piece spells, once: what is in view is not asked for.
        whole = np.append(example['inputs'], example['targets'][-1])
        np.testing.assert_array_equal(np.concatenate([in_view, rest]), whole)
        np.testing.assert_array_equal(example['prefix'], np.arange(len(whole) - 1) < prefix)
        assert example['prefix'].dtype == np.int32 and example['weights'].dtype == np.float32


def test_splits_are_uniform_from_1_to_below_the_length():
    n_splits = 15
    drawn = [
        int(examples(PrefixLM(), TOKENS[:15], seq_len=64, seed=seed)[0]['prefix'].sum())
        for seed in range(3000)
    ]
    counts = np.bincount(drawn, minlength=17)
    assert counts[0] == counts[16] == 0
    expected = 3000 / n_splits
    assert np.sum((counts[1:16] - expected) ** 2 / expected) < 36.1  # 99.9%, 14 degrees of freedom


@pytest.mark.parametrize('ratio, prefix', [(0.0, 0), (0.25, 4), (0.75, 12), (0.999, 15)])
def test_a_fixed_share(ratio, prefix):
    (example,) = examples(PrefixLM(ratio=ratio), TOKENS[:15], seq_len=64)
    assert example['prefix'].sum() == prefix
    assert example['weights'].sum() == 16 - max(prefix - 1, 0)


def test_split_0_is_the_causal_example():
    (causal,) = examples(CausalLM(), TOKENS[:50], seq_len=64)
    (example,) = examples(PrefixLM(ratio=0.0), TOKENS[:50], seq_len=64)
    assert not example.pop('prefix').any()
    for key in causal:
        np.testing.assert_array_equal(example[key], causal[key])
        assert example[key].dtype == causal[key].dtype


@pytest.mark.parametrize('ratio', [None, 0.0, 0.5])
def test_short_documents(ratio):
    (example,) = examples(PrefixLM(ratio=ratio), TOKENS[:0], seq_len=8)
    assert example['inputs'].tolist() == [TOKENIZER.bos_id]
    assert example['targets'].tolist() == [TOKENIZER.eos_id]
    assert example['weights'].tolist() == [1]
    (example,) = examples(PrefixLM(ratio=ratio), TOKENS[:1], seq_len=8)
    assert example['weights'].tolist() == [1, 1]


def test_chance_is_that_of_rng_alone():
    one, two, three = (examples(PrefixLM(), TOKENS, seq_len=64, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a['prefix'], b['prefix'])
    assert [e['prefix'].sum() for e in one] != [e['prefix'].sum() for e in three]


@pytest.mark.parametrize('ratio', [-0.1, 1.0])
def test_what_cannot_be_is_refused(ratio):
    with pytest.raises(UserError, match='must be in'):
        PrefixLM(ratio=ratio)


def test_who_sees_whom():
    batch = reading.make_batch(PrefixLM(), seq_len=40, sizes=[12, 19])
    segment, prefix = batch['segments'][0], batch['prefix'][0] > 0
    place = np.arange(40)
    seen = reading.same(segment, segment) & ((place[:, None] >= place) | prefix)
    found = reading.reach(PrefixLM(), DECODER, batch)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])
    # No loss on what is in view: a token is predicted where it is not seen.
    for t in np.flatnonzero(batch['weights'][0]):
        same_segment = t + 1 < 40 and segment[t + 1] == segment[t]
        assert not (same_segment and found[t, t + 1])
    assert prefix.sum() > 2 and (prefix[1:] & ~prefix[:-1]).sum() == 1 + (not prefix[0])


def test_split_0_is_the_causal_loss_bit_for_bit():
    objective = PrefixLM(ratio=0.0)
    batch = reading.make_batch(objective, seq_len=40, sizes=[12, 19])
    plain = {key: values for key, values in batch.items() if key != 'prefix'}
    ours, causal = (
        reading.loss(objective, DECODER, batch),
        reading.loss(CausalLM(), DECODER, plain),
    )
    assert ours.total == causal.total and ours.weight == causal.weight > 0
    assert ours.metrics == causal.metrics


def test_loss_is_over_the_suffix():
    objective = PrefixLM(z_loss=0.1)
    batch = reading.make_batch(objective, seq_len=40, sizes=[12, 19])
    x_TD = reading.features(objective, DECODER, batch)[0].astype(np.float64)
    head_VD = np.asarray(reading.parameters(DECODER)['head_VD'], np.float64)
    logit_TV = x_TD @ head_VD.T
    log_z_T = np.log(np.exp(logit_TV).sum(-1))
    nll_T = log_z_T - logit_TV[np.arange(40), batch['targets'][0]]
    weight_T = batch['weights'][0]
    loss = reading.loss(objective, DECODER, batch)
    np.testing.assert_allclose(loss.total, (weight_T * (nll_T + 0.1 * log_z_T**2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics['nll'], (weight_T * nll_T).sum(), rtol=1e-5)
    right = (weight_T * (logit_TV.argmax(-1) == batch['targets'][0])).sum()
    assert loss.metrics['accuracy'] == right
    assert loss.weight == objective.loss_tokens(batch) == weight_T.sum()


def test_flops_are_the_mean_over_splits():
    def pairs(split):
        return sum(max(split, t + 1) for t in range(50))

    causal = CausalLM().flops(DECODER, 50)
    per_pair = 6 * DECODER.layers * 2 * DECODER.heads * DECODER.head_dim / 50
    # The head is computed from the last position of the prefix on.
    causal -= 6 * DECODER.vocab * DECODER.dim * 24 / 50
    wanted = np.mean([causal + per_pair * (pairs(split) - pairs(0)) for split in range(1, 50)])
    assert PrefixLM().flops(DECODER, 50) == pytest.approx(wanted)
    wanted = causal + per_pair * (pairs(25) - pairs(0))
    assert PrefixLM(ratio=0.5).flops(DECODER, 50) == pytest.approx(wanted)
    long = PrefixLM().flops(DECODER, 4096)
    assert long == pytest.approx(
        CausalLM().flops(DECODER, 4096)
        - 6 * DECODER.vocab * DECODER.dim * 2047 / 4096
        + 6 * DECODER.layers * 2 * DECODER.heads * DECODER.head_dim * 4094 / 6,
        rel=1e-4,
    )


def test_an_encoder_is_refused():
    PrefixLM().check(DECODER)
    with pytest.raises(UserError, match='set --model.encoder-layers 0'):
        PrefixLM().check(BOTH)
