"""Rotary positions: their defining properties, and the Llama 3 rule against a plain loop."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.model.config import RopeScaling
from llama_jax.model.rope import frequencies, rotate, rotation

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
