"""What is remembered of validations beside the checkpoints."""

import json

from llama_jax.train.checkpoint import SCORES, Checkpoints, committed


def test_how_long_validations_were_no_better(tmp_path):
    """By the scores alone: neither a tie nor what is not finite is better, whenever it was."""
    kept = Checkpoints(tmp_path / 'checkpoints', keep=1)
    found = []
    for step, score in enumerate((3.0, 2.0, 2.0, None, 2.5), 1):
        kept.validated(10 * step, score)
        found.append(kept.in_vain(10 * step))
    assert found == [0, 0, 1, 2, 3]
    assert kept.in_vain(55) == 0  # nothing was validated there
    kept.close()

    again = Checkpoints(tmp_path / 'checkpoints', keep=1)
    assert again.in_vain(50) == 3
    # From an earlier checkpoint the later ones never were.
    again.validated(30, 1.5)
    assert again.in_vain(30) == 0
    again.validated(40, 1.5)
    assert again.in_vain(40) == 1
    again.close()
    assert not committed(tmp_path)  # a score is no checkpoint

    other = Checkpoints(tmp_path / 'checkpoints', keep=1, validated_on='other text')
    other.validated(50, 9.0)
    assert other.in_vain(50) == 0
    other.close()


def test_scores_of_an_earlier_version(tmp_path):
    (tmp_path / SCORES).write_text(json.dumps({'of': None, 'scores': {'10': 2.0, '20': 2.0}}))
    assert committed(tmp_path)
    kept = Checkpoints(tmp_path / 'checkpoints', keep=1)
    assert kept.in_vain(20) == 1
    kept.close()
