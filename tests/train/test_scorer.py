"""A reward model from its training to a function that scores answers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.objectives.preference import DPO
from llama_jax.objectives.reward import RewardModel
from llama_jax.train import loop, run
from llama_jax.train.experiment import to_dict
from llama_jax.train.scorer import Scorer
from tests.train import preferring
from tests.train.conftest import one_device
from tests.train.preferring import lines


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('reward') / 'run'
    reward = preferring.experiment(RewardModel(), tmp_path_factory.mktemp('pairs'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(meshes, 'make', one_device)
        loop.train(reward, workdir)
    return reward, workdir


@pytest.mark.slow
def test_scores_are_the_rewards_of_validation(trained):
    """Alone in rows and padded as in packed rows, on eight devices as on one."""
    reward, workdir = trained
    held_out = preferring.read(reward.data.validation[0].files[0])
    score = Scorer(str(workdir), meshes.make(reward.mesh))
    chosen = score([(record['prompt'], record['chosen']) for record in held_out])
    rejected = score([(record['prompt'], record['rejected']) for record in held_out])
    told = lines(workdir, 'validation')[-1]
    assert len(held_out) > 16 and chosen.dtype == np.float32
    np.testing.assert_allclose(chosen.mean(), told['reward_chosen'], rtol=1e-4)
    np.testing.assert_allclose((chosen - rejected).mean(), told['margin'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((chosen > rejected).mean(), told['accuracy'], rtol=1e-5)
    assert told['accuracy'] > 0.6


def test_what_cannot_be_scored_is_told(trained, tmp_path):
    reward, workdir = trained
    score = Scorer(str(workdir), meshes.make(reward.mesh))
    for pair, match in (
        (('a', 'b' * 64), 'answer 1 has 67 tokens .* context'),
        (('a', ()), 'answer 1 cannot be scored'),
        ((({'role': 'user', 'content': 'a'},),) * 2, 'answer 1 cannot be scored'),
    ):
        with pytest.raises(UserError, match=match) as error:
            score([('a', 'b'), pair])
        assert '\n' not in str(error.value)
    broken = score._trained.extra['head_D'] * np.nan
    score._trained = score._trained._replace(extra={'head_D': broken})
    with pytest.raises(UserError, match='answer 0 the reward nan'):
        score([('a', 'b')])


def test_losses_are_golden(trained):
    preferring.assert_golden('reward', trained[1])


def test_a_run_of_something_else_gives_no_rewards(trained, tmp_path):
    reward, workdir = trained
    facts = json.loads((workdir / 'run.json').read_text())
    facts['experiment'] = to_dict(replace(reward, objective=DPO()))
    (tmp_path / 'run.json').write_text(json.dumps(facts))
    with pytest.raises(UserError, match='trained DPO, which gives no rewards'):
        Scorer(str(tmp_path), None)
