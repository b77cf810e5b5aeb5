"""What is remembered of validations beside the checkpoints."""

import json
from types import SimpleNamespace

import pytest

from llama_jax.errors import UserError
from llama_jax.train import loop, workdir
from llama_jax.train.checkpoint import SCORES, Checkpoints, committed
from tests.train.test_checkpoint import abstract, items


def test_how_long_validations_were_no_better(tmp_path):
    """By the scores alone: neither a tie nor what is not finite is better, whenever it was."""
    kept = Checkpoints(tmp_path / 'checkpoints', keep=1)
    found = []
    for step, score in enumerate((3.0, 2.0, 2.0, None, 2.5), 1):
        kept.validated(10 * step, score)
        found.append(kept.bad_validations(10 * step))
    assert found == [0, 0, 1, 2, 3]
    assert kept.bad_validations(55) == 0  # nothing was validated there
    kept.close()

    again = Checkpoints(tmp_path / 'checkpoints', keep=1)
    assert again.bad_validations(50) == 3
    # From an earlier checkpoint the later ones never were.
    again.validated(30, 1.5)
    assert again.bad_validations(30) == 0
    again.validated(40, 1.5)
    assert again.bad_validations(40) == 1
    again.close()
    assert committed(tmp_path) is False  # a score is no checkpoint

    other = Checkpoints(tmp_path / 'checkpoints', keep=1, validated_on='other text')
    other.validated(50, 9.0)
    assert other.bad_validations(50) == 0
    other.close()


def test_scores_of_an_earlier_version(tmp_path):
    (tmp_path / SCORES).write_text(json.dumps({'of': None, 'scores': {'10': 2.0, '20': 2.0}}))
    assert committed(tmp_path)
    kept = Checkpoints(tmp_path / 'checkpoints', keep=1)
    assert kept.bad_validations(20) == 1
    kept.close()


def test_validations_behind_the_checkpoint_that_a_run_goes_on_from_never_were(tmp_path):
    kept = Checkpoints(tmp_path / 'checkpoints', keep=2)
    for step, score in ((0, 3.0), (10, 2.0), (20, 1.1), (25, 1.3)):
        if step in (10, 20):
            kept.save(step, items(step), metadata={})
        kept.validated(step, score)
    kept.wait()
    (tmp_path / 'checkpoints' / '20').rename(tmp_path / 'away')
    kept.close()
    kept = Checkpoints(tmp_path / 'checkpoints', keep=2)
    assert kept.restore_newest(abstract(items(0))).step == 10
    kept.validated(15, 1.5)
    assert kept.bad_validations(15) == 0 and kept.lowest() == 15
    kept.close()
    (tmp_path / 'checkpoints' / '10').rename(tmp_path / 'away-10')
    kept = Checkpoints(tmp_path / 'checkpoints', keep=2)
    assert kept.restore_newest(abstract(items(0))) is None and kept.lowest() is None
    kept.close()


@pytest.mark.parametrize(
    ('saved', 'reached', 'refused'),
    [
        (True, 7, True),  # saved by the clock
        (True, None, False),  # whose metrics.jsonl was deleted, as the refusal says
        (False, 15, False),  # killed while its first checkpoint was on the way
        (False, 25, True),  # the second is only begun once the first is there
        (None, 7, False),
        (None, 12, True),  # of an earlier version
    ],
)
def test_records_without_checkpoints_are_lost_only_where_none_was_there(
    tmp_path, saved, reached, refused
):
    settings = {'checkpoint': {'every': 10}, 'train': {'steps': 40}}
    (tmp_path / 'run.json').write_text(json.dumps({'experiment': settings}))
    if reached is not None:
        line = {'kind': 'train', 'step': reached}
        (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    if saved is not None:
        (tmp_path / SCORES).write_text(json.dumps({'scores': {}, 'saved': saved}))
    if refused:
        with pytest.raises(UserError, match=f'reached step {reached}, but none of its checkpoints'):
            workdir.unsaved(tmp_path)
    else:
        assert workdir.unsaved(tmp_path)


def test_a_run_says_from_its_beginning_that_no_checkpoint_was_there(tmp_path):
    kept = Checkpoints(tmp_path / 'checkpoints', keep=1)
    assert committed(tmp_path) is False
    kept.save(1, items(1), metadata={})
    kept.close()
    assert committed(tmp_path) is True


@pytest.mark.parametrize(
    ('scores', 'said'),
    [
        ([None, None], 'were not finite'),
        ([3.0, 2.0, 2.5, 2.2], 'were no better than that of step 10, which is RUN@best'),
        ([1.0, 1.3, 1.1, 1.2], 'were no better than that before the first'),  # of --start
    ],
)
def test_a_run_that_ends_early_names_what_was_better(tmp_path, scores, said):
    kept = Checkpoints(tmp_path / 'checkpoints', keep=4)
    for step, score in enumerate(scores):
        if step:
            kept.save(10 * step, items(step), metadata={})
        kept.validated(10 * step, score)
    settings = SimpleNamespace(
        train=SimpleNamespace(steps=99), evaluation=SimpleNamespace(patience=2)
    )
    run = SimpleNamespace(checkpoints=kept, saved=30, experiment=settings, workdir='RUN')
    told = loop._ended_early(run)
    assert told == f'ended after step 30 of 99: 2 validations in a row {said}'
    kept.close()
