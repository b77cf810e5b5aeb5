"""Rotary positions: their defining properties, and every scaling against a plain loop."""

import functools
import math
from dataclasses import replace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model.config import Dynamic, Linear, LongRope, RopeScaling, Yarn, by_length
from llama_jax.model.rope import attention_factor, frequencies, rotate, rotation
from tests.model import tiny

RELEASED = {'3.1': (128, 8.0), '3.2_1b': (64, 32.0), '3.2_3b': (128, 32.0)}


def rotated(x_H, position, *, theta=1e4, scaling=None):
    """One vector [H] turned by its position."""
    rope = rotation(jnp.array([[position]]), head_dim=len(x_H), theta=theta, scaling=scaling)
    return np.asarray(rotate(jnp.asarray(x_H, jnp.float32)[None, None, None], rope)).ravel()


@hypothesis.given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@hypothesis.settings(max_examples=20, deadline=None)
def test_score_depends_on_the_distance_only(query, key, shift):
    random = np.random.default_rng(query + key)
    q_H, k_H = random.normal(size=(2, 16))
    here = rotated(q_H, query) @ rotated(k_H, key)
    there = rotated(q_H, query + shift) @ rotated(k_H, key + shift)
    # An angle of up to 1000 radians is rounded to 3e-5; the vectors have norms of about 4.
    np.testing.assert_allclose(here, there, atol=2e-3)


def test_score_changes_with_the_distance():
    q_H, k_H = np.random.default_rng(0).normal(size=(2, 16))
    scores = [rotated(q_H, 3) @ rotated(k_H, key) for key in range(4)]
    assert len(set(np.round(scores, 3))) == 4


@pytest.mark.parametrize('scaling', [None, RopeScaling(original_context=32)])
def test_rotation_keeps_norms_and_position_zero_turns_nothing(scaling):
    x_H = np.random.default_rng(0).normal(size=16)
    for position in (0, 1, 7, 300):
        y_H = rotated(x_H, position, scaling=scaling)
        np.testing.assert_allclose(
            np.hypot(y_H[:8], y_H[8:]), np.hypot(x_H[:8], x_H[8:]), rtol=1e-5
        )
    np.testing.assert_array_equal(rotated(x_H, 0), x_H.astype(np.float32))


def test_rotation_equals_complex_numbers():
    x_H = np.random.default_rng(0).normal(size=16)
    angle = 7 * 1e4 ** (-np.arange(8) / 8)
    turned = (x_H[:8] + 1j * x_H[8:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag])
    np.testing.assert_allclose(rotated(x_H, 7), expected, atol=2e-6)


def test_bfloat16_is_rotated_in_float32():
    x_H = np.random.default_rng(0).normal(size=16)
    rope = rotation(jnp.array([[300]]), head_dim=16, theta=1e4, scaling=None)
    x_BTNH = jnp.asarray(x_H, jnp.bfloat16)[None, None, None]
    y_BTNH = rotate(x_BTNH, rope)
    assert y_BTNH.dtype == jnp.bfloat16
    expected = rotated(np.asarray(x_BTNH, np.float32).ravel(), 300)
    np.testing.assert_array_equal(y_BTNH.ravel(), jnp.asarray(expected, jnp.bfloat16))


def by_the_release(head_dim, theta, scaling):
    """The rule as it was released with Llama 3.1, pair by pair, in float64."""
    low_wavelength = scaling.original_context / scaling.low
    high_wavelength = scaling.original_context / scaling.high
    result = []
    for i in range(0, head_dim, 2):
        frequency = theta ** (-i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < high_wavelength:
            result.append(frequency)
        elif wavelength > low_wavelength:
            result.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low) / (
                scaling.high - scaling.low
            )
            result.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return result


@pytest.mark.parametrize(('head_dim', 'factor'), RELEASED.values(), ids=RELEASED)
def test_frequencies_follow_the_rule_of_the_release(head_dim, factor):
    scaling = RopeScaling(factor=factor)
    assert (scaling.low, scaling.high, scaling.original_context) == (1, 4, 8192)
    found = np.asarray(frequencies(head_dim, theta=5e5, scaling=scaling))
    plain = np.asarray(frequencies(head_dim, theta=5e5, scaling=None))
    np.testing.assert_allclose(found, by_the_release(head_dim, 5e5, scaling), rtol=3e-6)
    stretch = plain / found  # all three cases occur: kept, faded, stretched in full
    assert np.isclose(stretch, 1).any() and np.isclose(stretch, factor).any()
    assert ((stretch > 1.01) & (stretch < factor * 0.99)).any()


