"""GRPO against its formulas in float64, from whole logits."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout, mesh
from llama_jax.data import packing
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.grpo import GRPO, advantages, overlong
from llama_jax.objectives.rollout import Drawn, Rollout
from llama_jax.train.place import place
from llama_jax.train.step import initial_params, initial_state, train_step

PAD = END = 3  # a tokenizer may have one token for both
MODEL = ModelConfig(
    vocab=32, vocab_padding=3, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=32
)
MODEL = replace(MODEL, positions='learned')  # not by differences alone
COMPUTE = Compute(attention='reference')
G, MOST = 2, 6
ROLLOUT = Rollout(completions=G, max_tokens=MOST)
FULL = GRPO(ROLLOUT, updates=2, beta=0.1)
T, RATE = 24, 0.05


@functools.cache
def devices():
    return mesh.make(MeshConfig(), jax.devices()[:1])


@functools.cache
def parameters(seed=0):
    params = initial_params(MODEL, GRPO(), jax.random.key(seed))
    params = jax.tree.map(lambda x: 1.5 * x, params)  # probabilities that differ
    return jax.device_put(params, layout.shardings(params, devices()))


@functools.cache
def reference():
    """Not far from the policy: else its divergence has gradients that amplify every rounding."""
    return jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, parameters(), parameters(1))


@functools.cache
def program(objective):
    """(loss, its gradient) of parameters and a batch."""

    def total(params, batch):
        loss = objective.loss(
            layers.bind(MODEL, params), batch, extra={}, compute=COMPUTE, key=None
        )
        return loss.total / jnp.maximum(loss.weight, 1), loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(objective, batch, params=None):
    with jax.set_mesh(devices()):
        return program(objective)(params or parameters(), place(batch, devices()))


@functools.cache
def _log_probs():
    @jax.jit
    def log_probs(params, inputs, positions, segments):
        model = layers.bind(MODEL, params)
        x_BTD, _ = model.features(
            inputs, position_BT=positions, segment_BT=segments, compute=COMPUTE
        )
        return model.logits(x_BTD)[..., : MODEL.ids]

    return log_probs


def log_probs(batch, params=None, temperature=1.0):
    """Of the targets, float64 [B, T]."""
    with jax.set_mesh(devices()):
        on_devices = place(batch, devices())
        arrays = (on_devices[name] for name in ('inputs', 'positions', 'segments'))
        logits = np.asarray(_log_probs()(params or parameters(), *arrays), np.float64)
    logits = logits / temperature
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(normal, batch['targets'][..., None], axis=-1)[..., 0]


def groups(seed=0, prompts=8):
    """Completions [P][G] of prompts of any length; each ends, but for the longest."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(prompts):
        prompt = rng.integers(4, MODEL.ids, rng.integers(1, 6)).astype(np.int32)
        group = []
        for _ in range(G):
            n = int(rng.integers(1, MOST + 1))
            tokens = rng.integers(4, MODEL.ids, n).astype(np.int32)
            if n < MOST:
                tokens[-1] = END
            group.append(Drawn(prompt, tokens, rng.normal(size=n).astype(np.float32), n == MOST))
        drawn.append(group)
    return drawn


REWARDS = np.random.default_rng(3).normal(size=(8, G))


