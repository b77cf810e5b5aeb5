"""Every named configuration: exact sizes, recipes, and its whole text.

After an intended change, write the dumps anew and read the difference:
    LLAMA_JAX_WRITE_GOLDENS=1 python -m pytest tests/configs; git diff tests/goldens
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

import configs
from llama_jax import trees
from llama_jax.compare.grid import Grid
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.optim.schedule import schedule
from llama_jax.train.checkpoint import difference
from llama_jax.train.experiment import to_dict

GOLDENS = Path(__file__).parents[1] / 'goldens'
NAMED = sorted(configs.named())
DUMPS = [
    *(('configs', name, configs.get) for name in NAMED),
    *(('recipes', name, configs.recipe) for name in sorted(configs.recipes())),
    *(('grids', name, configs.grid) for name in sorted(configs.grids())),
]
KINDS = ('configs', 'recipes', 'grids')

# Exact sizes of the published checkpoints.
PARAMETERS = {
    'llama1_7b': 6_738_415_616,
    'llama1_13b': 13_015_864_320,
    'llama1_33b': 32_528_943_616,
    'llama1_65b': 65_285_660_672,
    'llama2_7b': 6_738_415_616,
    'llama2_13b': 13_015_864_320,
    'llama2_70b': 68_976_648_192,
    # 16 more ids in the embedding and in the head than Llama 2 has.
    'codellama_7b': 6_738_415_616 + 2 * 16 * 4096,
    'codellama_13b': 13_015_864_320 + 2 * 16 * 5120,
    'codellama_34b': 33_743_970_304,
    'codellama_70b': 68_976_648_192 + 2 * 16 * 8192,
    'codellama_7b_python': 6_738_415_616,
    'codellama_13b_python': 13_015_864_320,
    'codellama_34b_python': 33_743_970_304,
    'llama3_8b': 8_030_261_248,
    'llama3_70b': 70_553_706_496,
    'llama3_1_8b': 8_030_261_248,
    'llama3_1_70b': 70_553_706_496,
    'llama3_1_405b': 405_853_388_800,
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'llama3_3_70b': 70_553_706_496,
}

# Peak learning rate, tokens per batch in units of 2^20, tokens in all, warm-up, last rate / peak.
RECIPES = {
    'llama1_7b': (3e-4, 4, 1.0e12, 2000, 0.1),
    'llama1_13b': (3e-4, 4, 1.0e12, 2000, 0.1),
    'llama1_33b': (1.5e-4, 4, 1.4e12, 2000, 0.1),
    'llama1_65b': (1.5e-4, 4, 1.4e12, 2000, 0.1),
    'llama2_7b': (3e-4, 4, 2e12, 2000, 0.1),
    'llama2_13b': (3e-4, 4, 2e12, 2000, 0.1),
    'llama2_70b': (1.5e-4, 4, 2e12, 2000, 0.1),
    'codellama_7b': (3e-4, 4, 5e11, 1000, 1 / 30),
    'codellama_13b': (3e-4, 4, 5e11, 1000, 1 / 30),
    'codellama_34b': (1.5e-4, 4, 5e11, 1000, 1 / 30),
    'llama3_8b': (3e-4, 4, 15e12, 2000, 0.1),
    'llama3_70b': (1.5e-4, 4, 15e12, 2000, 0.1),
    'llama3_1_405b': (8e-5, 16, 15.6e12, 8000, 0.01),
}


def test_every_size_is_named():
    assert set(PARAMETERS) == set(NAMED) - {'quickstart'}


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_count_is_exact(name):
    assert trees.size(layers.abstract(configs.get(name).model)) == PARAMETERS[name]


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    experiment = configs.get(name)
    train, optimizer = experiment.train, experiment.optimizer
    peak, batch, tokens, warmup, final = RECIPES[name]
    assert train.batch * train.seq_len == batch * 2**20
    assert train.steps * train.batch * train.seq_len == pytest.approx(tokens, rel=1e-4)
    rate = schedule(optimizer.schedule, train.steps)
    assert float(rate(warmup)) == pytest.approx(peak)
    assert float(rate(warmup // 2)) == pytest.approx(peak / 2, rel=1e-2)
    assert float(rate(train.steps)) == pytest.approx(peak * final)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip) == (
        *(0.9, 0.95, 0.1, 1.0),
    )
    assert optimizer.eps == (1e-5 if name.startswith('llama2') else 1e-8)


@pytest.mark.parametrize('kind, name, get', DUMPS)
def test_name_is_that_of_its_function(kind, name, get):
    assert get(name).name == name


def test_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="'lama1_65b': did you mean 'llama1_65b'"):
        configs.get('lama1_65b')
    with pytest.raises(UserError, match="no recipe is called 'llama1_65b'"):
        configs.recipe('llama1_65b')


def plain(value):
    """An experiment, or a grid: its first arm, and how the others differ from it."""
    if not isinstance(value, Grid):
        return to_dict(value)
    first, *others = [to_dict(arm.experiment) for arm in value.arms]
    differ = {other['name']: list(difference(first, other)) for other in others}
    settings = {name: getattr(value, name) for name in ('name', 'title', 'seeds', 'may_differ')}
    return {**settings, 'suite': asdict(value.suite), 'first': first, 'others': differ}


@pytest.mark.parametrize('kind, name, get', DUMPS)
def test_golden_dump(kind, name, get):
    text = json.dumps(plain(get(name)), indent=1, ensure_ascii=False) + '\n'
    golden = GOLDENS / kind / f'{name}.json'
    if os.environ.get('LLAMA_JAX_WRITE_GOLDENS'):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding='utf-8')
    assert golden.is_file(), f'{name} has no dump: see the first lines of this file'
    # As lines, so that a failure shows the fields that differ.
    assert text.splitlines() == golden.read_text(encoding='utf-8').splitlines()


def test_no_golden_without_a_configuration():
    for kind in KINDS:
        known = [name for one, name, _ in DUMPS if one == kind]
        assert sorted(path.stem for path in (GOLDENS / kind).glob('*.json')) == known
