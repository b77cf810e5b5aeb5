"""Weighted sums against their parts."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout, mesh
from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.base import of_stream
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2
from llama_jax.objectives.weighted import Weighted, own_draw
from tests.objectives import texts

CONFIG = ModelConfig(
    vocab=64, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=64, dropout=0.1
)
COMPUTE = Compute(attention='reference', unroll=1)
SEQ_LEN = 64
KEY = jax.random.key(5)
TOKENIZER = SimpleNamespace(
    bos_id=60, eos_id=61, pad_id=62, mask_id=63, byte_lengths=np.array([1] * 60 + [0] * 4)
)
CAUSAL = CausalLM()
CONTRAST = InfoNCE(bidirectional=False, learned=True)
TYPICAL = Weighted(parts=(CAUSAL, CONTRAST), weights=(1.0, 0.1), shares=(0.5, 0.5))


class Own(CausalLM):
    """With a loss of its own, which may be of other inputs."""

    def loss(self, *args, **context):
        return super().loss(*args, **context)


def make_mesh(n_devices):
    return mesh.make(MeshConfig(), jax.devices()[:n_devices])


def documents(n, *, length=(10, 60), seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 60, random.integers(*length)) for _ in range(n)]


def examples_of(objective, text, *, seq_len=SEQ_LEN, seed=0):
    return pieces.examples(
        objective, text, tokenizer=TOKENIZER, seq_len=seq_len, rng=np.random.default_rng(seed)
    )


def pack(objective, documents, *, rows):
    """A batch of as many examples as `rows` rows hold, of the documents over and over."""
    endless = itertools.chain.from_iterable(
        examples_of(objective, documents[k % len(documents)], seed=k) for k in itertools.count()
    )
    return texts.packed(endless, objective, seq_len=SEQ_LEN, rows=rows, pad_id=TOKENIZER.pad_id)


@functools.cache
def compiled(objective, n_devices):
    """Parameters, and a function of them, a batch and a key: gradients of both kinds, and sums."""
    devices = make_mesh(n_devices)

    def total(params, extra, batch, key):
        model = layers.bind(CONFIG, params)
        loss = objective.loss(model, batch, extra=extra, compute=COMPUTE, key=key)
        return loss.total, loss

    with jax.set_mesh(devices):
        params = layers.create(CONFIG, jax.random.key(0), devices)
        extra = objective.extra(CONFIG, jax.random.key(1))
        return params, extra, jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


def evaluate(objective, batch, *, n_devices=1, key=KEY):
    """Gradients of the backbone and of the objective's own parameters, and the sums."""
    devices = make_mesh(n_devices)
    params, extra, gradient = compiled(objective, n_devices)
    with jax.set_mesh(devices):
        batch = jax.device_put(batch, NamedSharding(devices, layout.rows()))
        return jax.device_get(gradient(params, extra, batch, key))


def first_stream(batch):
    return {name: x for name, x in batch.items() if '/' not in name}


@pytest.mark.slow
def test_one_part_is_that_part_bit_for_bit():
    alone = Weighted(parts=(CAUSAL,), weights=(1.0,), shares=(1.0,))
    batch = first_stream(pack(TYPICAL, documents(6), rows=8))
    gradients, loss = evaluate(alone, batch)
    (part_key,) = jax.random.split(KEY, 1)
    want_gradients, want = evaluate(CAUSAL, batch, key=part_key)
    assert loss.total == want.total > 0 and loss.weight == want.weight
    assert loss.metrics['nll'] == want.metrics['nll'] == loss.metrics['CausalLM/nll']
    assert loss.metrics['CausalLM/accuracy'] == want.metrics['accuracy']
    jax.tree.map(np.testing.assert_array_equal, gradients, want_gradients)
    assert alone.accumulates and alone.has_likelihood and alone.causal
    assert alone.flops(CONFIG, SEQ_LEN) == CAUSAL.flops(CONFIG, SEQ_LEN)


