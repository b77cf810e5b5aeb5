"""A grid whose arms differ in more than is compared is refused, for each kind of difference; what
is proved is what training does."""

import itertools
import json
import shutil
from dataclasses import dataclass, replace

import jax
import numpy as np
import optax
import pytest

from llama_jax import mesh
from llama_jax.compare import budget, fair
from llama_jax.compare.grid import Arm
from llama_jax.data.loader import Loader
from llama_jax.data.order import Place, Stream
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.tune import Frozen
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.switch import Switch
from llama_jax.train import code
from llama_jax.train.checkpoint import checksum
from llama_jax.train.experiment import Randomness
from llama_jax.train.step import initial_state
from tests.compare import tiny
from tests.compare.tiny import changed, with_second_arm


@pytest.fixture(scope='module')
def proof(grid):
    return fair.check(grid)


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
    named = replace(grid, may_differ=('name', 'objective', *budget.MATCHED))
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
    ],
    ids=['steps', 'length', 'vocabulary', 'evaluation'],
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


# --- the budget ---------------------------------------------------------------------------------


def test_budget_equals_a_count_by_hand(grid, proof, text):
    plain = grid.arms[0].experiment
    tokenizer = fair.load_tokenizer(plain.data)
    row = proof.budget[0]
    model = plain.model
    assert row.arm == 'plain' and row.tokens == 20 * 8 * 32
    # Documents without end fill every row of a causal model, and each position has a target.
    assert row.loss_tokens == row.tokens
    assert row.padding == 0
    encoded = [tokenizer.encode(json.loads(x)['text']) for x in text.read_text().split('\n')]
    assert row.cut == np.mean([len(x) > 32 for x in encoded]) > 0
    # Embedding and head; q, o; k, v; the three of SwiGLU; the layer's norms and the last.
    assert row.parameters == 2 * 512 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 3 * 16
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 512 * 16
    assert row.flops == row.tokens * 6 * (weights + 2 * 16 * (32 + 1) / 2)
    assert model.tied is False
    # 5,120 positions are less than the whole text has? Then what is read is what is unique.
    documents = [tokenizer.encode(json.loads(x)['text']) for x in text.read_text().split('\n')]
    marked = sum(len(x) + 1 for x in documents)  # with the end token that each predicts
    raw = row.tokens * sum(map(len, documents)) / marked
    assert row.unique_tokens == pytest.approx(min(raw, sum(map(len, documents))), rel=0.05)
    assert row.text_seen == pytest.approx(raw, rel=0.05)


def test_unique_tokens_of_many_epochs_are_those_of_the_corpus(grid, text):
    long = changed(grid.arms[0].experiment, 'train', steps=1000)
    found = fair.text_of(long.data)
    row = budget.budget(Arm('long', long), found)
    (documents,) = found.corpus.sources
    assert row.unique_tokens == sum(len(found.tokenizer.encode(text)) for text in documents)
    assert row.tokens > 2 * row.unique_tokens and row.text_seen > 2 * row.unique_tokens


def test_table_shows_every_row(proof):
    lines = budget.table(proof.budget).split('\n')
    assert [line.split()[0] for line in lines] == ['arm', 'plain', 'z']
    assert '5,120' in lines[1] and lines[1].endswith('1.00')


def test_match_flops_equalises_within_half_a_step(grid):
    wide = with_second_arm(
        grid,
        lambda x: changed(x, 'model', ffn=96),
        may_differ=('name', 'objective', 'model.ffn'),
        seeds=1,
    )
    one, other = (budget.flops(arm.experiment) for arm in wide.arms)
    assert other > 1.2 * one
    matched = budget.match_flops(wide)
    first, second = (arm.experiment for arm in matched.arms)
    assert first == wide.arms[0].experiment
    assert second.train.steps < 20
    assert abs(budget.flops(second) - one) <= budget.flops(second) / second.train.steps / 2
    warmup = second.optimizer.schedule.warmup_steps
    assert warmup == round(4 * one / other) and warmup < 4
    proof = fair.check(matched)
    rows = proof.budget
    assert rows[1].tokens < rows[0].tokens
    assert rows[1].flops == pytest.approx(rows[0].flops, rel=0.5 / second.train.steps)
    assert 'tokens' not in proof.held_fixed and 'FLOPs' in proof.held_fixed


