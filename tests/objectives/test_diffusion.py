"""Masked and block diffusion and the dual objective against enumeration: every set of masks, every
order of the tokens."""

import functools
import itertools
import math
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import mesh
from llama_jax.data.pieces import Piece
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import Window
from llama_jax.objectives.base import Context
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.diffusion import MaskedDiffusion, Masks, masks_of, times
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.flops import decoder_flops
from llama_jax.train.run import place
from tests.objectives import texts

CONFIG = ModelConfig(
    vocab=16, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=32
)
COMPUTE = Compute(attention='reference', unroll=1)
IDS = types.SimpleNamespace(bos_id=10, eos_id=11, pad_id=12, mask_id=13)
TEXT, OTHER = np.array([3, 1, 4, 1]), np.array([5, 9, 2])
L = len(TEXT)
SUBSETS = [s for k in range(1, L + 1) for s in itertools.combinations(range(L), k)]


@functools.cache
def devices():
    return mesh.make(MeshConfig(), jax.devices()[:1])


@functools.cache
def params():
    """Weights large enough that what a token sees is told by what it says."""
    made = layers.create(CONFIG, jax.random.key(0), devices())
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, made)


@functools.cache
def program(visible):
    def run(params, token_BT, at_BT):
        how = {'place_BT': at_BT} if visible == 'places' else {'causal': visible == 'causal'}
        x_BTD, _ = layers.bind(CONFIG, params).features(token_BT, compute=COMPUTE, **how)
        logits_BTV = layers.bind(CONFIG, params).logits(x_BTD)
        return jax.nn.log_softmax(
            jnp.where(jnp.arange(CONFIG.vocab) == IDS.mask_id, -jnp.inf, logits_BTV)
        )

    return jax.jit(run)


def log_p(rows, visible, places=None):
    """Of every token at every place of rows of equal length, by the plain model."""
    token_BT = np.array(rows, np.int32)
    at_BT = np.broadcast_to(
        np.arange(token_BT.shape[1]) if places is None else places, token_BT.shape
    )
    with jax.set_mesh(devices()):
        return np.asarray(program(visible)(params(), token_BT, at_BT), np.float64)


def shown(hidden, text=TEXT):
    """Begin token and text with masks at places of the text."""
    row = [IDS.bos_id, *text]
    for i in hidden:
        row[1 + i] = IDS.mask_id
    return row


def mean_over_orders(open_, visible, *, places=None, shift=0, text=TEXT):
    """Mean over all orders of the tokens `open_` of the negative log-likelihood by the chain rule,
    each token given all of the text that is not open or came before it in the order."""
    sets = [s for k in range(1, len(open_) + 1) for s in itertools.combinations(open_, k)]
    table = log_p([shown(s, text) for s in sets], visible, places)
    of = {s: table[i] for i, s in enumerate(sets)}
    total = 0.0
    for order in itertools.permutations(open_):
        for j, token in enumerate(order):
            left = tuple(sorted(order[j:]))
            total -= of[left][1 + token - shift, text[token]]
    return total / math.factorial(len(open_))


def batch_of(objective, n, seq_len, text=TEXT):
    """`n` rows of a text and OTHER, one behind the other, without masks."""
    pieces = [
        Piece(np.concatenate([t, [0]]), 0, len(t), 0.9, (len(t) + 1,), 0) for t in (text, OTHER)
    ]
    made = [objective.example(p, tokenizer=IDS, seq_len=seq_len, rng=None) for p in pieces]
    return texts.packed(made * n, objective, seq_len=seq_len, rows=n, pad_id=IDS.pad_id)


@functools.cache
def loss_program(objective):
    def run(params, batch, masks):
        bound = layers.bind(CONFIG, params)
        return objective.masked_loss(bound, batch, masks, compute=COMPUTE, key=None)

    return jax.jit(run)