@pytest.mark.slow
def test_two_parts_are_the_sum_made_by_hand():
    batch = pack(TYPICAL, documents(6), rows=8)
    (dparams, dextra), loss = evaluate(TYPICAL, batch)
    first_key, second_key = jax.random.split(KEY)
    (dparams_0, _), loss_0 = evaluate(CAUSAL, first_stream(batch), key=first_key)
    (dparams_1, dextra_1), loss_1 = evaluate(CONTRAST, of_stream('1', batch), key=second_key)
    assert loss_0.weight > 2 * loss_1.weight > 8 and loss.weight == loss_0.weight
    # The mean of the one and a tenth of the mean of the other, over one weight.
    share = 0.1 * loss_0.weight / loss_1.weight
    want = loss_0.total / loss_0.weight + 0.1 * loss_1.total / loss_1.weight
    np.testing.assert_allclose(loss.total / loss.weight, want, rtol=1e-6)
    jax.tree.map(
        lambda x, x_0, x_1: np.testing.assert_allclose(x, x_0 + share * x_1, rtol=1e-4, atol=1e-4),
        *(dparams, dparams_0, dparams_1),
    )
    np.testing.assert_allclose(
        dextra['1']['log_temperature'], share * dextra_1['log_temperature'], rtol=1e-5
    )
    means = loss.means()
    assert means['nll'] == loss_0.metrics['nll'] / loss_0.weight == means['CausalLM/nll']
    for name in ('accuracy', 'alignment', 'uniformity', 'temperature'):
        want = loss_1.metrics[name] / loss_1.weight
        np.testing.assert_allclose(means[f'InfoNCE/{name}'], want, rtol=1e-5)
    np.testing.assert_allclose(means['InfoNCE/loss'], loss_1.total / loss_1.weight, rtol=1e-5)
    assert TYPICAL.loss_tokens(batch) == loss_0.weight + loss_1.weight


@pytest.mark.slow
def test_devices_change_neither_loss_nor_gradients():
    batch = pack(TYPICAL, documents(6), rows=8)
    gradients, loss = evaluate(TYPICAL, batch, n_devices=8)
    want_gradients, want = evaluate(TYPICAL, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), loss, want)
    size = max(np.abs(x).max() for x in jax.tree.leaves(want_gradients))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * size), gradients, want_gradients
    )


@pytest.mark.slow
def test_a_part_without_weight_adds_nothing():
    """A batch without pairs: no division by zero."""
    batch = pack(TYPICAL, documents(6), rows=8)
    batch |= {name: 0 * x for name, x in batch.items() if name.endswith('/segments')}
    (dparams, dextra), loss = evaluate(TYPICAL, batch)
    first_key, _ = jax.random.split(KEY)
    (want_dparams, _), want = evaluate(CAUSAL, first_stream(batch), key=first_key)
    assert loss.metrics['InfoNCE/loss'] == dextra['1']['log_temperature'] == 0
    np.testing.assert_allclose(loss.total, want.total, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), dparams, want_dparams
    )


SHARED = Weighted(
    parts=(CAUSAL, InfoNCE(views='shared', learned=True)), weights=(1.0, 0.1), shares=(1.0, 0.0)
)


@pytest.mark.slow
def test_one_pass_serves_both_parts():
    """Cross-entropy is that of the causal part alone, bit for bit; the contrastive loss is of crops
    of its features. FLOPs are counted once: tests/train/test_every_objective.py has the program's.
    """
    batch = pack(SHARED, documents(9), rows=8)
    causal = {name: x for name, x in batch.items() if '.' not in name}
    assert causal.keys() == pack(CAUSAL, documents(9), rows=8).keys()
    (_, dextra), loss = evaluate(SHARED, batch)
    first_key, _ = jax.random.split(KEY)
    _, alone = evaluate(CAUSAL, causal, key=first_key)
    assert loss.metrics['nll'] == alone.metrics['nll'] and loss.weight == alone.weight
    assert dextra['1']['log_temperature'] != 0
    # By hand, from the features of the causal part under the same dropout.
    devices = make_mesh(1)
    params, extra, _ = compiled(SHARED, 1)

    def by_hand(params, batch, key):
        x_BTD = CAUSAL.read(layers.bind(CONFIG, params), batch, compute=COMPUTE, key=key)
        return jnp.asarray(x_BTD, jnp.float32)

    with jax.set_mesh(devices):
        placed = jax.device_put(batch, NamedSharding(devices, layout.rows()))
        x_BTD = np.asarray(jax.jit(by_hand)(params, placed, first_key))
    a, b, owner = [], [], []
    for row, segments in enumerate(batch['segments']):
        for m in range(1, segments.max() + 1):
            here = segments == m
            views = [x_BTD[row, here & (batch[f'{view}.1'][row] > 0)].mean(0) for view in 'ab']
            a_D, b_D = (view / np.linalg.norm(view) for view in views)
            a.append(a_D), b.append(b_D), owner.append(batch['document.1'][row][here][0])
    cos_NN = np.array(a) @ np.array(b).T / CONTRAST.temperature
    apart_NN = np.array(owner)[:, None] != np.array(owner)
    logit_NN = np.where(apart_NN | np.eye(len(a), dtype=bool), cos_NN, -np.inf)
    want = sum((np.log(np.exp(x).sum(1)) - np.diag(x)).sum() / 2 for x in (logit_NN, logit_NN.T))
    np.testing.assert_allclose(loss.metrics['InfoNCE/loss'], want, rtol=1e-4)
    assert loss.weights['InfoNCE/loss'] == len(a)
    assert SHARED.loss_tokens(batch) == alone.weight + len(a)
    assert SHARED.flops(CONFIG, SEQ_LEN) == CAUSAL.flops(CONFIG, SEQ_LEN)


