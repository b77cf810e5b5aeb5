"""The budget of an arm by hand, and arms that are matched by FLOPs or text."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.compare import budget, fair
from llama_jax.compare.grid import Arm
from llama_jax.errors import UserError
from llama_jax.model.tune import Frozen
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.objectives.switch import Switch
from tests.compare import tiny
from tests.compare.tiny import changed, with_second_arm


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