def nelbo(objective, masked, weight, seq_len, text=TEXT):
    """The loss of `objective` under masks by row [n, L] of a text."""
    batch = batch_of(objective, len(masked), seq_len, text)
    masks = [np.zeros(batch['inputs'].shape, x.dtype) for x in (masked, weight)]
    for array, values in zip(masks, (masked, weight), strict=True):
        array[:, 1 : 1 + len(text)] = values
    with jax.set_mesh(devices()):
        arrays = place(
            {**batch, 'masked': masks[0], 'weight': masks[1].astype(np.float32)}, devices()
        )
        masks = Masks(arrays.pop('masked'), arrays.pop('weight'))
        loss = jax.device_get(loss_program(objective)(params(), arrays, masks))
    assert loss.weight == len(masked) * (len(text) + len(OTHER))
    return float(loss.metrics['nll'])


def every_mask(blocks):
    """All masks of a text, and of each its weight times its probability, where each block draws k
    uniformly and then which k."""
    n = sum(map(len, blocks))
    masked, weight = [], []
    ways = [[s for k in range(1, len(b) + 1) for s in itertools.combinations(b, k)] for b in blocks]
    for chosen in itertools.product(*ways):
        p = math.prod(
            1 / len(b) / math.comb(len(b), len(s)) for b, s in zip(blocks, chosen, strict=True)
        )
        row, own = np.zeros(n, bool), np.zeros(n)
        for b, s in zip(blocks, chosen, strict=True):
            row[list(s)], own[list(s)] = True, p * len(b) / len(s)
        masked.append(row)
        weight.append(own)
    return np.array(masked), np.array(weight)


@pytest.mark.slow
@pytest.mark.parametrize(('n', 'shift'), [(4, 0), (1, 0), (3, 1), (6, 0), (6, 1)])
def test_the_bound_is_the_mean_over_all_orders(n, shift):
    """A packed text: what stands beside it is neither seen nor counted."""
    text = np.array([3, 1, 4, 1, 5, 2])[:n]
    objective = MaskedDiffusion(read_previous=bool(shift))
    found = nelbo(objective, *every_mask([range(n)]), seq_len=n + 8, text=text)
    wanted = mean_over_orders(range(n), 'all', shift=shift, text=text)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_drawing_k_is_drawing_t():
    """The integral over t of t^(k - 1) (1 - t)^(L - k), which is that of the masks of a set of k
    tokens over t, is the probability of the set by k, times 1 / k."""
    for s in SUBSETS:
        k = len(s)
        by_t = math.gamma(k) * math.gamma(L - k + 1) / math.gamma(L + 1)
        assert by_t == pytest.approx(1 / L / math.comb(L, k) * L / k)