def test_a_part_that_joins_leaves_documents_whole():
    """No row is cut for it, no piece ends where the document does not, and crops are of the
    piece."""
    text = np.arange(150) % 60
    alone, both = (examples_of(objective, text) for objective in (CAUSAL, SHARED))
    assert SHARED.lengths(SEQ_LEN) == {'': SEQ_LEN} and len(alone) == len(both) == 3
    for one, other in zip(alone, both, strict=True):
        for name, x in one.items():
            np.testing.assert_array_equal(x, other[name])
        n = len(one['inputs'])
        for view in 'ab':
            crop = np.flatnonzero(other[f'{view}.1'])
            assert 1 <= len(crop) <= round(n / 2) and np.ptp(crop) == len(crop) - 1
        assert len(set(other['document.1'])) == 1
    ends = [example['targets'][-1] == TOKENIZER.eos_id for example in both]
    assert ends == [False, False, True]
    assert len(SHARED._batch(1, pack(SHARED, documents(4), rows=2))) == 8


MIXED = Weighted(
    parts=(MaskedLM(), PrefixLM(), InfoNCE(), ReplacedTokens()),
    weights=(1.0, 1.0, 1.0, 1.0),
    shares=(0.2, 0.3, 0.2, 0.3),
)


@pytest.mark.parametrize('objective', [TYPICAL, MIXED])
@pytest.mark.parametrize('length', [1, 20, 30, 34, 500])
def test_every_part_makes_one_example_of_every_piece(objective, length):
    text = np.arange(length) % 60
    examples = examples_of(objective, text)
    lengths = objective.lengths(SEQ_LEN)
    assert sum(lengths.values()) == SEQ_LEN and objective.ends
    # The parts that predict the end, and those that hold the text alone.
    ending = [0] if objective is TYPICAL else [1]
    plain = [] if objective is TYPICAL else [0, 3]
    found = {k: [] for k in (*ending, *plain)}
    number = [type(part) for part in objective.parts].index(InfoNCE)
    for example in examples:
        assert example.keys() == examples[0].keys()
        for key, x in example.items():
            assert len(x) <= lengths[key.rpartition('/')[0]]
        for k, targets in found.items():
            ids = example[f'{k}/targets' if k else 'targets']
            targets.append(ids if k in ending else ids[1:])
        piece = found[ending[0]][-1]
        for view in 'ab':
            assert set(example[f'{number}/{view}/inputs']) <= set(piece) - {TOKENIZER.eos_id}
    for k, targets in found.items():
        whole = text if k in plain else [*text, TOKENIZER.eos_id]
        np.testing.assert_array_equal(np.concatenate(targets), whole)
    if length == 500:
        # Every row but the last is full, of the part that has the least room.
        sizes = [len(piece) for piece in found[ending[0]]]
        assert set(sizes[:-1]) == {32 if objective is TYPICAL else 11}


def test_parts_have_draws_of_their_own():
    rng = np.random.default_rng(0)
    draws = np.array([[own_draw(draw, k) for k in range(4)] for draw in rng.random(4000)])
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert np.sum((counts - 200) ** 2 / 200) < 43.8  # 99.9%, 19 degrees of freedom
    # The correlation of independent draws is 0 +- 1 / sqrt(4000).
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06
    draw = rng.random()
    two = Weighted(
        parts=(UL2(), InfoNCE(), UL2()), weights=(1.0, 1.0, 1.0), shares=(0.5, 0.25, 0.25)
    )
    assert two.sizes(40, seq_len=256, draw=draw) == (
        *UL2().sizes(40, seq_len=128, draw=draw),
        *InfoNCE().sizes(40, seq_len=64, draw=own_draw(draw, 1)),
        *UL2().sizes(40, seq_len=64, draw=own_draw(draw, 2)),
    )
    # No example where a part has none: of too many tokens for a pair.
    assert two.sizes(257, seq_len=256, draw=draw) is None


def test_a_piece_of_nothing_but_the_end_has_no_text_for_a_part():
    tokens = np.arange(5)
    sizes = TYPICAL.sizes(1, seq_len=SEQ_LEN, draw=0.5)
    for start, made in ((5, False), (4, True)):
        piece = pieces.Piece(tokens, start, start + 1, 0.5, sizes, identity=1)
        example = TYPICAL.example(
            piece, tokenizer=TOKENIZER, seq_len=SEQ_LEN, rng=np.random.default_rng(0)
        )
        assert (example is not None) == made


def test_pieces_of_a_document_are_no_negatives_of_each_other():
    text, other = np.arange(200) % 60, np.arange(200) % 59
    ids = {x for example in examples_of(TYPICAL, text) for x in example['1/a/document']}
    assert len(ids) == 1 and len(examples_of(TYPICAL, text)) > 2
    assert ids == {pieces.identity_of(text)}
    assert ids.isdisjoint(examples_of(TYPICAL, other)[0]['1/a/document'])


