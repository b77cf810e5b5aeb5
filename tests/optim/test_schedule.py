"""Learning rates at the corners of their schedules."""

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.optim.schedule import Ramp, ScheduleConfig, change, schedule

PEAK = 0.5


def rates(steps, **settings):
    """The rate of every step of a run, and the one it would end on."""
    function = schedule(ScheduleConfig(**{'peak': PEAK, **settings}), steps)
    return np.array([function(step) for step in range(steps + 1)])


@pytest.mark.parametrize('kind', ['cosine', 'wsd', 'inverse_sqrt', 'constant'])
def test_warm_up_is_linear_and_its_first_step_learns(kind):
    rate = rates(100, kind=kind, warmup_steps=9)
    np.testing.assert_allclose(rate[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize('kind', ['cosine', 'wsd', 'inverse_sqrt', 'constant'])
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


def test_wsd_falls_however_few_steps_there_are():
    rate = rates(10, kind='wsd', warmup_steps=7, decay_share=0.1, final=0.0)
    np.testing.assert_allclose(rate[7:], [PEAK, PEAK, PEAK, 0], rtol=1e-6)


def test_inverse_square_root_falls_from_the_end_of_the_warm_up_whatever_the_length():
    rate = rates(100, kind='inverse_sqrt', warmup_steps=8)
    steps = np.arange(8, 101)
    np.testing.assert_allclose(rate[8:], PEAK * np.sqrt(9 / (steps + 1)), rtol=1e-6)
    np.testing.assert_array_equal(rate, rates(300, kind='inverse_sqrt', warmup_steps=8)[:101])


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
        ({'warmup_steps': 0, 'peak': np.inf}, 'peak'),
        ({'warmup_steps': 0, 'kind': 'wsd', 'decay_share': 0.0}, 'decay-share is 0.0: .* constant'),
        ({'warmup_steps': 0, 'kind': 'constant', 'final': 0.0}, 'or set it to 0.1'),
    ],
)
def test_nonsense_is_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        rates(10, **settings)


def goes_on(before, after, taken, *, at_once=False, ramp=None):
    """How a run goes on whose settings (steps, schedule) change; and the rates of the steps from
    the one before that to the last."""
    old = schedule(ScheduleConfig(PEAK, **before[1]), before[0], ramp)
    config = ScheduleConfig(**{'peak': PEAK, **after[1]})
    found = change(old, config, after[0], taken=taken, at_once=at_once)
    new = schedule(config, after[0], found)
    return found, np.array([old(taken - 1), *(new(step) for step in range(taken, after[0]))])


def largest_step(rate):
    return np.abs(np.diff(rate)).max()


@pytest.mark.parametrize('kind', ['cosine', 'wsd'])
def test_a_finished_run_warms_up_again_and_falls_again(kind):
    settings = {'kind': kind, 'warmup_steps': 10}
    ramp, rate = goes_on((40, settings), (100, settings), 40)
    assert ramp == Ramp(40, pytest.approx(0.1 * PEAK), 10)
    target = float(rates(100, **settings)[50])
    np.testing.assert_allclose(rate[1:12], np.linspace(0.1 * PEAK, target, 11), rtol=1e-5)
    np.testing.assert_allclose(rate[11:], rates(100, **settings)[50:100], rtol=1e-6)
    assert largest_step(rate[1:40]) < 1.05 * (target - 0.1 * PEAK) / 10


@pytest.mark.parametrize(
    'settings, taken',
    [
        ({'kind': 'constant', 'warmup_steps': 5}, 40),
        ({'kind': 'inverse_sqrt', 'warmup_steps': 5}, 40),
        ({'kind': 'wsd', 'warmup_steps': 5}, 30),  # before it falls
        ({'kind': 'cosine', 'warmup_steps': 20}, 10),  # still warming up
    ],
)
def test_where_the_new_schedule_is_the_old_one_nothing_happens(settings, taken):
    ramp, rate = goes_on((40, settings), (80, settings), taken)
    assert ramp is None
    np.testing.assert_allclose(rate[1:], rates(80, **settings)[taken:80], rtol=1e-6)


@pytest.mark.parametrize('kind', ['cosine', 'wsd', 'constant'])
def test_a_share_of_the_run_is_so_many_steps(kind):
    np.testing.assert_array_equal(
        rates(50, kind=kind, warmup_steps=0, warmup_share=0.1),
        rates(50, kind=kind, warmup_steps=5),
    )
    only, *_ = rates(1, kind=kind, warmup_steps=0, warmup_share=0.5)
    assert only == pytest.approx(PEAK)
    ramp, _ = goes_on((50, {'warmup_steps': 5}), (50, {'warmup_steps': 0, 'warmup_share': 0.1}), 9)
    assert ramp is None


def test_a_warm_up_in_steps_and_as_a_share_is_refused():
    with pytest.raises(UserError, match='warmup-steps 5 and .*warmup-share 0.1 are both set'):
        rates(50, warmup_steps=5, warmup_share=0.1)
    with pytest.raises(UserError, match='warmup-share is 1.0'):
        rates(50, warmup_steps=0, warmup_share=1.0)


def test_a_lower_rate_holds_at_once_when_it_was_set_and_else_by_a_line():
    before, lower = {'warmup_steps': 4}, {'warmup_steps': 4, 'peak': PEAK / 10}
    ramp, rate = goes_on((40, before), (40, lower), 20, at_once=True)
    assert ramp is None and rate[1] < rate[0] / 9
    ramp, rate = goes_on((40, before), (24, before), 20)  # a shorter run
    assert ramp == Ramp(20, pytest.approx(float(rates(40, **before)[20])), 4)
    assert largest_step(rate) < PEAK / 7  # a jump would be half of PEAK
    ramp, _ = goes_on((40, before), (40, {'warmup_steps': 4, 'peak': 2 * PEAK}), 20, at_once=True)
    assert ramp is not None and ramp.steps == 4  # a higher one is warmed up to


def test_without_a_warm_up_the_line_takes_a_tenth_of_the_steps_left():
    ramp, rate = goes_on((40, {'warmup_steps': 0}), (75, {'warmup_steps': 0}), 40)
    assert ramp is not None and ramp.steps == 4
    assert largest_step(rate) < PEAK / 9


def test_a_warm_up_longer_than_what_is_left_ends_with_the_run():
    ramp, rate = goes_on((40, {'warmup_steps': 20}), (45, {'warmup_steps': 20}), 40)
    assert ramp is not None and ramp.steps == 5
    np.testing.assert_allclose(rate[1:], 0.1 * PEAK, rtol=1e-5)
    assert goes_on((40, {'warmup_steps': 20}), (40, {'warmup_steps': 10}), 40)[0] is None


def test_a_change_on_the_way_begins_where_the_line_was():
    settings = {'warmup_steps': 10}
    first = Ramp(40, 0.1 * PEAK, 10)
    ramp, rate = goes_on((80, settings), (90, settings), 44, ramp=first)
    at = float(schedule(ScheduleConfig(PEAK, **settings), 80, first)(44))
    assert ramp == Ramp(44, at, 10) and at < 0.5 * PEAK
    assert largest_step(rate) < PEAK / 10