@pytest.mark.slow
@pytest.mark.parametrize(('block', 'n'), [(1, L), (2, L - 1), (L + 1, L)])
def test_blocks_of_one_are_causal_and_one_block_is_masked_diffusion(block, n):
    """Of whole blocks with the begin token."""
    objective, text = BlockDiffusion(block=block), TEXT[:n]
    blocks = [[i for i in range(n) if (1 + i) // block == b] for b in range(n + 1)]
    blocks = [b for b in blocks if b]
    found = nelbo(objective, *every_mask(blocks), seq_len=20, text=text)
    if block == 1:  # a causal model that is asked by a mask for the next token
        wanted = -sum(log_p([shown([i])[: 2 + i]], 'causal')[0, 1 + i, text[i]] for i in range(n))
    elif block > n:
        wanted = nelbo(MaskedDiffusion(), *every_mask([range(n)]), seq_len=12, text=text)
    else:
        places = np.arange(n + 1) // block
        wanted = sum(mean_over_orders(b, 'places', places=places, text=text) for b in blocks)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_what_a_block_sees_is_what_the_paper_says():
    """The three parts of its mask: block-diagonal, offset block-causal, block-causal; by text. The
    first is cut, and fills its last block with a mask."""
    objective = BlockDiffusion(block=2)
    batch = batch_of(objective, 1, 24)
    n = {1: L + 2, 2: len(OTHER) + 1}
    wanted = np.zeros((24, 24), bool)
    for q, k in itertools.product(range(20), repeat=2):
        segment = 1 if q < 2 * n[1] else 2
        first, size = (0, n[1]) if segment == 1 else (2 * n[1], n[2])
        if not first <= k < first + 2 * size:
            continue
        (q_clean, q_at), (k_clean, k_at) = divmod(q - first, size), divmod(k - first, size)
        q_block, k_block = q_at // 2, k_at // 2
        diagonal = q_block == k_block and not q_clean and not k_clean
        offset = q_block > k_block and k_clean and not q_clean
        causal = q_block >= k_block and k_clean and q_clean
        wanted[q, k] = diagonal or offset or causal
    places, until = objective.places(batch)
    segments = jnp.array(batch['segments'])
    seen = Visibility(segments, segments, places, places, until_BS=until).dense()[0]
    np.testing.assert_array_equal(seen[:20], wanted[:20])
    assert seen[20:, 20:].all(axis=1).all() or seen[20:].any(axis=1).all()  # padding has a key


def test_masks_are_uniform_and_times_are_stratified():
    """Of groups of 4 and 3 tokens and 12 rows, each k comes equally often in every draw."""
    group = np.repeat([1, 2, 0], [5, 4, 3])
    token = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0], bool)
    B, picks = 12, np.zeros(12)
    with jax.set_mesh(devices()):
        arrays = place({'g': np.tile(group, (B, 1)), 't': np.tile(token, (B, 1))}, devices())
        draw = jax.jit(lambda g, t, seed: masks_of(g, t, jax.random.key(seed)))
        ks = []
        for seed in range(200):
            masked, weight = jax.device_get(draw(arrays['g'], arrays['t'], seed))
            assert not masked[:, ~token].any() and not weight[~masked].any()
            for g, n in ((1, 4), (2, 3)):
                k = masked[:, group == g].sum(axis=1)
                np.testing.assert_array_equal(np.bincount(k, minlength=n + 1)[1:], B // n)
                np.testing.assert_allclose(weight[:, group == g].max(axis=1), n / k)
            picks += masked.sum(axis=0)
            ks.append((masked[0, 1:5].sum(), masked[0, 6:9].sum()))
    # Every token is masked (L + 1) / 2L of the time, and every k comes in a given row.
    expected = 200 * B * np.where(group == 1, 5 / 8, 4 / 6)[token]
    assert np.abs(picks[token] / expected - 1).max() < 0.06
    for values, n in zip(zip(*ks, strict=True), (4, 3), strict=True):
        count = np.bincount(values, minlength=n + 1)[1:]
        assert np.sum((count - 200 / n) ** 2 / (200 / n)) < 16.3  # 99.9%, 3 degrees of freedom


def test_the_times_of_a_row_are_spread():
    with jax.set_mesh(devices()):
        (group,) = place({'g': np.tile(np.arange(16), (4, 1))}, devices()).values()
        found = np.asarray(jax.jit(times)(group, jax.random.key(1)))
    assert ((found >= 0) & (found < 1)).all()
    np.testing.assert_allclose((found[1:] - found[:-1]) % 1, 0.25, atol=1e-6)
    assert np.diff(np.sort(found[0])).max() < 0.13  # 16 of them


@pytest.mark.slow
def test_both_kinds_of_texts_in_one_model():
    """TEXT is causal here and OTHER masked."""
    dual = Dual(z_loss=0.0)
    pieces = [
        Piece(np.concatenate([t, [0]]), 0, len(t), draw, (len(t) + 1,), 0)
        for t, draw in ((TEXT, 0.3), (OTHER, 0.6))
    ]
    made = [dual.example(p, tokenizer=IDS, seq_len=12, rng=None) for p in pieces]
    batch = texts.packed(made, dual, seq_len=12, rows=2, pad_id=IDS.pad_id)
    assert batch['prefix'].tolist() == [[0] * 5 + [1] * 4 + [0] * 3, [0] * 12]
    example = CausalLM().example(pieces[0], tokenizer=IDS, seq_len=4, rng=None)
    alone = texts.packed([example], CausalLM(), seq_len=4, rows=1, pad_id=IDS.pad_id)

    # One kind after the other: the first half of 10 steps is causal.
    curriculum = replace(dual, curriculum_steps=10)
    all_masked = MaskedDiffusion(z_loss=0.0, read_previous=True)

    @jax.jit
    def losses(params, batch, alone, step):
        bound, how = layers.bind(CONFIG, params), {'extra': {}, 'compute': COMPUTE, 'key': None}
        masks, _ = dual.masks(batch, None)
        causal = CausalLM(z_loss=0.0).loss(bound, alone, **how)
        of_step = (
            curriculum.loss(bound, batch, **how, context=Context(step)),
            curriculum.loss(bound, batch, **how),
            all_masked.loss(bound, batch, **how),
        )
        return dual.loss(bound, batch, **how), masks, causal, of_step

    with jax.set_mesh(devices()):
        arrays = [place(x, devices()) for x in (batch, alone)]
        found = [jax.device_get(losses(params(), *arrays, jnp.int32(step))) for step in (4, 5)]
    loss, masks, causal, (first, _, _) = found[0]
    second, validation, wanted = found[1][-1]
    assert first.metrics['masked_nll'] == 0 == second.metrics['causal_nll']
    assert first.total == first.metrics['nll'] == first.metrics['causal_nll'] > 1.5 * causal.total
    assert second.total == validation.total == pytest.approx(wanted.total, rel=1e-6)
    assert validation.metrics['nll'] == pytest.approx(wanted.metrics['nll'], rel=1e-6)
    assert curriculum.reading.whole.kind == 'bound' and dual.reading.whole.kind == 'exact'
    assert curriculum.has_likelihood and not dual.has_likelihood and 'nll' not in loss.metrics
    # What no text of a step has is not measured, and no 0.
    assert np.isnan(first.means()['masked_nll']) and np.isnan(second.means()['causal_accuracy'])
    assert second.means()['loss'] == second.total / second.weight

    assert not masks.masked_BT[0, :6].any() and 1 <= masks.masked_BT[0, 6:9].sum() <= 3
    hidden = np.flatnonzero(masks.masked_BT[0, 6:9])
    rows = log_p([[IDS.bos_id, *OTHER], shown(hidden, OTHER)], 'all')
    wanted = -sum(rows[1, i, OTHER[i]] * 3 / len(hidden) for i in hidden)
    # Each kind over its own tokens, in whichever microbatches these are.
    first = first._replace(metrics={name: first.metrics[name] for name in loss.metrics})
    for found in (loss, loss.plus(first), loss.plus(loss)):
        means = found.means()
        assert set(means) == {'loss', *loss.metrics}
        assert means['causal_nll'] == pytest.approx(
            found.metrics['causal_nll'] / found.weights['causal_nll']
        )
    assert loss.means()['masked_nll'] == pytest.approx(wanted / 3, rel=1e-5)
    assert loss.means()['causal_nll'] == pytest.approx(causal.total / 4, rel=1e-5)
    assert loss.plus(first).weights['masked_nll'] == 3
    assert loss.plus(first).weights['causal_nll'] == 4 + 7
    assert loss.total == pytest.approx(2 * causal.total + wanted, rel=1e-5)
    assert loss.weight == 7 and dual.loss_tokens(batch) == 4 + 2


def test_a_curriculum_costs_what_its_steps_do():
    model = replace(CONFIG, context=64)
    dual = Dual(curriculum_steps=20, causal_share=0.25)
    causal, masked = (
        replace(dual, curriculum_steps=0)._flops(model, 64, share) for share in (1.0, 0.0)
    )
    assert causal != masked
    for steps, share in ((20, 0.25), (10, 0.5), (40, 0.125), (4, 1.0)):
        of_run = dual.flops_of_run(model, 64, steps)
        assert of_run == pytest.approx(share * causal + (1 - share) * masked)
    assert dual.flops_of_run(model, 64, 0) == dual.flops(model, 64)
    assert replace(dual, curriculum_steps=0).flops_of_run(model, 64, 10) == dual.flops(model, 64)


def test_examples_hold_the_tokens_that_a_causal_model_learns():
    tokens = np.array([3, 1, 4, 1, 5, 9])
    for start, stop in ((0, 4), (2, 7)):
        piece = Piece(tokens, start, stop, 0.0, (), 0)
        causal = CausalLM().example(piece, tokenizer=IDS, seq_len=16, rng=None)
        for objective in (MaskedDiffusion(), MaskedDiffusion(read_previous=True), BlockDiffusion()):
            example = objective.example(piece, tokenizer=IDS, seq_len=16, rng=None)
            (size,) = objective.sizes(stop - start, seq_len=16, draw=0.0)
            learnt = example['targets'][example['weights'] > 0]
            if isinstance(objective, BlockDiffusion):
                # Of an end the last block is filled; of a cut its rest is there as masks.
                assert size == len(example['inputs']) == 16
                masks = 0 if stop == 7 else 3
                assert example['inputs'].tolist().count(IDS.mask_id) == 2 * masks
                assert example['weights'].tolist() == [0] + [1] * (7 - masks) + [0] * (8 + masks)
                batch = texts.packed([example], objective, seq_len=16, rows=1, pad_id=IDS.pad_id)
                assert objective.tokens(batch).sum() == 7 - masks
                ends, learnt = learnt[len(causal['targets']) :], learnt[: len(causal['targets'])]
                assert ends.tolist() == [IDS.eos_id] * (2 if stop == 7 else 0)
            else:
                assert size == len(example['inputs'])
            np.testing.assert_array_equal(learnt, causal['targets'])
            assert example['inputs'][0] == example['hidden'][0] == causal['inputs'][0]
        assert objective.loss_tokens({**example, 'positions': None}) > 0


def test_loss_tokens_and_flops_count_half_of_the_masks():
    batch = batch_of(MaskedDiffusion(), 3, 12)
    assert MaskedDiffusion().loss_tokens(batch) == 3 * (2.5 + 2) // 1
    half = decoder_flops(CONFIG, 12, causal=False, predicted=6)
    assert MaskedDiffusion().flops(CONFIG, 12) == half
    # Blocks of one: every token is masked, and sees as much as in a causal model.
    blocks = batch_of(BlockDiffusion(block=1), 3, 24)
    assert BlockDiffusion(block=1).loss_tokens(blocks) == 3 * 7
    alone = decoder_flops(CONFIG, 12, causal=True, predicted=11 / 2)
    assert BlockDiffusion(block=1).flops(CONFIG, 24) == pytest.approx(alone)
    # One block: the clean text is read beside it.
    whole = decoder_flops(CONFIG, 12, causal=False, predicted=12 / 4)
    assert BlockDiffusion(block=12).flops(CONFIG, 24) == pytest.approx(whole)


def test_what_cannot_be_is_refused():
    curriculum = Dual(curriculum_steps=9)
    curriculum.check_steps(6)
    for make, message in (
        (lambda: BlockDiffusion(block=0), 'blocks of 0 tokens'),
        (lambda: BlockDiffusion(read_previous=True), 'no effect on blocks'),
        (lambda: Dual(causal_share=1.0), 'without any'),
        (lambda: Dual(causal_weight=0), 'must be positive'),
        (lambda: Dual(causal_weight=3, curriculum_steps=9), 'causal-weight 3 has no effect'),
        (lambda: Dual(curriculum_steps=-1), 'curriculum-steps is -1'),
        (lambda: curriculum.check_steps(5), 'begin at step 5, and the run has 5'),
        (lambda: Dual(read_previous=False), 'leave read_previous'),
        (lambda: BlockDiffusion().lengths(3), 'a row of 3 positions'),
        (lambda: BlockDiffusion(block=9).lengths(16), 'in blocks of 8 at most'),
        (
            lambda: BlockDiffusion().check(
                ModelConfig(**{**CONFIG.__dict__, 'pattern': Window(4)})
            ),
            'leave --model.pattern out',
        ),
    ):
        with pytest.raises(UserError, match=message):
            make()