def test_streams_stay_in_step_in_packed_rows():
    texts = [np.full(n, i) for i, n in enumerate([5, 9, 40, 3, 8, 70, 6])]  # a token a document
    batch = pack(TYPICAL, texts, rows=6)
    assert batch['segments'].max() > 1
    for row in range(6):
        for segment in range(1, batch['segments'][row].max() + 1):
            here = batch['segments'][row] == segment
            (text,) = set(batch['targets'][row][here][:-1])
            for view in 'ab':
                there = batch[f'1/{view}/segments'][row] == segment
                assert set(batch[f'1/{view}/inputs'][row][there]) == {text}
        assert batch['1/a/segments'][row].max() == batch['segments'][row].max()
    assert TYPICAL.segments(SEQ_LEN) == CONTRAST.segments(SEQ_LEN // 2)


def test_answers_come_from_the_parts():
    assert TYPICAL.causal and TYPICAL.has_likelihood
    assert TYPICAL.ends and not TYPICAL.accumulates
    assert not MIXED.causal and not MIXED.has_likelihood
    assert TYPICAL.lengths(100) == {'': 50, '1/a': 25, '1/b': 25}
    assert TYPICAL.flops(CONFIG, 64) == pytest.approx(
        (CAUSAL.flops(CONFIG, 32) + CONTRAST.flops(CONFIG, 32)) / 2
    )
    extra = jax.eval_shape(lambda: MIXED.extra(CONFIG, jax.random.key(0)))
    assert [*extra] == ['3'] and extra['3'].keys() == {'generator', 'head_D', 'bias'}
    twice = Weighted(
        parts=(CAUSAL, MaskedLM(), MaskedLM()), weights=(1.0, 1.0, 1.0), shares=(0.5, 0.25, 0.25)
    )
    assert twice._names() == ['CausalLM', 'MaskedLM1', 'MaskedLM2']


def test_a_sum_writes_in_the_order_of_the_part_that_unmasks():
    blocks = BlockDiffusion(block=2)
    for parts in ((blocks, CONTRAST), (ReplacedTokens(), blocks), (blocks, MaskedDiffusion())):
        asked = Weighted(parts).reading
        assert asked.unmasks == blocks.reading.unmasks and not asked.text
    asked = Weighted((CAUSAL, MaskedDiffusion())).reading
    assert asked.unmasks == MaskedDiffusion().reading.unmasks and asked.text
    assert Weighted((CAUSAL, CONTRAST)).reading.unmasks is None


def test_sums_that_cannot_be_are_refused():
    no_dropout = ModelConfig(
        vocab=64, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, context=64
    )
    dropout = Weighted(
        parts=(CAUSAL, InfoNCE(views='dropout')), weights=(1.0, 1.0), shares=(0.5, 0.5)
    )
    narrow = Weighted(parts=(SpanCorruption(), MaskedLM()), weights=(1.0, 1.0), shares=(0.99, 0.01))
    for refused, match in (
        (lambda: Weighted(parts=(), weights=(), shares=()), '0 parts'),
        (lambda: Weighted(parts=(CAUSAL,), weights=(1.0, 1.0), shares=(1.0,)), '2 weights'),
        (lambda: Weighted(parts=(CAUSAL,), weights=(1.0,), shares=(0.5,)), '1 in all'),
        (lambda: Weighted(parts=(CAUSAL,), weights=(0.0,), shares=(1.0,)), 'positive'),
        (lambda: Weighted((SHARED.parts[1],)), 'makes no pass that others can read'),
        (lambda: Weighted((CONTRAST, SHARED.parts[1])), 'makes no pass that others can read'),
        (lambda: Weighted((Own(), SHARED.parts[1])), 'Own as the first part makes no pass'),
        (lambda: Weighted(SHARED.parts, shares=(0.5, 0.5)), 'reads those of the first part'),
        (lambda: Weighted((CAUSAL, CONTRAST), shares=(1.0, 0.0)), 'which needs positions'),
        (lambda: InfoNCE(views='shared', chunks=2), 'no effect'),
        (lambda: Weighted(parts=(TYPICAL,), weights=(1.0,), shares=(1.0,)), 'within'),
        (lambda: dropout.check(no_dropout), 'model.dropout'),
        (lambda: Weighted((CAUSAL, Dual(curriculum_steps=9))).check_steps(5), 'has 5'),
        (lambda: narrow.lengths(64), 'without positions'),
        (lambda: examples_of(TYPICAL, np.arange(9), seq_len=2), 'without positions'),
        (lambda: narrow.lengths(200), 'no room for one text'),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)
