"""What a grid plans: runs by their places, and settings for every arm."""

from dataclasses import replace

import pytest

from llama_jax.compare.grid import at_place, overridden, runs, sweep
from llama_jax.errors import UserError
from llama_jax.objectives.dual import Dual
from tests.compare import tiny


def test_runs_take_their_seed_and_rate_from_their_place(grid):
    assert [run.place for run in runs(grid)] == [
        *('plain/seed-0', 'z/seed-0', 'plain/seed-1', 'z/seed-1')
    ]
    assert [run.experiment.seed for run in runs(grid)] == [0, 0, 1, 1]
    swept = sweep(grid, (0.5, 1.0, 2.0))
    assert [run.place for run in swept] == [
        *('plain/lr-0.005/seed-0', 'z/lr-0.005/seed-0'),
        *('plain/lr-0.02/seed-0', 'z/lr-0.02/seed-0'),
    ]
    peaks = [run.experiment.optimizer.schedule.peak for run in swept]
    assert peaks == [0.005, 0.005, 0.02, 0.02]
    again = runs(replace(grid, again=True))
    assert [run.place for run in again if run not in runs(grid)] == [
        *('plain/again/seed-1000', 'plain/again/seed-1001')
    ]
    assert [run.experiment.seed for run in again] == [0, 0, 1000, 1, 1, 1001]
    for run in (*again, *swept):
        arm = next(arm for arm in grid.arms if arm.name == run.arm)
        assert at_place(arm, run.place) == run
    with pytest.raises(UserError, match='is no run'):
        at_place(grid.arms[0], 'plain/seed-x')
    with pytest.raises(UserError, match='--lr-sweep 1: that is the rate of the runs themselves'):
        sweep(grid, (1.0,))


def test_overrides_reach_every_arm_and_leave_what_they_differ_in(grid):
    first = grid.arms[0].experiment
    changed = overridden(
        grid,
        {
            'train': tiny.changed(first, 'train', steps=7).train,
            'model': tiny.changed(first, 'model', dim=24).model,
        },
    )
    for before, after in zip(grid.arms, changed.arms, strict=True):
        assert after.experiment.train.steps == 7 and after.experiment.model.dim == 24
        assert after.experiment.objective == before.experiment.objective
        assert after.experiment.name == before.name
    assert overridden(grid, {'train': first.train}) == grid
    # What an objective counts in steps goes with them.
    dual = Dual(curriculum_steps=first.train.steps)
    arms = grid.arms[0], tiny.changed(grid.arms[1], 'experiment', objective=dual)
    for steps in (first.train.steps // 2, 2 * first.train.steps):
        train = tiny.changed(first, 'train', steps=steps).train
        longer = overridden(replace(grid, arms=arms), {'train': train})
        assert longer.arms[1].experiment.objective == replace(dual, curriculum_steps=steps)
    # Rates go by what is trained, and not by how often it is looked at.
    tuned = replace(grid, tuned='before')
    seldom = tiny.changed(first, 'evaluation', every=first.evaluation.every + 1).evaluation
    assert overridden(tuned, {'evaluation': seldom}).tuned == 'before'
    longer = tiny.changed(first, 'train', steps=7).train
    assert not overridden(tuned, {'train': longer, 'evaluation': seldom}).tuned
