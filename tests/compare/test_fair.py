"""A grid whose arms differ in more than is compared is refused, for each kind of difference; what
is proved is what training does."""

import itertools
import json
import shutil
from dataclasses import dataclass, replace

import jax
import optax
import pytest

from llama_jax import mesh
from llama_jax.compare import fair
from llama_jax.compare.grid import Arm
from llama_jax.data.loader import Loader
from llama_jax.data.order import Place, Stream
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.distill import Distillation
from llama_jax.train import code
from llama_jax.train.checkpoint import checksum
from llama_jax.train.experiment import Randomness
from llama_jax.train.step import initial_state
from tests.compare.tiny import changed, with_second_arm


def refusal(grid):
    with pytest.raises(UserError) as refused:
        fair.check(grid)
    line = str(refused.value)
    assert '\n' not in line
    return line


def peak(experiment, value):
    schedule = replace(experiment.optimizer.schedule, peak=value)
    return changed(experiment, 'optimizer', schedule=schedule)


def test_a_fair_grid_is_proved(proof):
    assert {
        *('tokens', 'tokens per step', 'optimizer', 'schedule', 'precision', 'settings'),
        *('tokenizer', 'documents', 'document order, seed 0', 'document order, seed 1'),
        *('initial weights, seed 0', 'initial weights, seed 1'),
        *('evaluation suite', 'evaluation code', 'training code'),
    } == proof.held_fixed.keys()
    assert proof.held_fixed['tokens'] == 20 * 8 * 32
    orders = [proof.held_fixed[f'document order, seed {seed}'] for seed in (0, 1)]
    assert orders[0] != orders[1]
    json.dumps(proof.held_fixed)


