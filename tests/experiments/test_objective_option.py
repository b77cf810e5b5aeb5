"""`--objective NAME`: an objective on the command line, its settings, and what is refused."""

import pytest

import configs
from experiments import cli, objective_option
from llama_jax.errors import UserError
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.weighted import Weighted


@pytest.fixture
def read(monkeypatch):
    def read(line, *, script='pretrain', reader=cli.read, **settings):
        monkeypatch.setattr('sys.argv', [script, *line.split()])
        return reader(script, 'Trains.', **settings)[0]

    return read


@pytest.mark.parametrize(
    ('line', 'objective'),
    [
        ('', CausalLM()),
        ('--objective.z-loss 0.5', CausalLM(z_loss=0.5)),
        ('--objective masked --objective.rate 0.3', MaskedLM(rate=0.3)),
        ('--objective=MaskedLM --objective.read_previous True', MaskedLM(read_previous=True)),
        ('--objective block-diffusion', BlockDiffusion()),
        ('--objective multi_token', MultiToken()),
        ('--objective.rate .25 --objective fim', FillInMiddle(rate=0.25)),
        (
            '--objective distill --objective.teacher runs/x --objective.alpha 1',
            Distillation(teacher='runs/x', alpha=1.0),
        ),
        (
            '--objective weighted --objective.parts causal masked --objective.parts.1.rate .2 '
            '--objective.weights 1 .1',
            Weighted((CausalLM(), MaskedLM(rate=0.2)), (1.0, 0.1), (0.5, 0.5)),
        ),
    ],
)
def test_it_is_the_configuration_with_another_objective(read, line, objective):
    experiment = read(f'quickstart --seed 3 {line}')
    base = configs.get('quickstart')
    assert experiment.objective == objective
    assert (experiment.seed, experiment.model, experiment.data) == (3, base.model, base.data)


@pytest.mark.parametrize(
    ('line', 'told'),
    [
        ('--objective maskd', r'--objective maskd: did you mean masked\? there are causal, '),
        ('--objective masklm', 'did you mean masked'),
        ('--objective', '--objective : give one name of causal, '),
        ('--objective masked fim', 'masked fim: give one name'),
        (
            '--objective masked --objective.rat 1',
            r'mean --objective.rate\?.* read-previous',
        ),
        (
            '--objective.rate 0.3',
            'setting of masked, .*trains causal: give --objective masked',
        ),
        ('--objective.zoo 0.3', 'no option --objective.zoo: causal has z-loss'),
        ('--objective distill', '--objective distill needs --objective.teacher too'),
        ('--objective weighted', '--objective weighted needs --objective.parts too'),
        ('--objective weighted --objective.parts', 'give names of'),
        ('--objective weighted --objective.parts causal mask', 'did you mean masked'),
        ('--objective weighted --objective.parts causal distill', 'needs teacher.*mine.py:NAME'),
        ('--objective weighted --objective.parts causal dpo', 'DPO is no part of a sum'),
        (
            '--objective masked --objective.rate 2',
            '--objective.rate 2.0: the share of masked tokens',
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(read, line, told):
    with pytest.raises(UserError, match=told) as error:
        read(f'quickstart {line}')
    assert '\n' not in str(error.value)


def test_a_recipe_takes_those_that_read_its_records(read):
    tuned = read('text --objective masked', script='finetune', tunes=True)
    assert tuned.objective == MaskedLM()
    with pytest.raises(UserError, match='instruct is for Chat records, which MaskedLM does not'):
        read('instruct --objective masked', script='finetune', tunes=True)


@pytest.mark.parametrize('option', ['--objective masked', '--objective.rate=0.3'])
def test_a_grid_compares_objectives_and_takes_none(read, option):
    with pytest.raises(UserError, match='of the arms are what a grid compares.*--only'):
        read(f'fim {option}', script='compare', reader=cli.read_grid)


@pytest.mark.parametrize('name', [name for name in REGISTRY if '-' in name])
def test_a_name_may_be_spelt_as_in_python(read, name):
    wanted = REGISTRY[name]()
    assert read(f'quickstart --objective {name}').objective == wanted
    assert read(f'quickstart --objective {name.replace("-", "_")}').objective == wanted


def test_all_names_are_spelt_as_options():
    assert [name for name in REGISTRY if name != name.lower().replace('_', '-')] == []


@pytest.mark.parametrize('words', ['--help', '--objective masked -h'])
def test_the_help_lists_them_with_what_they_say(read, capsys, words):
    with pytest.raises(SystemExit):
        read(f'quickstart {words}')
    said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    assert 'causal Causal language modelling: predict each token' in said
    assert len(objective_option.listing().splitlines()) == 1 + len(REGISTRY)
