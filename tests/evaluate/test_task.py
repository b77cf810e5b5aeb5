"""Files of tasks: what they say, and what is wrong with them in one line."""

import json

import pytest

from llama_jax.errors import UserError
from llama_jax.evaluate import task

ITEM = {'prompt': 'Q', 'choices': ['x', 'y'], 'answer': 'y'}


def lines(path, *items):
    path.write_text('\n'.join(x if isinstance(x, str) else json.dumps(x) for x in items))
    return path


def toml(path, **settings):
    settings = {'test': 'test.jsonl', **settings}
    path.write_text(''.join(f'{key} = {json.dumps(x)}\n' for key, x in settings.items()))
    return path


@pytest.mark.parametrize(
    ('item', 'kind'),
    [
        (ITEM, 'choices'),
        ({'prompt': 'Q', 'answer': 'A'}, 'text'),
        ({'text': 'whole'}, 'perplexity'),
        ({'query': 'q', 'document': 'd'}, 'retrieval'),
        ({'text': 'a', 'label': 'l'}, 'label'),
    ],
)
def test_a_file_of_items_says_what_is_asked(tmp_path, item, kind):
    found = task.load(lines(tmp_path / 'mine.jsonl', item, '', item | {'query': 'other'}))
    assert found.task.kind == kind and found.task.name == 'mine'
    assert [one.line for one in found.items] == [1, 3]


def test_a_toml_file_names_fields_and_templates(tmp_path):
    lines(
        tmp_path / 'test.jsonl',
        *({'q': f'{n}', 'opts': ['ja', 'nein'], 'gold': n % 2} for n in range(4)),
    )
    lines(tmp_path / 'train.jsonl', {'q': 7, 'opts': ['ja', 'nein'], 'gold': 'nein'})
    path = toml(
        tmp_path / 'a.toml',
        name='frage',
        prompt='F: {{q}}\nA ({{ q }}):',
        choices='opts',
        target='gold',
        train='train.jsonl',
    )
    found = task.load(path, shots=1, limit=3)
    assert found.task.name == 'frage' and found.task.shots == 1 and len(found.items) == 3
    one = found.items[1]
    assert (one.prompt, one.choices, one.gold) == ('F: 1\nA (1):', ('ja', 'nein'), 1)
    assert found.train[0].answers == ('nein',) and found.train[0].gold == 1
    assert task.domain_of(found.task) == '):'
    assert task.free_of_content(found.task, 'N/A') == 'F: N/A\nA (N/A):'


@pytest.mark.parametrize(
    ('items', 'words'),
    [
        ([], 'holds no items'),
        (['{"prompt": "Q"'], 'line 1 is no JSON'),
        (['[1]'], 'line 1 is no JSON object'),
        ([{'question': 'Q'}], "line 1: fields 'question' are of no kind of task"),
        ([ITEM, {'prompt': 'Q', 'answer': 'y'}], "line 2: field 'choices' is missing"),
        ([ITEM, ITEM | {'answer': 'z'}], "line 2: field 'answer' is 'z', none of the choices x, y"),
        ([ITEM | {'answer': 2}], "'answer' is 2, none"),
        ([ITEM | {'answer': True}], "'answer' is True, none"),
        ([ITEM | {'answer': -1}], "'answer' is -1, none"),
        ([ITEM | {'choices': ['x', 'x']}], 'each once'),
        ([ITEM | {'choices': ['y']}], 'two choices or more'),
        ([ITEM | {'choices': 'xy'}], 'give a list of texts'),
        ([ITEM | {'prompt': ['Q']}], r"'prompt' is \['Q'\]: give a text"),
        ([{'prompt': 'Q', 'answer': []}], 'give a text, or a list'),
        ([{'text': ''}], "'text' is empty"),
        ([{'query': 'q', 'document': 'd'}], 'among one document'),
    ],
)
def test_bad_items(tmp_path, items, words):
    with pytest.raises(UserError, match=words) as error:
        task.load(lines(tmp_path / 'items.jsonl', *items))
    assert '\n' not in str(error.value) and 'items.jsonl' in str(error.value)


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'promt': 'x'}, 'a task has no promt: did you mean prompt?'),
        ({'kind': 'chioces'}, "kind 'chioces': give one of choices, label, text"),
        ({'shots': 2}, 'name one'),
        ({'shots': 3, 'train': 'train.jsonl'}, '3 shots, and train.jsonl has 2 items'),
        ({'train': 'test.jsonl'}, 'train and test are one file'),
        ({'train': 'absent.jsonl'}, 'there is no file .*absent.jsonl'),
        ({'shots': 'two'}, "shots is 'two', it must be a number"),
        ({'choices': [1, 2]}, 'must be a text'),
        ({'choices': ['x']}, 'give two or more'),
        ({'prompt': 'no field'}, 'holds no field'),
        ({'prompt': '{{q}}'}, "line 1: field 'q' is missing .there: 'prompt'"),
        ({'until': ['.']}, 'until has no effect on a task of kind choices'),
        ({'kind': 'perplexity', 'text': 'prompt', 'shots': 1}, 'shots has no effect'),
        ({'kind': 'perplexity', 'text': 'prompt', 'stride': 4000}, 'above the window of 2048'),
        ({'limit': -1}, 'limit -1: 0 or more'),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    lines(tmp_path / 'test.jsonl', ITEM)
    lines(tmp_path / 'train.jsonl', ITEM, ITEM)
    with pytest.raises(UserError, match=words) as error:
        task.load(toml(tmp_path / 'a.toml', **settings))
    assert '\n' not in str(error.value)


def test_files_may_begin_with_a_byte_order_mark(tmp_path):
    """As some editors of Windows write them."""
    lines(tmp_path / 'test.jsonl', ITEM)
    path = toml(tmp_path / 'a.toml', name='marked')
    for file in (path, tmp_path / 'test.jsonl'):
        file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes())
    found = task.load(path)
    assert found.task.name == 'marked' and found.items[0].prompt == 'Q'


def test_no_task(tmp_path):
    for name, words in (('no.toml', 'there is no task file'), ('a.csv', 'is no task: give')):
        if name == 'a.csv':
            (tmp_path / name).write_text('x')
        with pytest.raises(UserError, match=words):
            task.load(tmp_path / name)
    (tmp_path / 'b.toml').write_text('test = ')
    with pytest.raises(UserError, match='is no TOML'):
        task.load(tmp_path / 'b.toml')
