"""Learning rates at the corners of their schedules."""

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.optim.schedule import ScheduleConfig, schedule

PEAK = 0.5


def rates(steps, **settings):
    """The rate of every step of a run, and the one it would end on."""
    function = schedule(ScheduleConfig(**{'peak': PEAK, **settings}), steps)
    return np.array([function(step) for step in range(steps + 1)])


@pytest.mark.parametrize('kind', ['cosine', 'wsd', 'constant'])
def test_warm_up_is_linear_and_its_first_step_learns(kind):
    rate = rates(100, kind=kind, warmup_steps=9)
    np.testing.assert_allclose(rate[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize('kind', ['cosine', 'wsd', 'constant'])
def test_without_warm_up_it_begins_at_the_peak(kind):
    assert rates(10, kind=kind, warmup_steps=0)[0] == pytest.approx(PEAK)


def test_cosine_passes_the_middle_and_ends_at_a_tenth():
    rate = rates(100, warmup_steps=20)
    assert rate[60] == pytest.approx(PEAK * (1 + 0.1) / 2)
    assert rate[100] == pytest.approx(PEAK * 0.1)
    assert (np.diff(rate[20:]) < 0).all()


def test_wsd_is_stable_then_falls_linearly():
    rate = rates(120, kind='wsd', warmup_steps=20, decay_share=0.3, final=0.05)
    np.testing.assert_allclose(rate[20:91], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rate[90:], PEAK * np.linspace(1, 0.05, 31), rtol=1e-5)


def test_constant_stays():
    np.testing.assert_allclose(rates(30, kind='constant', warmup_steps=3)[3:], PEAK)


@pytest.mark.parametrize(
    'settings, named',
    [
        ({'warmup_steps': 10}, 'warmup-steps'),
        ({'warmup_steps': -1}, 'warmup-steps'),
        ({'warmup_steps': 0, 'decay_share': 1.5}, 'decay-share'),
        ({'warmup_steps': 0, 'final': -0.1}, 'final'),
        ({'warmup_steps': 0, 'peak': 0.0}, 'peak'),
    ],
)
def test_nonsense_is_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        rates(10, **settings)