def test_equal_bounds_are_a_step():
    # Scout: factor 16, low 1, high 1.
    scaling = RopeScaling(factor=16.0, low=1.0, high=1.0)
    found = np.asarray(frequencies(128, theta=5e5, scaling=scaling))
    plain = np.asarray(frequencies(128, theta=5e5, scaling=None))
    assert np.isfinite(found).all()
    kept = 2 * np.pi / plain <= 8192
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(found, np.where(kept, plain, plain / 16), rtol=1e-6)


def stretched(kind, head_dim, theta, length):
    """What each rule divides the frequencies by, and multiplies cosines with, from the papers and
    in float64; pair by pair."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match kind:
        case Linear(factor):
            return [f / factor for f in plain], 1
        case Dynamic(factor, original):
            # The base is such that the longest wavelength grows by s = factor * length / original
            # - (factor - 1), and the shortest does not.
            s = max(factor * length / original - (factor - 1), 1)
            return [f * s ** (-2 * i / (head_dim - 2)) for i, f in enumerate(plain)], 1
        case Yarn(factor, original):
            low, high = (
                head_dim / 2 * math.log(original / (beta * 2 * math.pi)) / math.log(theta)
                for beta in (kind.beta_fast, kind.beta_slow)
            )
            if kind.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(head_dim // 2)]
            mixed = [f * ((1 - r) + r / factor) for f, r in zip(plain, ramp, strict=True)]
            return mixed, kind.attention_factor or 0.1 * math.log(factor) + 1
        case LongRope(short, long, original):
            factors = long if length > original else short
            return [f / x for f, x in zip(plain, factors, strict=True)], kind.attention_factor


PHI = LongRope(
    short=tuple(1 + 0.1 * i for i in range(8)),
    long=tuple(1.5**i for i in range(8)),
    original_context=64,
    attention_factor=1.2,
)
KINDS = {
    'linear': Linear(8.0),
    'dynamic': Dynamic(4.0, 64),
    'yarn': Yarn(16.0, 2048),
    'yarn, its own way': Yarn(4.0, 512, 0.7, beta_fast=16.0, beta_slow=0.5, truncate=False),
    'longrope': PHI,
}
YARNS = {'short context': Yarn(4.0, 128), 'huge context': Yarn(2.0, 2**28)}


@pytest.mark.parametrize('length', [1, 64, 65, 400])
@pytest.mark.parametrize('name', KINDS)
def test_rules_follow_their_papers(name, length):
    kind = KINDS[name]
    frequency_h, factor = stretched(kind, 16, 1e4, length)
    found = frequencies(16, theta=1e4, scaling=kind, length=jnp.array([length]))
    np.testing.assert_allclose(np.ravel(found), frequency_h, rtol=2e-6)
    rope = rotation(
        jnp.array([[length - 1]]),
        head_dim=16,
        theta=1e4,
        scaling=kind,
        length_BT=jnp.array([[length]]),
    )
    angle_h = (length - 1) * np.array(frequency_h)
    np.testing.assert_allclose(np.ravel(rope.cos_BTH), factor * np.cos(angle_h), atol=1e-4)
    np.testing.assert_allclose(np.ravel(rope.sin_BTH), factor * np.sin(angle_h), atol=1e-4)


@pytest.mark.parametrize('kind', YARNS.values(), ids=YARNS)
def test_the_ramp_ends_with_the_head(kind):
    expected, factor = stretched(kind, 16, 1e4, 1)
    np.testing.assert_allclose(frequencies(16, theta=1e4, scaling=kind), expected, rtol=2e-6)
    assert attention_factor(kind) == pytest.approx(factor)


def test_what_is_not_stretched_is_not_lengthened():
    assert attention_factor(Yarn(0.5, 64)) == attention_factor(Yarn(1.0, 64)) == 1
    assert attention_factor(Yarn(1.5, 64)) == 1 + 0.1 * math.log(1.5)
    assert attention_factor(None) == attention_factor(Linear(2.0)) == 1


@pytest.mark.parametrize('name', KINDS)
def test_without_a_length_it_is_within_the_original_context(name):
    found = frequencies(16, theta=1e4, scaling=KINDS[name])
    np.testing.assert_allclose(found, stretched(KINDS[name], 16, 1e4, 1)[0], rtol=2e-6)


def test_no_room_to_fade_is_a_step():
    kind = Yarn(4.0, 512, beta_fast=8.0, beta_slow=8.0, truncate=False)
    plain, found = (np.asarray(frequencies(16, theta=1e4, scaling=s)) for s in (None, kind))
    kept = 512 * plain / (2 * np.pi) > 8
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(found, np.where(kept, plain, plain / 4), rtol=1e-6)


def test_which_rules_go_by_length():
    assert [by_length(kind) for kind in (None, RopeScaling(), Linear(2.0), Yarn(2.0, 64))] == [
        False
    ] * 4
    assert by_length(PHI) and by_length(Dynamic(2.0, 64))
    assert not by_length(replace(PHI, long=PHI.short))


@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda: Linear(0.0), 'Linear: factor is 0.0'),
        (lambda: Dynamic(math.inf, 8), 'Dynamic: factor is inf'),
        (lambda: Dynamic(2.0, 0), 'original_context is 0'),
        (lambda: Yarn(2.0, 8, attention_factor=-1.0), 'attention_factor is -1.0'),
        (lambda: Yarn(2.0, 8, beta_fast=1.0, beta_slow=2.0), 'beta_fast 1.0 is below beta_slow'),
        (lambda: replace(PHI, attention_factor=0.0), 'LongRope: attention_factor is 0.0'),
        (lambda: replace(PHI, short=(1.0,)), 'they have 1 and 8'),
        (lambda: replace(PHI, short=(0.0,) * 8), 'a positive factor'),
        (lambda: RopeScaling(high=-1.0), 'high is -1.0'),
        (lambda: replace(tiny.CONFIG, head_dim=2, rope_scaling=Dynamic(2.0, 8)), 'head_dim of 4'),
        (lambda: replace(tiny.CONFIG, head_dim=8, rope_scaling=PHI), 'LongRope has 8 factors'),
    ],
)
def test_nonsense_is_refused(make, named):
    with pytest.raises(UserError, match='model.rope_scaling') as error:
        make()
    assert named in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dynamic', 'longrope'])
def test_documents_packed_into_a_row_have_lengths_of_their_own(name, one_device):
    """A long one and a short one together equal each of them alone; padding has no say."""
    config = replace(tiny.CONFIG, head_dim=16, rope_scaling=KINDS[name], context=128)
    params, token_BT = tiny.parameters(config, one_device), tiny.token_ids(1, 128)
    run = jax.jit(functools.partial(tiny.model, config, params))
    segment_T = np.repeat([1, 2, 0], [90, 20, 18])
    position_T = np.concatenate([np.arange(90), np.arange(20), np.arange(18)])
    packed = run(token_BT, segment_BT=segment_T[None], position_BT=position_T[None])[0]
    long = run(token_BT[:, :90])[0]
    short = run(token_BT[:, 90:110])[0]
    np.testing.assert_allclose(packed[:90], long, rtol=0, atol=2e-5)
    np.testing.assert_allclose(packed[90:110], short, rtol=0, atol=2e-5)
    # The rule changes where the text does: 64 tokens are read otherwise with 26 behind them.
    assert np.abs(run(token_BT[:, :64])[0] - long[:64]).max() > 1e-2


@pytest.mark.parametrize('name', KINDS)
def test_training_step(name, one_device):
    """Loss and gradients of a packed batch; split over devices, they equal those of one."""
    config = replace(tiny.CONFIG, head_dim=16, rope_scaling=KINDS[name], context=128, layers=1)
    token_BT = tiny.token_ids(4, 96)
    segment_BT = np.tile(np.repeat([1, 2, 0], [70, 20, 6]), (4, 1))
    position_BT = np.tile(np.concatenate([np.arange(70), np.arange(20), np.arange(6)]), (4, 1))

    def step(params):
        context = {'segment_BT': segment_BT, 'position_BT': position_BT}
        return tiny.loss(config, params, token_BT, **context)

    found = []
    meshes = [one_device]
    if by_length(config.rope_scaling):
        meshes.append(make(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8]))
    for mesh in meshes:
        with jax.set_mesh(mesh):
            loss, gradients = jax.jit(jax.value_and_grad(step))(tiny.parameters(config, mesh))
        found.append((float(loss), jax.tree.map(np.asarray, gradients)))
    (loss, gradients), (loss_split, gradients_split) = found[0], found[-1]
    assert np.isfinite(loss) and loss_split == pytest.approx(loss, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), gradients, gradients_split
    )
    assert np.abs(gradients['blocks']['attention']['q_DNH']).max() > 1e-4


@pytest.mark.parametrize('theta', [1.0, 0.0, -1e4, math.inf, math.nan])
def test_a_base_that_is_none(theta):
    with pytest.raises(UserError, match='model.rope_theta is .*: wavelengths need a base above 1'):
        replace(tiny.CONFIG, rope_theta=theta)
