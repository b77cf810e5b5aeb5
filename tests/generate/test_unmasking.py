"""Unmasking against brute force: a plain forward pass of the whole text for every token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.diffusion import Unmasker
from llama_jax.generate.finite import NotFiniteError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.asked import Unmasking
from llama_jax.trees import map_named

CONFIG = ModelConfig(vocab=8, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32, context=48)
COMPUTE = Compute(attention='reference')
MASK, END, PAD, T = 7, 6, 0, 32
PROMPTS = [[1, 2, 3], [4, 1, 5, 2, 2, 3, 1]]
FORMS = {'whole': Unmasking(), 'previous': Unmasking(True), 'blocks': Unmasking(block=4)}


def mesh_of(n=1, **axes):
    return make(MeshConfig(**axes), jax.devices()[:n])


@functools.cache
def params():
    """Weights large enough that a token depends on those around it."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        return (1 + 0.1 * values if path.endswith('scale_D') else values).astype(np.float32)

    return jax.device_put(map_named(draw, layers.abstract(CONFIG)), jax.devices()[0])


@functools.cache
def unmasker(form, end=END, n=1, **axes):
    return Unmasker(
        CONFIG,
        params(),
        mesh=mesh_of(n, **dict(axes)),
        compute=COMPUTE,
        mask_id=MASK,
        end_ids=() if end is None else (end,),
        pad_id=PAD,
        **FORMS[form]._asdict(),
    )


