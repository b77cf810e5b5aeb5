"""Rows of real data sets of queries and passages, in the shapes that people publish them."""

import json
from pathlib import Path

import pytest

from llama_jax.data.record import BadRecordError, QueryPassages
from llama_jax.data.record_files import from_lines
from llama_jax.data.schemas import record_of
from llama_jax.errors import UserError

FORMATS = {
    'sentence-transformers, triplet': (
        dict(anchor='q', positive='p', negative='n'),
        ('q', ('p',), ('n',)),
    ),
    'sentence-transformers, pair': (dict(anchor='q', positive='p'), ('q', ('p',), ())),
    'sentence-transformers, question and answer': (
        dict(question='q', answer='p'),
        ('q', ('p',), ()),
    ),
    'sentence-transformers, mined': (
        dict(query='q', positive='p', negative_10='c', negative_1='a', negative_2='b'),
        ('q', ('p',), ('a', 'b', 'c')),
    ),
    'sentence-transformers, list of negatives': (
        dict(query='q', positive='p', negatives=['a', 'b', 'a']),
        ('q', ('p',), ('a', 'b')),
    ),
    'sentence-transformers, set': (dict(set=['a', 'b', 'c', 'a']), ('a', ('b', 'c'), ())),
    'FlagEmbedding': (
        dict(query='问', pos=['答', '答二'], neg=['错'], pos_scores=[0.9], neg_scores=[0.1]),
        ('问', ('答', '答二'), ('错',)),
    ),
    'Tevatron': (
        dict(
            query_id='1',
            query='q',
            positive_passages=[dict(docid='7', title='T', text='p')],
            negative_passages=[
                dict(docid='8', title='', text='n'),
                dict(docid='9', title=None, text='m'),
            ],
        ),
        ('q', ('T p',), ('n', 'm')),
    ),
    'DPR': (
        dict(
            question='q',
            answers=['42'],
            positive_ctxs=[dict(title='T', text='p', score=1.0)],
            negative_ctxs=[dict(title='U', text='random')],
            hard_negative_ctxs=[dict(title='V', text='hard')],
        ),
        ('q', ('T p',), ('V hard',)),
    ),
    'DPR without hard ones': (
        dict(question='q', positive_ctxs=[dict(text='p')], negative_ctxs=[dict(text='r')]),
        ('q', ('p',), ('r',)),
    ),
    'a task of ours': (dict(query='q', document='d'), ('q', ('d',), ())),
    'a negative that is a positive': (
        dict(query='q', pos=['a', 'b'], neg=['b', 'c']),
        ('q', ('a', 'b'), ('c',)),
    ),
    'nulls of columns': (dict(query='q', positive='p', negative=None), ('q', ('p',), ())),
}


def test_lists_of_texts_are_pairs_and_triplets():
    lines = [b'["q", "p"]', '["问", "p", "a", "b"]'.encode()]
    how = {'field': None, 'encoding': 'utf-8', 'first': 1}
    found = [text for text, _ in from_lines(iter(lines), Path('pairs.jsonl'), **how)]
    assert [record_of(json.loads(text), QueryPassages) for text in found] == [
        QueryPassages('q', ('p',)),
        QueryPassages('问', ('p',), ('a', 'b')),
    ]
    for bad in (b'["q"]', b'["q", 1]', b'[]'):
        with pytest.raises(UserError, match=r'line 1 is no object \(list\)'):
            list(from_lines(iter([bad]), Path('pairs.jsonl'), **how))


@pytest.mark.parametrize('name', FORMATS)
def test_formats(name):
    fields, wanted = FORMATS[name]
    assert record_of(fields, QueryPassages) == QueryPassages(*wanted)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        (dict(text='a', label='b'), r'no query \(there: text, label; needed: query'),
        (dict(query='q'), r'no passage \(there: query'),
        (dict(query='q', pos=[]), 'pos is empty'),
        (dict(query=' ', pos='p'), 'query is empty'),
        (dict(query='q', pos=['p', '\n']), r'pos\[1\] is empty'),
        (dict(query='q', pos='p', neg=[3]), r'neg\[0\] is no text \(int\)'),
        (
            dict(query='q', positive_passages=[dict(docid='7', title='T')]),
            r'positive_passages\[0\]\.text is no text',
        ),
        (
            dict(query='q', positive_passages=[dict(title=['T'], text='p')]),
            r'positive_passages\[0\]\.title is no text',
        ),
        (dict(set=['a', 'a']), 'less than two'),
        (
            dict(query_text='q', positive_document_ids=['7'], negative_document_ids=[]),
            'positive_document_ids are of another file',
        ),
    ],
)
def test_refused(fields, match):
    with pytest.raises(BadRecordError, match=match) as error:
        record_of(fields, QueryPassages)
    assert '\n' not in str(error.value)