def batch_of(objective, drawn=None, rewards=REWARDS):
    """Two prompts a row: 4 rows of prompts, 8 of completions."""
    drawn = drawn or groups()
    examples, _ = objective.completed(drawn, rewards)
    lengths = {'': T}
    arrays = packing.layout_of(objective.blank(1), pad_id=PAD)
    batch = packing.empty_rows(arrays, rows=len(drawn) // 2 * G, lengths=lengths)
    for row in range(len(drawn) // 2):
        for g in range(G):
            laid = [group[g] for group in examples[2 * row : 2 * row + 2]]
            packing.lay(batch, row * G + g, laid, lengths=lengths)
    if 'reference' in batch:
        active = batch['shares'] > 0
        other = log_probs(batch, reference())
        batch['reference'] = np.where(active, other, 0).astype(np.float32)
    return batch


def placed_completions(drawn):
    """(row, first position, completion index) of each in `batch_of`."""
    for row in range(len(drawn) // 2):
        for g in range(G):
            at = 0
            for p in (2 * row, 2 * row + 1):
                one = drawn[p][g]
                yield row * G + g, at + len(one.prompt) - 1, p, g
                at += len(one.prompt) + len(one.tokens) - 1


def expected(objective, batch, drawn, *, old, advantage):
    """The loss by its formula, completion by completion."""
    log_p, o = log_probs(batch), objective
    per_sequence, tokens = [], 0
    for row, start, p, g in placed_completions(drawn):
        one = drawn[p][g]
        here = slice(start, start + len(one.tokens))
        np.testing.assert_array_equal(batch['targets'][row, here], one.tokens)
        ratio = np.exp(log_p[row, here] - old[row, here])
        a = advantage[p, g]
        loss = -np.minimum(ratio * a, np.clip(ratio, 1 - o.eps_low, 1 + o.eps_high) * a)
        d = batch['reference'][row, here] - log_p[row, here]
        loss += o.beta * (np.exp(d) - d - 1)
        masked = o.mask_truncated and one.truncated
        per_sequence.append(np.zeros(len(loss)) if masked else loss)
        tokens += 0 if masked else len(loss)
    if o.normaliser == 'tokens':
        return sum(x.sum() for x in per_sequence) / tokens
    if o.normaliser == 'sequences':
        return np.mean([x.mean() for x in per_sequence])
    return sum(x.sum() for x in per_sequence) / (len(per_sequence) * MOST)


@pytest.mark.slow
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('normaliser', ['tokens', 'sequences', 'constant'])
def test_loss_equals_the_formula(normaliser, masked):
    objective = replace(FULL, normaliser=normaliser, mask_truncated=masked)
    drawn = groups()
    batch = batch_of(objective, drawn)
    old = log_probs(batch) + np.random.default_rng(1).normal(size=(8, T)) / 3
    batch['old'] = np.where(batch['shares'] > 0, old, 0).astype(np.float32)
    advantage = advantages(REWARDS, 'group')
    # Programs do not depend on how the host divides: one is compiled for all.
    (loss, sums), _ = run(FULL, batch)
    assert loss == pytest.approx(
        expected(objective, batch, drawn, old=old, advantage=advantage), rel=1e-5
    )
    assert sums.largest['logp_diff'] == 0  # it was told with the first update


def test_what_is_told_of_a_batch():
    drawn = groups()
    batch = batch_of(FULL, drawn)
    log_p = log_probs(batch)
    here = batch['shares'] > 0
    old = np.where(here, log_p + np.random.default_rng(1).normal(size=(8, T)) / 3, 0)
    (_, first), _ = run(FULL, batch)
    (_, sums), _ = run(FULL, batch | {'old': old.astype(np.float32)})
    n = here.sum()
    assert sums.weight == n == sum(len(one.tokens) for group in drawn for one in group)
    assert FULL.loss_tokens(batch) == n
    ratio, a = np.exp(log_p - old), batch['advantages']
    wanted = {
        'entropy': -log_p[here].sum(),
        'clipped_low': (here & (ratio < 0.8) & (a < 0)).sum(),
        'clipped_high': (here & (ratio > 1.28) & (a > 0)).sum(),
        'kl': (np.exp(batch['reference'] - log_p) - (batch['reference'] - log_p) - 1)[here].sum(),
    }
    assert wanted['clipped_low'] and wanted['clipped_high']
    for name, value in wanted.items():
        assert sums.metrics[name] == pytest.approx(value, rel=1e-5), name
    difference = np.abs(log_p - batch['log_probs'])[here].max()
    assert first.largest['logp_diff'] == pytest.approx(difference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('sign', [-1.0, 1.0])
def test_ratio_of_the_first_update_is_one_bitwise(sign):
    """No float32 lies between these bounds: what is not 1 is clipped, on one side or the other."""
    objective = GRPO(ROLLOUT, updates=2, eps_low=1e-9, eps_high=1e-9)
    batch = batch_of(objective)
    batch['advantages'] = np.full_like(batch['advantages'], sign)
    (loss, sums), _ = run(objective, batch)
    assert loss == -sign and sums.metrics['clipped_low'] == sums.metrics['clipped_high'] == 0
    moved = batch | {'old': np.nextafter(np.asarray(sums.kept['old']), sign * -np.inf)}
    (_, sums), _ = run(objective, moved)
    assert sums.metrics['clipped_low'] + sums.metrics['clipped_high'] > 0


def test_equal_rewards_have_no_gradient_at_all():
    objective = GRPO(ROLLOUT)
    # A mean that is another number than what it is the mean of would be divided by 1e-4.
    batch = batch_of(objective, rewards=np.full((8, G), 0.1) + np.arange(8)[:, None] / 7)
    _, gradient = run(objective, batch)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))
    _, gradient = run(objective, batch_of(objective))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(gradient))


def test_divergence_pulls_towards_the_reference():
    """Its gradient moves the policy so that a step reduces it; where they are one it is 0."""
    batch = batch_of(FULL, rewards=np.zeros((8, G)))
    (before, _), gradient = run(FULL, batch)
    moved = jax.tree.map(lambda x, g: x - 0.05 * g, parameters(), gradient)
    (after, _), _ = run(FULL, batch, moved)
    assert 0 < after < before
    own = np.where(batch['shares'] > 0, log_probs(batch), 0).astype(np.float32)
    (loss, _), gradient = run(FULL, batch | {'reference': own})
    assert loss == pytest.approx(0, abs=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-5


def test_at_a_temperature_the_policy_is_what_is_drawn_from():
    objective = replace(FULL, rollout=replace(ROLLOUT, temperature=0.5))
    batch = batch_of(objective)
    old = log_probs(batch, temperature=0.5)
    (_, sums), _ = run(objective, batch)
    here = batch['shares'] > 0
    np.testing.assert_allclose(np.asarray(sums.kept['old'])[here], old[here], rtol=1e-4, atol=1e-5)
    difference = np.abs(log_probs(batch) - batch['log_probs'])[here].max()
    assert sums.largest['logp_diff'] == pytest.approx(difference, rel=1e-5)


def test_pads_and_packed_neighbours_change_nothing():
    batch = batch_of(FULL)
    (loss, _), _ = run(FULL, batch)
    other = {name: x.copy() for name, x in batch.items()}
    other['inputs'][batch['segments'] == 0] = 7
    other['targets'][batch['segments'] == 0] = 9
    (same, _), _ = run(FULL, other)
    assert same == loss
    drawn = groups()
    drawn[1] = [one._replace(prompt=one.prompt + 1) for one in drawn[1]]
    (_, sums), _ = run(FULL, batch_of(FULL, drawn))
    (_, before), _ = run(FULL, batch)
    kept, old = np.asarray(sums.kept['old']), np.asarray(before.kept['old'])
    first = batch['segments'] == 1
    np.testing.assert_array_equal(kept[first], old[first])
    assert (kept != old).any()


def state_after(objective, batch, *, accumulate):
    tx = optax.sgd(1.0)
    state = initial_state(MODEL, objective, tx, seed=0, mesh=devices())
    state = replace(state, params=jax.tree.map(jnp.copy, parameters()))
    step = train_step(
        MODEL,
        objective,
        tx,
        learning_rate=lambda step: -RATE,  # the direction of optax's sgd is downwards
        accumulate=accumulate,
        compute=COMPUTE,
    )
    with jax.set_mesh(devices()):
        return step(state, place(batch, devices()))


@pytest.mark.slow
def test_microbatches_change_nothing_of_several_updates():
    """One batch of 8 rows, and 8 of one row: tokens are counted over all of them, and the second
    update finds the probabilities of the first in the order of the rows."""
    objective = replace(FULL, updates=3)
    batch = batch_of(objective)
    whole, told = state_after(objective, batch, accumulate=1)
    parts, same = state_after(objective, batch, accumulate=8)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert told.keys() == same.keys()
    for name in told:
        assert float(told[name]) == pytest.approx(float(same[name]), rel=1e-4, abs=1e-6), name
    assert int(whole.step) == 1 and told['clipped_high'] > 0
    assert told['weight'] == (batch['shares'] > 0).sum()

    # By hand: the same loss three times, on which the ratios are of the first parameters.
    params, old = parameters(), None
    for _ in range(3):
        given = batch if old is None else batch | {'old': np.asarray(old)}
        (_, sums), gradient = run(FULL, given, params)
        params = jax.tree.map(lambda x, g: x - RATE * g, params, gradient)
        old = sums.kept['old']
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_advantages():
    rewards = np.array([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1], [2.0, np.nan, 4.0], [1.0] + 2 * [np.nan]])
    group = advantages(rewards, 'group')
    np.testing.assert_allclose(
        group[0], (rewards[0] - 1 / 3) / (np.std([1, 0, 0], ddof=1) + 1e-4), rtol=1e-12
    )
    assert not group[1].any() and not group[3].any()
    np.testing.assert_allclose(group[2], np.array([-1, 0, 1]) / (np.sqrt(2) + 1e-4), rtol=1e-12)
    none = advantages(rewards, 'none')
    np.testing.assert_allclose(none[2], [-1, 0, 1])
    counted = rewards[np.isfinite(rewards)]
    np.testing.assert_allclose(
        advantages(rewards, 'batch'), none / (counted.std(ddof=1) + 1e-4), rtol=1e-12
    )


def test_overlong_completions_cost_by_their_tokens():
    length = np.array([1, 6, 7, 8, 10])
    np.testing.assert_allclose(
        overlong(length, most=10, last=4), [0, 0, -0.25, -0.5, -1], rtol=1e-12
    )
    assert not overlong(length, most=10, last=0).any()
    drawn = groups()
    objective = GRPO(ROLLOUT, overlong=MOST, scale='none')
    examples, told = objective.completed(drawn, np.zeros((8, G)))
    lengths = np.array([[len(one.tokens) for one in group] for group in drawn])
    for p in range(8):
        for g in range(G):
            wanted = -lengths[p, g] / MOST + lengths[p].mean() / MOST
            assert examples[p][g]['advantages'][-1] == pytest.approx(wanted, abs=1e-6)
    assert told['overlong'] == pytest.approx(-lengths.mean() / MOST)
    assert told['completion_length'] == lengths.mean()
    assert told['truncated'] == np.mean(lengths == MOST)


def test_shares_of_groups_without_a_difference():
    rewards = np.where(np.arange(8)[:, None] < 3, 1.0, REWARDS)
    rewards[7] = [np.nan, 2.0]
    _, told = GRPO(ROLLOUT).completed(groups(), rewards)
    assert told['equal_groups'] == 4 / 8
