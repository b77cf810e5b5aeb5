"""`--optimizer NAME`: an optimizer on the command line, its settings, and what is refused."""

import sys

import pytest

import configs
from experiments import cli
from llama_jax.errors import UserError
from llama_jax.optim import Adafactor, AdamW, Lion, Muon
from llama_jax.optim.base import optimizer

SCHEDULE = configs.get('quickstart').optimizer.schedule


def read(monkeypatch, words):
    monkeypatch.setattr(sys, 'argv', ['pretrain', 'quickstart', *words.split()])
    return cli.read('pretrain', '')[0].optimizer


@pytest.mark.parametrize(
    'words, wanted',
    [
        ('--optimizer muon --optimizer.beta 0.9', Muon(schedule=SCHEDULE, beta=0.9)),
        ('--optimizer.clip 2 --optimizer=lion', Lion(schedule=SCHEDULE, clip=2.0)),
        (
            '--optimizer adafactor --optimizer.momentum bfloat16',
            Adafactor(schedule=SCHEDULE, momentum='bfloat16'),
        ),
        ('--optimizer adamw --optimizer.beta2 0.98', AdamW(schedule=SCHEDULE, beta2=0.98)),
    ],
)
def test_an_optimizer_is_chosen_by_its_name(monkeypatch, words, wanted):
    chosen = read(monkeypatch, f'{words} --optimizer.weight-decay 0.2')
    assert chosen == type(wanted)(**{**vars(wanted), 'weight_decay': 0.2})
    optimizer(chosen)


@pytest.mark.parametrize(
    'words, said',
    [
        ('--optimizer mion', r'--optimizer mion: did you mean (muon|lion)\? there are adamw'),
        ('--optimizer soap', '--optimizer soap: there are adamw, muon, lion, adafactor'),
        ('--optimizer', '--optimizer : give one name of adamw, muon, lion, adafactor'),
        ('--optimizer adamw --optimizer.beta 0.9', 'a setting of muon, and this trains with adamw'),
        (
            '--optimizer adamw --optimizer.beta 0.9',
            'did you mean --optimizer.beta2.* give --optimizer muon too',
        ),
        ('--optimizer muon --optimizer.momentum float32', 'setting of adafactor, .* with muon'),
        ('--optimizer muon --optimizer.clp 1', 'did you mean --optimizer.clip'),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, words, said):
    with pytest.raises(UserError, match=said):
        read(monkeypatch, words)


def test_a_grid_keeps_the_rate_of_each_arm(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['compare', 'objectives_small', '--optimizer', 'muon'])
    grid, _ = cli.read_grid('compare', '')
    for arm, before in zip(grid.arms, configs.grid('objectives_small').arms, strict=True):
        assert arm.experiment.optimizer == Muon(schedule=before.experiment.optimizer.schedule)


@pytest.mark.parametrize('words', [(), ('--train.steps', '84')])
def test_arms_of_a_grid_have_their_own_where_none_is_named(monkeypatch, words):
    monkeypatch.setattr(sys, 'argv', ['compare', 'muon', *words])
    grid, _ = cli.read_grid('compare', '')
    kinds = [type(arm.experiment.optimizer) for arm in grid.arms]
    assert kinds == [AdamW, Muon, Lion, Adafactor]
