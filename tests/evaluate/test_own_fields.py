"""Fields of a data set that a suite is asked for, and sizes that fit."""

import csv
import json
import math
import types
from dataclasses import replace

import pytest

from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.evaluate import texts
from llama_jax.evaluate.suite import check, check_texts
from llama_jax.objectives.causal import CausalLM
from tests.evaluate.conftest import MODEL, experiment
from tests.evaluate.test_suite import SMALL


def test_a_set_of_ones_own_is_measured_by_its_fields(tokenizer, tmp_path):
    """Files have no topics but their names, and no pairs: that is said, and is no error."""
    for name in 'abcd':
        lines = (json.dumps({'text': f'{name} {i} ' * 40}) + '\n' for i in range(60))
        (tmp_path / f'{name}.jsonl').write_text(''.join(lines))
    data = DataConfig(sources=(Source('text_files', files=(str(tmp_path),)),))
    setting = types.SimpleNamespace(data=data, objective=CausalLM(), model=MODEL)
    found = texts.of_run(SMALL, setting, tokenizer)
    assert 'text_files has no field package: set --suite.topics-field' in found.absent['topics']
    assert 'no fields docstring and body' in found.absent['pairs'] and not found.topics.names
    assert found.order.names and found.whitening and found.spans.a
    named = texts.of_run(replace(SMALL, topics_field='file', topics=4), setting, tokenizer)
    assert named.topics.names == tuple(f'{name}.jsonl' for name in 'abcd')
    with pytest.raises(UserError, match='topics-field genre: text_files has no document with'):
        texts.of_run(replace(SMALL, topics_field='genre'), setting, tokenizer)
    with pytest.raises(UserError, match='pairs-fields q and a: text_files has no document with'):
        texts.of_run(replace(SMALL, pairs_fields=('q', 'a')), setting, tokenizer)
    # Before a run is trained.
    for wrong in ({'topics_field': 'genre'}, {'pairs_fields': ('q', 'a')}):
        with pytest.raises(UserError, match='text_files has no document with that'):
            check_texts(replace(SMALL, **wrong), setting)
    with pytest.raises(UserError, match='group-field boook: text_files has no document with that'):
        check_texts(replace(SMALL, group_field='boook'), setting)
    with pytest.raises(UserError, match='is a file, and a suite takes the name of a data set'):
        check_texts(replace(SMALL, text=str(tmp_path / 'a.jsonl')), setting)
    one = Source('text_files', files=(str(tmp_path / 'a.jsonl'),))
    few = setting.data.sources[0], replace(one, split='test[:1]')
    setting.data = DataConfig(sources=few[1:])
    little = texts.of_run(replace(SMALL, window=48), setting, tokenizer)
    assert 'no two documents of 16 tokens' in little.absent['spans'] and not little.spans.a
    setting.data = DataConfig(sources=few[:1])
    none = texts.of_run(replace(SMALL, pairs=''), setting, tokenizer)
    assert none.absent['pairs'] == 'no data set of pairs is named'


@pytest.mark.parametrize('suffix', ['.jsonl', '.csv'])
def test_fields_beside_the_text_of_a_file_are_asked_for_by_name(tokenizer, tmp_path, suffix):
    rows = [
        {
            'body': f'{genre} {i} ' * 60,
            'genre': genre,
            'head': f'a headline about {genre}, number {i}',
        }
        for genre in ('新闻', 'sport', 'science')
        for i in range(600)
    ]
    path = tmp_path / f'rows{suffix}'
    if suffix == '.csv':
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    source = Source('text_files', files=(str(path),), field='body')
    setting = types.SimpleNamespace(
        data=DataConfig(sources=(source,)), objective=CausalLM(), model=MODEL
    )
    asked = replace(SMALL, topics_field='genre', pairs_fields=('head', 'body'))
    check_texts(asked, setting)
    found = texts.of_run(asked, setting, tokenizer)
    assert {*found.topics.names} == {'新闻', 'sport', 'science'}
    # Both are cut between tokens, which may be within a character.
    heads, bodies = (
        [tokenizer.decode(ids).rstrip('\ufffd') for ids in side] for side in found.pairs[:2]
    )
    by_head = {row['head']: row['body'] for row in rows}
    assert len(heads) > 8
    for head, body in zip(heads, bodies, strict=True):
        assert any(k.startswith(head) and text.startswith(body) for k, text in by_head.items())


def test_fields_of_the_usual_names_are_found_and_texts_without_fields_are_no_fault(
    tokenizer, tmp_path
):
    rows = [
        {
            'docstring': f'What number {i} does, at some length.',
            'body': f'f{i} ' * 40,
            'origin': 'x',
        }
        for i in range(400)
    ]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'plain.json').write_text(json.dumps([f'text {i} ' * 40 for i in range(400)]))
    sources = (
        Source('text_files', files=(str(tmp_path / 'rows.jsonl'),), field='body'),
        Source('text_files', files=(str(tmp_path / 'plain.json'),)),
    )
    setting = types.SimpleNamespace(
        data=DataConfig(sources=sources), objective=CausalLM(), model=MODEL
    )
    found = texts.of_run(SMALL, setting, tokenizer)
    assert len(found.pairs.a) > 8 and 'pairs' not in found.absent
    # Of a file its own field, not the place that was prepared.
    check_texts(replace(SMALL, topics_field='origin'), setting)
    named = texts.of_run(replace(SMALL, topics_field='origin'), setting, tokenizer)
    assert 'no two values of origin' in named.absent['topics']


def test_what_is_off_is_called_so(tokenizer, tmp_path):
    lines = (json.dumps({'text': f'{i} words ' * 40}) + '\n' for i in range(400))
    (tmp_path / 'a.jsonl').write_text(''.join(lines))
    source = Source('text_files', files=(str(tmp_path / 'a.jsonl'),))
    setting = types.SimpleNamespace(
        data=DataConfig(sources=(source,)), objective=CausalLM(), model=MODEL
    )
    found = texts.of_run(replace(SMALL, order=0, topics=0, pool=0), setting, tokenizer)
    for what, name in (('order', 'order'), ('topics', 'topics'), ('spans', 'pool')):
        assert found.absent[what] == f'suite.{name} is 0'
    found = texts.of_run(replace(SMALL, windows=0), setting, tokenizer)
    assert found.absent['windows'] == 'suite.windows is 0' and found.spans.a


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'middle': 48}, 'suite.middle 48 of a suite.window of 48 tokens: give 1 to 47'),
        ({'middle': 0}, 'suite.middle 0'),
        ({'windows': -3}, 'suite.windows -3: give 0 or more'),
        ({'pool': 2}, 'suite.pool 2: give 0 for none, or 8 or more'),
        ({'pool': 0, 'windows': 0}, 'are both 0'),
        ({'span': 15}, 'suite.span 15: give 16 or more'),
        ({'span': 0, 'pool': 0}, 'suite.span 0: give 1 or more'),
        ({'window': 7, 'middle': 1}, 'suite.window 7: give 8 or more'),
        ({'batch': 0}, 'suite.batch 0: give 1 or more'),
        ({'infill': 0}, 'suite.infill 0: give 1 or more'),
        ({'seed': -1}, 'suite.seed -1: give 0 or more'),
        ({'rates': (math.nan,)}, 'suite.rates .nan,.: give one rate or more above 0'),
        ({'tasks': ('needle',), 'task_items': 0}, 'suite.task_items 0: give 1 or more'),
        ({'tasks': ('needle', 'needle')}, 'needle needle: name each task once'),
    ],
)
def test_sizes_that_measure_nothing_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        check(replace(SMALL, **change), experiment(CausalLM()))
