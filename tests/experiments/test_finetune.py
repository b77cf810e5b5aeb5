"""experiments.finetune: what a run begins with, and what is refused before anything is read."""

import dataclasses

import pytest

import configs
from configs import finetune as recipes
from experiments import finetune, pretrain
from llama_jax.mesh import MeshConfig
from llama_jax.objectives.classify import Classification
from llama_jax.train.experiment import check
from tests.train.conftest import (  # noqa: F401  fixtures
    experiment,
    one_device,
    short,
    short_run,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture
def tuned(run_script, monkeypatch):
    """Runs the script; the experiment that it would train, and its lines."""

    def tuned(*arguments):
        found = []
        monkeypatch.setattr(pretrain, 'train', lambda *args, **_: found.append(args))
        monkeypatch.setattr(pretrain, 'write_report', lambda workdir: workdir)
        monkeypatch.setattr(pretrain, 'write_baselines', lambda data, path: None)
        code, _, error = run_script(finetune.main, *arguments)
        return code, found[0] if found else None, error

    return tuned


def test_the_model_is_that_of_from(tuned, short_run, text):  # noqa: F811
    for option in (('--from', short_run), (f'--from={short_run}',), ('--start', short_run)):
        code, (found, workdir), error = tuned('text', *option, '--data.files', text)
        assert code == 0, error
        assert found.start == str(short_run) and str(workdir) == 'runs/text'
        assert found.model.dim == 32 and found.data.tokenizer.path == str(short_run)
        assert found.data.sources[0].files == (str(text),)
        assert found.optimizer == configs.recipe('text').optimizer


@pytest.mark.parametrize(
    'arguments, wanted',
    [
        (['text', '--data.files', 'x.jsonl'], 'nothing to tune: give --from RUN, --from smollm2'),
        (
            ['text', '--from', 'nowhere', '--data.files', 'x'],
            'no model of others is there: give --from',
        ),
        (['texts', '--from', 'RUN'], "no recipe is called 'texts': did you mean 'text'?"),
        (['quickstart', '--from', 'RUN'], "no recipe is called 'quickstart'"),
        (['text', '--form', 'RUN', '--data.files', 'x'], 'did you mean --from?'),
        (['text', '--from', 'RUN'], 'no data to tune on: give --data.files my.jsonl'),
        (
            ['text', '--from', 'RUN', '--data.files', 'x', '--data.tokenizer.vocab', '300'],
            'with --from',
        ),
    ],
)
def test_one_line_before_anything_is_read(tuned, short_run, arguments, wanted):  # noqa: F811
    arguments = [str(short_run) if word == 'RUN' else word for word in arguments]
    code, found, error = tuned(*arguments)
    assert code == 2 and found is None
    assert wanted in error[-1] and '--start' not in error[-1]


def test_without_a_recipe_all_are_listed(run_script):
    code, out, _ = run_script(finetune.main)
    assert code == 2 and 'RECIPE is one of' in out
    assert set(configs.recipes()) <= set(out.split())


def test_every_recipe_begins_with_what_is_given_and_ends_by_epochs():
    for name in configs.recipes():
        recipe = configs.recipe(name)
        assert recipe.start is None and recipe.data.sources == (), name
        assert bool(recipe.train.epochs) is (name != 'topics'), name
        assert recipe.optimizer.schedule.warmup_share, name
    models = {name: configs.recipe(name).model for name in configs.recipes()}
    assert models.pop('from_nothing').encoder_layers
    assert set(models.values()) == {recipes.ANY}


@pytest.mark.parametrize('name', sorted(configs.recipes()))
def test_the_settings_of_a_recipe_fit_each_other(name):
    recipe = configs.recipe(name)
    model = dataclasses.replace(recipe.model, vocab=512)
    objective = recipe.objective
    if isinstance(objective, Classification):
        objective = dataclasses.replace(objective, labels=('a', 'b'))
    if name == 'encoder_decoder':
        model = dataclasses.replace(model, encoder_layers=2)
    start = None if name == 'from_nothing' else 'smollm2'
    check(
        dataclasses.replace(recipe, model=model, objective=objective, start=start),
        one_device(MeshConfig()),
    )