@functools.cache
def _forward(block):
    def run(params, token_BT, segment_BT):
        model, how = layers.bind(CONFIG, params), {}
        if block:
            how['place_BT'] = jnp.broadcast_to(jnp.arange(T) // block, token_BT.shape)
        x_BTD, _ = model.features(
            token_BT, segment_BT=segment_BT, causal=bool(block), compute=COMPUTE, **how
        )
        logits_BTV = model.logits(x_BTD)
        return jax.nn.log_softmax(jnp.where(jnp.arange(CONFIG.vocab) == MASK, -jnp.inf, logits_BTV))

    return jax.jit(run)


def log_p(form, tokens):
    """Of every token at every place of a text, which is all that is there."""
    token_BT, segment_BT = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    token_BT[0, : len(tokens)], segment_BT[0, : len(tokens)] = tokens, 1
    with jax.set_mesh(mesh_of()):
        found = np.asarray(_forward(FORMS[form].block)(params(), token_BT, segment_BT))[0]
    return np.roll(found, 1, axis=0) if FORMS[form].read_previous else found


def first_of(order, log_p_V, place):
    """What is smallest where a mask is filled in first."""
    if order == 'left':
        return place
    if order == 'confidence':
        return -log_p_V.max()
    second, first = np.sort(np.exp(log_p_V))[-2:]
    return second - first


def brute(form, prompt, n, order, shares):
    """Greedy text by brute force; `shares` are the tokens that each pass fills in. Blocks see
    nothing of what is behind them, and the last one is shown whole."""
    block = FORMS[form].block
    more = -(len(prompt) + n) % block if block else 0
    text = [*prompt, *[MASK] * (n + more)]
    stops = range(block, len(text) + 1, block) if block else [len(text)]
    for stop in (s for s in stops if s > len(prompt)):
        left = iter(shares)
        while MASK in text[:stop]:
            found = log_p(form, text[:stop])
            open_ = [t for t in range(len(prompt), stop) if text[t] == MASK]
            by_order = sorted((first_of(order, found[t], t), t) for t in open_)
            for _, t in by_order[: next(left)]:
                text[t] = int(found[t].argmax())
    return text[len(prompt) :][:n]


def written(form, prompts=PROMPTS, **how):
    """Texts that no end id cuts."""
    return [one.tokens for one in unmasker(form, None)(prompts, **how)]


@pytest.mark.parametrize('form', FORMS)
def test_left_to_right_is_the_brute_force(form):
    """Rows of several lengths at once; blocks are written by keys and values that are kept."""
    found = written(form, max_tokens=[6, 5], order='left')
    assert found == [
        brute(form, prompt, n, 'left', itertools.repeat(1))
        for prompt, n in zip(PROMPTS, (6, 5), strict=True)
    ]
    assert len({*map(tuple, found)}) > 1 and len({*found[0]}) > 1


@pytest.mark.parametrize(('form', 'order'), [('whole', 'confidence'), ('previous', 'margin')])
def test_the_most_certain_are_first_in_equal_shares(form, order):
    """Six tokens in four passes, 2 + 2 + 1 + 1; five in four, 2 + 1 + 1 + 1."""
    found = written(form, max_tokens=[6, 5], order=order, steps=4)
    assert found == [
        brute(form, PROMPTS[0], 6, order, [2, 2, 1, 1]),
        brute(form, PROMPTS[1], 5, order, [2, 1, 1, 1]),
    ]
    assert found != written(form, max_tokens=[6, 5], order='left')


def test_blocks_of_a_text_that_is_seen_whole_are_written_after_each_other():
    def by_hand(prompt, n):
        text = [*prompt, *[MASK] * n]
        for start in range(len(prompt), len(text), 2):
            while MASK in text[start : start + 2]:
                found = log_p('whole', text)
                open_ = [t for t in range(start, min(start + 2, len(text))) if text[t] == MASK]
                _, t = max((found[t].max(), t) for t in open_)
                text[t] = int(found[t].argmax())
        return text[len(prompt) :]

    found = written('whole', max_tokens=[6, 5], order='confidence', block=2)
    assert found == [by_hand(PROMPTS[0], 6), by_hand(PROMPTS[1], 5)]


def chi_square(texts, p):
    """Of pairs of tokens and their probabilities [V, V]."""
    count = np.zeros(p.shape)
    np.add.at(count, tuple(np.array(texts).T), 1)
    wanted = len(texts) * p
    likely = wanted > 5
    cells = np.append(count[likely], count[~likely].sum())
    expected = np.append(wanted[likely], max(wanted[~likely].sum(), 1e-9))
    return np.sum((cells - expected) ** 2 / expected), len(cells) - 1


@pytest.mark.slow
def test_random_order_draws_from_the_mean_over_orders():
    """Two tokens: one a pass, under either order; and both at once, independent of each other."""
    prompt, n = PROMPTS[0], 2048
    both = np.exp(log_p('whole', [*prompt, MASK, MASK]))[3:5].astype(np.float64)
    of_first = np.array([np.exp(log_p('whole', [*prompt, a, MASK]))[4] for a in range(7)])
    of_second = np.array([np.exp(log_p('whole', [*prompt, MASK, b]))[3] for b in range(7)])
    forth = both[0, :7, None] * of_first[:, :7]
    back = both[1, None, :7] * of_second[:, :7].T
    how = {'max_tokens': 2, 'temperature': 1.0, 'order': 'random'}
    for steps, p in ((2, (forth + back) / 2), (1, both[0, :7, None] * both[1, None, :7])):
        assert p.sum() == pytest.approx(1, abs=1e-5)
        found, freedom = chi_square(written('whole', [prompt] * n, steps=steps, **how), p)
        assert found < freedom + 4 * np.sqrt(2 * freedom)
        other, _ = chi_square(written('whole', [prompt] * n, steps=3 - steps, **how), p)
        assert other > freedom + 8 * np.sqrt(2 * freedom)


@pytest.mark.slow
def test_a_text_is_that_of_its_seed_whoever_stands_beside_it():
    how = {'temperature': 5.0, 'order': 'left', 'max_tokens': 6}
    both = written('blocks', seed=[5, 6], **how)
    assert both == written('blocks', seed=[5, 6], **how)
    turned = written('blocks', [PROMPTS[1], [2]], seed=[6, 9], **how)
    assert turned[0] == both[1]
    assert written('blocks', seed=[5, 7], **how)[1] != both[1]
    twice = written('blocks', [PROMPTS[0]] * 2, seed=5, **how)
    assert twice[0] == both[0] != twice[1]


@pytest.mark.slow
def test_any_mesh_writes_the_same():
    how = {'order': 'left', 'max_tokens': [6, 5]}
    made = unmasker('blocks', None, n=4, fsdp=2, tensor=2)
    placed = made([*PROMPTS, *PROMPTS], **{**how, 'max_tokens': [6, 5, 6, 5]})
    assert [one.tokens for one in placed] == 2 * written('blocks', **how)


def test_a_text_ends_before_its_end_id():
    prompts, how = [PROMPTS[0]] * 2, {'max_tokens': 14, 'order': 'left'}
    (whole, _) = written('blocks', prompts, **how)
    end = whole[2]
    n = whole.index(end)
    for write, more in (
        (unmasker('blocks', end), {}),
        (unmasker('blocks', None), {'stop_ids': (end,)}),
    ):
        for found in write(prompts, **how, **more):
            assert (found.tokens, found.finish_reason) == (whole[:n], 'stop')


def test_what_cannot_be_is_refused():
    write = unmasker('blocks')
    for how, message in (
        ({'block': 3}, 'write blocks of 4 tokens'),
        ({'steps': 5}, 'takes 4 at most'),
        ({'steps': -1}, 'steps -1: it must be 0 or more'),
        ({'block': -4}, 'block -4: it must be 0 or more'),
        ({'min_tokens': 2}, 'min_tokens is for models that write from left to right'),
        ({'max_tokens': 46}, 'exceed the model'),
        ({'temperature': -1.0}, 'temperature'),
    ):
        with pytest.raises(UserError, match=message):
            write(PROMPTS[:1], **{'max_tokens': 6, **how})
    with pytest.raises(UserError, match='at least one'):
        write([])


def test_what_is_no_number_is_told():
    broken = Unmasker(
        CONFIG,
        jax.tree.map(lambda x: x * np.nan, params()),
        mesh=mesh_of(),
        compute=COMPUTE,
        mask_id=MASK,
        end_ids=(END,),
        pad_id=PAD,
    )
    with pytest.raises(NotFiniteError, match='weights hold NaN'):
        broken(PROMPTS, max_tokens=[6, 5], order='left')