@pytest.mark.parametrize(
    'change, field',
    [
        (lambda x: changed(x, 'model', ffn=48), 'model.ffn: 32 -> 48'),
        (lambda x: changed(x, 'model', dropout=0.1), 'model.dropout: 0.0 -> 0.1'),
        (lambda x: changed(x, 'data', train_split='train[:9]'), 'data.train_split'),
        (lambda x: changed(x, 'train', steps=21), 'train.steps: 20 -> 21'),
        (lambda x: changed(x, 'train', batch=16), 'train.batch: 8 -> 16'),
        (lambda x: changed(x, 'train', seq_len=16), 'train.seq_len: 32 -> 16'),
        (lambda x: changed(x, 'optimizer', beta2=0.9), 'optimizer.beta2: 0.95 -> 0.9'),
        (lambda x: peak(x, 0.02), 'optimizer.schedule.peak: 0.01 -> 0.02'),
        (lambda x: changed(x, 'compute', precision='bfloat16'), "-> 'bfloat16'"),
        (lambda x: changed(x, 'evaluation', batches=2), 'evaluation.batches: 1 -> 2'),
        (lambda x: replace(x, start='runs/other'), "start: None -> 'runs/other'"),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_settings_that_differ_are_refused_by_name(grid, change, field):
    line = refusal(with_second_arm(grid, change))
    assert field in line and 'the arms plain and z differ' in line and 'may_differ' in line


def test_every_field_that_differs_is_named(grid):
    line = refusal(with_second_arm(grid, lambda x: peak(changed(x, 'model', ffn=48), 0.02)))
    assert 'model.ffn' in line and 'optimizer.schedule.peak' in line


def test_objectives_differ_only_as_far_as_they_are_named(grid):
    line = refusal(replace(grid, may_differ=('name',)))
    assert 'objective.z_loss: 0.0 -> 0.01' in line
    named = replace(grid, may_differ=('name', 'objective.z_loss'))
    fair.check(replace(named, seeds=1))


def test_a_token_budget_that_differs_is_refused_even_where_it_is_named(grid):
    grid = with_second_arm(
        grid, lambda x: changed(x, 'train', steps=21), may_differ=('name', 'objective', 'train')
    )
    line = refusal(grid)
    assert 'token budget (5,120 and 5,376)' in line
    # Nor by the fields that matching changes.
    named = replace(grid, may_differ=('name', 'objective', 'train.steps'))
    assert 'token budget' in refusal(named)
    line = refusal(replace(named, match='flops'))
    assert 'the arm z has' in line and 'FLOPs' in line and '--match flops' in line


def test_another_tokenizer_is_refused_even_where_it_is_named(grid):
    tokenizer = replace(grid.arms[0].experiment.data.tokenizer, kind='unigram')
    grid = with_second_arm(
        grid,
        lambda x: changed(x, 'data', tokenizer=tokenizer),
        may_differ=('name', 'objective', 'data.tokenizer'),
    )
    assert 'differ in the tokenizer' in refusal(grid)


def test_other_documents_are_refused_even_where_they_are_named(grid, text, tmp_path):
    other = tmp_path / 'other.jsonl'
    shutil.copy(text, other)
    with other.open('a') as file:
        file.write('\n{"text": "one more"}')
    source = replace(grid.arms[0].experiment.data.sources[0], files=(str(other),))
    # The same tokenizer, so that it is the documents which are found.
    tokenizer = tmp_path / 'text.model'
    data = grid.arms[0].experiment.data
    fair.load_tokenizer(data).save(tokenizer)
    shared = replace(data, tokenizer=replace(data.tokenizer, path=str(tokenizer)))
    arms = tuple(replace(arm, experiment=replace(arm.experiment, data=shared)) for arm in grid.arms)
    grid = with_second_arm(
        replace(grid, arms=arms),
        lambda x: changed(x, 'data', sources=(source,)),
        may_differ=('name', 'objective', 'data.sources'),
    )
    assert 'differ in the documents' in refusal(grid)


def test_another_order_of_documents_is_refused(grid, monkeypatch):
    calls = []

    class Another(Stream):
        def beginning(self):
            calls.append(1)
            return (Place(len(calls), 0),) * len(self.sources)

    monkeypatch.setattr(fair.order, 'Stream', Another)
    assert 'differ in the order of documents' in refusal(grid)


@dataclass(frozen=True)
class Scaled(CausalLM):
    """A causal LM whose backbone begins with other values, through `initial_params` below."""


@pytest.mark.slow
def test_other_initial_weights_are_refused(grid, monkeypatch):
    initial = fair.initial_params

    def another(model, objective, key):
        params = initial(model, objective, key)
        scale = 2.0 if isinstance(objective, Scaled) else 1.0
        return jax.tree.map(lambda x: x * scale, params)

    monkeypatch.setattr(fair, 'initial_params', another)
    fair.check(replace(grid, seeds=1))
    grid = with_second_arm(grid, lambda x: replace(x, objective=Scaled()))
    assert 'differ in the initial weights under seed 0' in refusal(grid)


@pytest.mark.slow
def test_initial_weights_are_those_of_training(grid, proof):
    experiment = grid.arms[1].experiment
    for seed in (0, 1):
        state = initial_state(
            experiment.model,
            experiment.objective,
            optax.identity(),
            seed=seed,
            mesh=mesh.make(MeshConfig()),
        )
        found = proof.held_fixed[f'initial weights, seed {seed}']
        assert found == f'{checksum(state.params):08x}'


def test_document_order_is_that_of_training(grid, proof):
    experiment = grid.arms[0].experiment
    with Loader(
        experiment.data,
        split='train',
        tokenizer=fair.load_tokenizer(experiment.data),
        maker=experiment.objective,
        batch=8,
        seq_len=experiment.train.seq_len,
        seed=1,
    ) as loader:
        stream = loader._recipe.stream()
    blocks = list(itertools.islice(stream, 2 * len(stream.sources[0])))
    assert proof.held_fixed['document order, seed 1'] == fair._hash(blocks)


def test_seeds_of_their_own_are_proved_and_may_be_what_is_compared(grid):
    with_seeds = with_second_arm(
        grid,
        lambda x: replace(
            x, objective=grid.arms[0].experiment.objective, randomness=Randomness(data=7)
        ),
    )
    assert 'randomness.data: None -> 7' in refusal(with_seeds)
    named = replace(with_seeds, may_differ=('name', 'randomness.data'), seeds=1)
    held = fair.check(named).held_fixed
    assert 'initial weights, seed 0' in held and 'document order, seed 0' not in held
    orders = [fair._order(fair.text_of, 0, arm.experiment) for arm in named.arms]
    assert orders[0] != orders[1] == fair._order(fair.text_of, 7, named.arms[0].experiment)


def test_seeds_that_change_nothing_are_refused(grid):
    fixed = Randomness(init=0, data=0, masks=0)
    arms = [replace(x, experiment=replace(x.experiment, randomness=fixed)) for x in grid.arms]
    line = refusal(replace(grid, arms=tuple(arms)))
    assert 'randomness.init, randomness.data, randomness.masks' in line and '--seeds 1' in line
    fair.check(replace(grid, arms=tuple(arms), seeds=1, again=False))


def test_arms_of_another_shape_are_compared_among_themselves(grid):
    wide = replace(
        with_second_arm(grid, lambda x: changed(x, 'model', ffn=48)),
        may_differ=('name', 'objective', 'model.ffn'),
        seeds=1,
    )
    held = fair.check(wide).held_fixed
    one, other = (held[f'initial weights of {name}, seed 0'] for name in ('plain', 'z'))
    assert one != other


def test_code_is_hashed(tmp_path):
    for packages in (code.TRAINS, code.EVALUATES):
        for package in packages:
            of = code.ROOT / package
            (tmp_path / package).parent.mkdir(exist_ok=True)
            (shutil.copy if of.is_file() else shutil.copytree)(of, tmp_path / package)
    shutil.copy(code.ROOT / 'layout.py', tmp_path)

    def hashes():
        code.digest.cache_clear()
        return [
            code.digest(code.TRAINS, beside=True, root=tmp_path),
            code.digest(code.EVALUATES, root=tmp_path),
        ]

    before = hashes()
    assert hashes() == before and code.digest(code.EVALUATES) == before[1]
    for place, changes in (
        ('evaluate/stats.py', [False, True]),
        ('compare/baselines.py', [False, True]),
        ('objectives/causal.py', [True, False]),
        ('optim/adamw.py', [True, False]),
        ('data/packing.py', [True, False]),
        ('layout.py', [True, False]),
    ):
        with (tmp_path / place).open('a') as file:
            file.write('\n')
        after = hashes()
        assert [a != b for a, b in zip(before, after, strict=True)] == changes
        before = after


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda x: changed(x, 'train', steps=0), '--train.steps is 0'),
        (lambda x: changed(x, 'train', seq_len=128), 'train.seq_len 128 is longer than the model'),
        (lambda x: changed(x, 'model', vocab=500), 'vocabulary of 500, the tokenizer one of 512'),
        (lambda x: changed(x, 'model', context=32), 'the model context is 32'),
        (lambda x: changed(x, 'data', test_split='tset'), '--data.test-split tset: text_files has'),
    ],
    ids=['steps', 'length', 'vocabulary', 'evaluation', 'test split'],
)
def test_settings_that_do_not_fit_are_refused_with_the_arm(grid, change, words):
    arms = tuple(replace(arm, experiment=change(arm.experiment)) for arm in grid.arms)
    line = refusal(replace(grid, arms=arms))
    assert words in line and line.startswith('arm plain: ')


def test_a_teacher_that_is_not_there_is_told_before_the_first_step(grid):
    line = refusal(with_second_arm(grid, lambda x: replace(x, objective=Distillation('nowhere'))))
    assert line.startswith('arm z: nowhere holds no run')


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda grid: replace(grid, arms=()), 'has no arm'),
        (lambda grid: replace(grid, seeds=0), '--seeds 0'),
        (lambda grid: replace(grid, arms=grid.arms[:1] * 2), "two arms of tiny are called 'plain'"),
        (lambda grid: replace(grid, arms=(Arm('a/b', grid.arms[0].experiment),)), "arm 'a/b'"),
        (lambda grid: replace(grid, arms=(Arm('..', grid.arms[0].experiment),)), "arm '..'"),
    ],
)
def test_grids_without_sense_are_refused(grid, change, words):
    assert words in refusal(change(grid))
