"""A set of BEIR becomes records of queries with passages."""

import json

import pytest

from benchmarks import beir
from llama_jax.data.record import QueryPassages
from llama_jax.data.schemas import record_of
from llama_jax.errors import UserError


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), 'utf-8')


@pytest.fixture
def source(tmp_path):
    source = tmp_path / 'set'
    lines(source / 'queries.jsonl', [{'_id': q, 'text': f'问{q}', 'metadata': {}} for q in '123'])
    passages = [{'_id': f'd{i}', 'title': 'T' if i % 2 else '', 'text': f'p{i}'} for i in range(4)]
    lines(source / 'corpus.jsonl', passages)
    judged = ['query-id\tcorpus-id\tscore', '1\td0\t1', '1\td1\t2', '1\td2\t0', '2\td3\t0']
    (source / 'qrels').mkdir()
    (source / 'qrels/train.tsv').write_text('\n'.join(judged) + '\n')
    lines(source / 'qrels/test.jsonl', [{'query-id': '3', 'corpus-id': 'd3', 'score': 1}])
    return source


def test_records(source, tmp_path, capsys):
    beir.write(beir.Options(source, tmp_path / 'out'))
    found = {
        path.stem: [
            record_of(json.loads(line), QueryPassages) for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / 'out').iterdir()
    }
    assert found == {
        'train': [QueryPassages('问1', ('p0', 'T p1'), ('p2',))],  # 2 has no passage
        'test': [QueryPassages('问3', ('T p3',))],
    }
    assert 'train.jsonl: 1 queries' in capsys.readouterr().out


def test_what_is_missing_is_told(source, tmp_path):
    (source / 'qrels/train.tsv').write_text('query-id\tcorpus-id\tscore\n1\td9\t1\n')
    with pytest.raises(UserError, match="corpus.jsonl has no text of 'd9'"):
        beir.write(beir.Options(source, tmp_path))
    (source / 'qrels/train.tsv').write_text('q\td\n1\td1\n')
    with pytest.raises(UserError, match='train.tsv has no query-id'):
        beir.write(beir.Options(source, tmp_path))
    with pytest.raises(UserError, match='has no qrels'):
        beir.write(beir.Options(tmp_path / 'none', tmp_path))
