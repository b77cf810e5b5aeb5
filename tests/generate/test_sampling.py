"""Sampling against a sort in numpy, and against the softmax."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generate import sampling as under_test
from llama_jax.generate.controls import Controls
from llama_jax.generate.sampling import ordered, scale
from llama_jax.generate.settings import rows_of

V = 101
keep = jax.jit(under_test.keep)
sample = jax.jit(under_test.sample)


def settings(n, **controls):
    """Settings of `n` rows, each control one value or one per row."""
    rows = rows_of([Controls()] * n, lengths=[0] * n, rows=n, end_ids=(), vocab=V, bias=False)
    for name, value in controls.items():
        old = getattr(rows, f'{name}_B')
        rows = replace(rows, **{f'{name}_B': np.broadcast_to(np.asarray(value, old.dtype), n)})
    return jax.tree.map(jnp.asarray, rows)


def random_logits(rng, kind, n):
    logits = rng.normal(size=(n, V)) * rng.choice([0.1, 1, 10], size=(n, 1))
    if kind == 'ties':
        logits = np.round(logits)
        logits[:, :5] = [0.0, -0.0, 0.0, -0.0, 0.0]
    if kind == 'impossible':
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:, 0] = 0
    return logits.astype(np.float32)


def kept_by_sort(logits, temperature, k=0, p=1, min_p=0, typical_p=1):
    """Oracle: sort, take the first k, then the shortest prefix of mass p, then those likely enough,
    then the most typical of them; ties are kept."""
    V = len(logits)
    kept = np.isfinite(logits) & (logits >= np.sort(logits)[::-1][min(k or V, V) - 1])
    with np.errstate(over='ignore'):
        weight = np.exp((logits.astype(np.float64) - logits.max()) / temperature)

    def shortest(order, share):
        mass = np.where(kept, weight, 0)[order]
        return order[np.argmax(np.cumsum(mass) / mass.sum() >= share)]

    if p < 1:
        kept &= logits >= logits[shortest(np.argsort(-logits, kind='stable'), p)]
    kept &= weight >= min_p
    if typical_p < 1:
        share = np.where(kept, weight, 0) / weight[kept].sum()
        with np.errstate(divide='ignore'):
            information = np.where(share > 0, -np.log(share), 0)
        off = np.abs(information - (share * information).sum())
        off[~kept] = np.inf
        kept &= off <= off[shortest(np.argsort(off, kind='stable'), typical_p)] + 1e-6
    return kept


@pytest.mark.parametrize('kind', ['plain', 'ties', 'impossible'])
def test_kept_tokens_equal_those_of_a_sort(kind):
    rng = np.random.default_rng(0)
    n = 400
    logits = random_logits(rng, kind, n)
    temperature = rng.choice([1e-30, 1e-3, 0.3, 1, 3, 1e6], size=n).astype(np.float32)
    k = rng.choice([0, 1, 2, 5, 50, V, 10 * V], size=n)
    p = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.99, 1], size=n).astype(np.float32)
    min_p = rng.choice([0, 0, 0.003, 0.2], size=n).astype(np.float32)
    rows = settings(n, temperature=temperature, top_k=k, top_p=p, min_p=min_p)
    scaled = scale(jnp.asarray(logits), rows.temperature_B)
    kept = np.asarray(keep(jnp.asarray(logits), scaled, rows))
    for row in range(n):
        # Where the mass lands on p within rounding, one token more or less is right as well.
        near = [
            kept_by_sort(
                *(logits[row], float(temperature[row]), int(k[row]), q), float(min_p[row]) * r
            )
            for q in (float(p[row]) * (1 + d) for d in ((-1e-5, 0, 1e-5) if p[row] < 1 else (0,)))
            for r in (1 - 1e-5, 1 + 1e-5)
        ]
        assert any((kept[row] == oracle).all() for oracle in near), (row, k[row], p[row])


@pytest.mark.parametrize('kind', ['plain', 'impossible'])
def test_typical_tokens_equal_those_of_a_sort(kind):
    rng = np.random.default_rng(5)
    n = 300
    logits = random_logits(rng, kind, n)
    typical = rng.choice([0.05, 0.3, 0.7, 0.95, 1], size=n).astype(np.float32)
    k = rng.choice([0, 9], size=n)
    rows = settings(n, top_k=k, typical_p=typical)
    kept = np.asarray(keep(jnp.asarray(logits), scale(jnp.asarray(logits), jnp.ones(n)), rows))
    for row in range(n):
        near = [
            kept_by_sort(logits[row], 1.0, int(k[row]), typical_p=q)
            for q in (float(typical[row]) * (1 + d) for d in (-1e-5, 0, 1e-5))
        ]
        assert any((kept[row] == oracle).all() for oracle in near), (row, typical[row])
    best = logits.argmax(-1)
    assert not kept[np.arange(n), best].all(), 'the likeliest is not always typical'
    assert kept.any(axis=-1).all()


def test_top_k_and_top_p_cut_something():
    logits = random_logits(np.random.default_rng(1), 'plain', 50)
    scaled = scale(jnp.asarray(logits), jnp.ones(50))
    by_k = keep(jnp.asarray(logits), scaled, settings(50, top_k=7))
    assert (by_k.sum(-1) == 7).all()
    by_p = keep(jnp.asarray(logits), scaled, settings(50, top_p=0.8))
    probability = np.asarray(jax.nn.softmax(logits))
    mass = np.where(by_p, probability, 0).sum(-1)
    least = np.where(by_p, probability, 2).min(-1)
    assert (mass >= 0.8 - 1e-6).all() and (mass - least < 0.8).all()


def test_order_is_that_of_floats():
    x = np.array([-np.inf, -3e38, -1.5, -2e-38, -0.0, 0.0, 2e-38, 2.0, 3e38, np.inf], np.float32)
    order = np.asarray(ordered(jnp.asarray(x))).astype(np.int64)
    assert order[4] == order[5]
    assert (np.diff(order)[[0, 1, 2, 3, 5, 6, 7, 8]] > 0).all()


@pytest.mark.parametrize('off', [{'temperature': 0.0}, {'top_k': 1}, {'temperature': 1e-45}])
def test_no_randomness_left_is_greedy(off):
    logits = jnp.asarray(random_logits(np.random.default_rng(2), 'ties', 64))
    drawn = sample(logits, settings(64, **off), jnp.arange(64))
    assert (drawn == jnp.argmax(logits, axis=-1)).all()


def test_greedy_rows_stay_greedy_beside_drawn_ones():
    logits = jnp.asarray(random_logits(np.random.default_rng(3), 'plain', 64))
    temperature = np.where(np.arange(64) % 2, 0.0, 5.0)
    drawn = np.asarray(sample(logits, settings(64, temperature=temperature), jnp.arange(64)))
    best = np.asarray(jnp.argmax(logits, axis=-1))
    assert (drawn[1::2] == best[1::2]).all() and (drawn[::2] != best[::2]).any()


@pytest.mark.parametrize(
    ('temperature', 'top_k', 'top_p'), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 6, 1.0), (1.5, 8, 0.9)]
)
def test_draws_follow_the_softmax(temperature, top_k, top_p):
    n, size = 20000, 10
    logits = np.linspace(-1.5, 1.5, size).astype(np.float32)
    kept = kept_by_sort(logits, temperature, top_k, top_p)
    expected = np.where(kept, np.exp(logits / temperature), 0)
    expected = expected / expected.sum() * n
    rows = jnp.broadcast_to(logits, (n, size))
    settings_B = settings(n, temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    drawn = np.asarray(sample(rows, settings_B, jnp.arange(n)))
    count = np.bincount(drawn, minlength=size)
    assert (count[~kept] == 0).all()
    chi_square = ((count - expected)[kept] ** 2 / expected[kept]).sum()
    # The statistic has kept - 1 degrees of freedom; 33 is beyond the 0.9999 quantile for 9.
    assert chi_square < 33


def test_a_draw_depends_on_its_own_row_only():
    rng = np.random.default_rng(4)
    logits = jnp.asarray(random_logits(rng, 'plain', 8))
    seed = np.arange(8, dtype=np.uint32) + 2**31
    position = jnp.arange(8) * 3

    def draw(rows):
        rows = np.asarray(rows)
        own = settings(len(rows), temperature=3.0, seed=seed[rows])
        return np.asarray(sample(logits[rows], own, position[rows]))

    together = draw(range(8))
    order = rng.permutation(8)
    assert (draw(order) == together[order]).all()
    assert [draw([i])[0] for i in range(8)] == together.tolist()


def test_seed_and_position_change_the_draw():
    logits = jnp.zeros((64, V))
    by_seed = sample(logits, settings(64, seed=np.arange(64)), jnp.zeros(64, jnp.int32))
    by_position = sample(logits, settings(64), jnp.arange(64))
    assert len(set(np.asarray(by_seed).tolist())) > 30
    assert len(set(np.asarray(by_position).tolist())) > 30