def test_documents_are_cut_by_the_room_that_each_objective_has(text, tmp_path):
    """A text stands twice in a row of block diffusion."""
    more = tmp_path / 'more.jsonl'
    short = [json.dumps({'text': f'def f{i}(x): return x + {i} * x, x'}) for i in range(30)]
    more.write_text('\n'.join([text.read_text('utf-8'), *short]))
    plain = tiny.experiment(more)
    rows = [
        budget.budget(Arm('x', replace(plain, objective=objective)), fair.text_of(plain.data))
        for objective in (CausalLM(), BlockDiffusion(block=4))
    ]
    n = [len(fair.load_tokenizer(plain.data).encode(json.loads(x)['text'])) for x in short]
    assert min(n) > 16 and max(n) < 32 and 0 < rows[0].cut < rows[1].cut == 1


def test_records_are_never_cut():
    assert budget._cut(SequenceToSequence(), np.array([5, 500]), 32) == 0
    assert budget._cut(CausalLM(), np.array([], int), 32) == 0


def test_matching_stretches_what_objectives_count_in_steps(grid):
    heads = MultiToken(heads=3, curriculum='reverse', curriculum_steps=20)
    matched = budget.match_flops(
        with_second_arm(grid, lambda x: replace(x, objective=heads), tuned='long ago', seeds=1)
    )
    experiment = matched.arms[1].experiment
    ratio = experiment.train.steps / 20
    assert ratio < 0.9 and experiment.objective.curriculum_steps == round(20 * ratio)
    assert matched.tuned == ''  # rates of another length
    # What matching changed may differ, and nothing else.
    named = {'train.steps', 'optimizer.schedule.warmup_steps', 'objective.curriculum_steps'}
    assert set(matched.may_differ) == {*grid.may_differ, *named}
    same = budget.match_flops(replace(grid, tuned='long ago'))
    assert same.tuned == 'long ago' and same.arms == grid.arms


@pytest.mark.parametrize('begin', [5, 8, 13])
def test_a_schedule_of_objectives_is_matched_to_a_step_of_its_last(grid, begin):
    switch = Switch((CausalLM(), MultiToken(heads=8)), (0, begin))
    matched = budget.match_flops(
        with_second_arm(grid, lambda x: replace(x, objective=switch), seeds=1)
    )
    goal, found = (budget.flops(arm.experiment) for arm in matched.arms)
    assert abs(found - goal) <= 0.51 * budget.last_step(matched.arms[1].experiment)
    assert 'FLOPs' in fair._matched(matched)


def test_a_frozen_model_costs_its_forward_pass(grid):
    frozen = replace(grid.arms[0].experiment, tune=Frozen())
    assert budget.flops(frozen) == pytest.approx(budget.flops(grid.arms[0].experiment) / 3)


def test_match_text_equalises_the_text_that_is_read(grid, proof):
    # Two views of a text are crops of it: a row is of more text than it holds.
    arms = [
        replace(arm, experiment=changed(arm.experiment, 'train', steps=100)) for arm in grid.arms
    ]
    pairs = with_second_arm(
        replace(grid, arms=tuple(arms), seeds=1),
        lambda x: replace(x, objective=InfoNCE(bidirectional=False)),
    )
    before = fair.check(pairs).budget
    assert before[1].text_seen > 2 * before[0].text_seen and before[1].padding > 0
    with pytest.raises(UserError, match='tokens of text'):
        fair._same_text(replace(pairs, match='text'), before)
    matched = budget.match_text(pairs, fair.text_of)
    rows = fair.check(matched).budget
    second = matched.arms[1].experiment
    assert 10 < second.train.steps < 50
    assert rows[1].text_seen == pytest.approx(rows[0].text_seen, rel=1 / second.train.steps)
