"""`experiments.evaluate --tasks` on the directory of a model that was made elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import tasks as ready
from experiments import evaluate
from llama_jax import trees
from llama_jax.evaluate import task
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from tests.convert import written

MODEL = ModelConfig(
    vocab=520, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=128
)
ONE = ('--mesh.data', 8, '--mesh.fsdp', 1)


def model(path, seed):
    rng = np.random.default_rng(seed)
    params = trees.map_named(
        lambda _, x: rng.normal(size=x.shape).astype(np.float32), layers.abstract(MODEL)
    )
    return written.directory(path, MODEL, params)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('asked')
    model(folder / 'ours', 1)
    model(folder / 'theirs', 2)
    items = [
        {'q': f'{i} is', 'gold': ['even', 'odd'][i % 2], 'text': f'number {i}, 数字'}
        for i in range(30)
    ]
    for name, part in (('test', items[:10]), ('train', items[10:])):
        text = ''.join(json.dumps(item) + '\n' for item in part)
        (folder / f'{name}.jsonl').write_text(text)
    (folder / 'numbers.toml').write_text(
        'test = "test.jsonl"\ntrain = "train.jsonl"\nprompt = "{{q}}"\ntarget = "gold"\n'
        'choices = ["even", "odd"]\nshots = 2\n'
    )
    (folder / 'whole.toml').write_text('kind = "perplexity"\ntest = "test.jsonl"\n')
    return folder


def test_two_models_on_two_tasks(folder, run_script):
    output = folder / 'found.json'
    code, out, error = run_script(
        *(evaluate.main, '--from', folder / 'ours', '--against', folder / 'theirs', *ONE),
        *('--tasks', folder / 'numbers.toml', folder / 'whole.toml'),
        *('--shots', 1, '--shot-seeds', 2, '--limit', 8, '--output', output),
    )
    assert code == 0, error
    found = json.loads(output.read_text())
    ours, theirs = (part['tasks'] for part in (found, found['against']))
    assert ours['numbers']['items'] == 8 and ours['numbers']['shot_seeds'] == 2
    examples = {
        name: [json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]
        for name in ('found-numbers', 'found-against-numbers', 'found-whole')
    }
    assert len(examples['found-numbers']) == 16 and len(examples['found-whole']) == 8
    first, other = (examples[name][0] for name in ('found-numbers', 'found-against-numbers'))
    assert first['prompt'] == other['prompt'] and first['prompt'].endswith('\n\n0 is')
    assert first['log_p'] != other['log_p'] and len(first['log_p']) == 2
    for name, line in (('numbers', 'acc'), ('whole', 'bits_per_byte')):
        a, b = (part[name]['metrics'][line]['value'] for part in (ours, theirs))
        difference = theirs[name]['difference'][line]
        assert difference['value'] == pytest.approx(a - b)
        assert difference['low'] <= difference['value'] <= difference['high']
    assert 'numbers: ours, 8 items, 1 shots, 2 draws' in out
    assert 'difference: above theirs on the same items' in out and 'precision' in out


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--shots', 1], '--shots is of --tasks: name some'),
        (['--against', 'x'], '--against is of --tasks'),
        (['--tasks', 'numbers.toml', '--own'], '--own has no effect on --tasks'),
        (['--tasks', 'numbers.toml', '--text', 'x'], '--text has no effect on --tasks'),
        (['--lm-eval', 'x', '--truncate'], '--truncate has no effect on --lm-eval'),
        (['--lm-eval', 'nowhere'], 'there is no .yaml file of a task in nowhere'),
        (['--tasks', 'numbers.toml', '--lm-eval', 'x'], 'give one after the other'),
        (['--tasks', 'bbc_topic'], "no task is called 'bbc_topic': did you mean bbc_topics?"),
        (['--tasks', 'numbers.toml', 'numbers.toml'], 'two tasks are called numbers'),
        (['--tasks', 'numbers.toml', '--shots', 21], '21 shots, and train.jsonl has 20 items'),
        (['--tasks', 'numbers.toml', '--limit', -1], 'limit -1: 0 or more'),
        (['--tasks', 'whole.toml', '--shots', 1], '--shots has no effect on tasks of kind'),
        (['--tasks', 'numbers.toml', '--output', 'no/x.json'], 'there is no directory no'),
        (['--tasks', 'numbers.toml', '--against', 'nowhere'], "no weights are called 'nowhere'"),
    ],
)
def test_bad_options(folder, run_script, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    code, _, error = run_script(evaluate.main, '--from', 'ours', *arguments)
    assert code == 2 and len(error) == 1, error
    assert words in error[0]


def test_the_table_says_what_is_no_exact_likelihood():
    of = {'value': 1.5, 'low': 1.25, 'high': 1.75, 'n': 64}
    result = {
        'metrics': {
            'bits_per_byte': {**of, 'kind': 'bound', 'standard_error': 0.0123},
            'suffix_bits_per_byte': {**of, 'kind': 'exact'},
            'task_reversal': {**of, 'by': 'bound'},
            'infill_exact': {'value': None, 'n': 0, 'why': 'no word'},
        }
    }
    ends = [line.partition('n = 64')[2].strip() for line in evaluate.table(result)]
    assert ends == ['bound (s.e. 0.0123)', '', 'by bound', '']
    assert list(evaluate.table(result))[-1].endswith('n/a: no word')


def test_named_tasks_are_made_once_and_load(monkeypatch, tmp_path):
    monkeypatch.setenv('LLAMA_JAX_CACHE', str(tmp_path))
    calls = []
    monkeypatch.setitem(ready.TASKS, 'sums', lambda: calls.append(1) or ready.sums())
    path = ready.made('sums')
    assert ready.made('sums') == path and calls == [1]
    # Of other generators, of another installation or another package it is made anew.
    monkeypatch.setattr(ready, '_package', Path)  # which may not be installed
    monkeypatch.setattr(ready.importlib.metadata, 'version', lambda name: 'one')
    of_python, of_package = ready.made('star_graph'), ready._fingerprint('zh_sentiment')
    monkeypatch.setattr(ready.builder, 'fingerprint', lambda name: 'other generators')
    monkeypatch.setattr(ready.python_corpus, 'fingerprint', lambda config: 'another Python')
    monkeypatch.setattr(ready.importlib.metadata, 'version', lambda name: 'another')
    assert ready.made('star_graph') != of_python and ready.made('sums') != path
    assert calls == [1, 1] and ready._fingerprint('zh_sentiment') != of_package
    one = task.load(path, shots=2)
    assert len(one.items) == len(one.train) == ready.N_TEST
    assert not {item.prompt for item in one.items} & {item.prompt for item in one.train}
    for item in one.items:
        a, plus, b, _ = item.prompt.split()
        assert plus == '+' and item.answers == (str(int(a) + int(b)),)
