"""Tasks that are made here: apart by construction, solved by who reads, by chance by others."""

import ast
import os
import re
import subprocess
import sys
from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from configs import tasks as ready
from llama_jax.data import python_files, sources, splits, synthetic
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.synthetic import builder, language, python_code
from llama_jax.evaluate import task
from llama_jax.evaluate.task import Item

N = 60
PACKAGES = ('asyncio', 'email', 'idlelib', 'json')


@pytest.fixture(scope='module', autouse=True)
def installation(tmp_path_factory):
    """A few packages of the standard library, and a cache of its own."""
    found = [
        (module, path)
        for module, path in python_files.python_files('stdlib')
        if module.split('.')[0] in PACKAGES
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_files, 'python_files', lambda where: found)
        patch.setattr(python_files, 'topic_records', lambda: iter(()))
        patch.setenv('LLAMA_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def made(installation):
    return {
        name: {split: list(synthetic.examples(name, split, N)) for split in splits.NAMES}
        for name in synthetic.TASKS
    }


NAMES = sorted(synthetic.TASKS)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_asked_is_never_trained_on(made, name):
    of = made[name]
    keys = {split: [one.key for one in found] for split, found in of.items()}
    assert all(len(set(k)) == len(k) > 0 for k in keys.values())
    assert not set(keys['train']) & {*keys['validation'], *keys['test']}
    assert not set(keys['validation']) & set(keys['test'])
    trained_on = {one.text for one in of['train']}
    assert not trained_on & {one.text for split in ('validation', 'test') for one in of[split]}
    # The same at every call, and those of fewer are the first of those of more.
    assert list(synthetic.examples(name, 'test', 3)) == of['test'][:3]


def test_examples_are_the_same_in_every_process():
    drawn = [name for name, task in synthetic.TASKS.items() if task.every is None]
    code = (
        'import hashlib; from llama_jax.data import synthetic\n'
        f'found = [list(synthetic.examples(name, "test", 5)) for name in {drawn}]\n'
        'print(hashlib.sha256(repr(found).encode()).hexdigest())'
    )
    found = {
        subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONHASHSEED': seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in ('0', '1')
    }
    assert len(found) == 1


def star_graph(prompt, choices):
    edges, _, ends = prompt.rstrip('=').partition('/')
    start, goal = re.match(r'(\d+),(\d+)=', ends + '=').groups()
    after = dict(edge.split(',')[::-1] for edge in edges.split('|'))  # each node has one before it
    node = goal
    while after[node] != start:
        node = after[node]
    return f'{node},'


def induction(prompt, choices):
    asked = prompt.rsplit(' ', 1)[1]
    return ' ' + re.search(rf'{asked} (\w+) lives', prompt)[1]


def needle(prompt, choices):
    asked = re.search(r'What is the code of (\w+)\?', prompt)[1]
    return ' ' + re.search(rf'The code of {asked} is (\d+)', prompt)[1]


def same_function(prompt, choices):
    f, g = re.findall(r'return (.*)', prompt)
    same = all(eval(f, {'x': x}) == eval(g, {'x': x}) for x in range(5))  # noqa: S307
    return f' {same}'


def polynomial(prompt, choices):
    """By numpy's polynomials, from the innermost bracket on."""

    def value(digits):
        return np.polynomial.Polynomial([int(d) for d in digits])

    def reduced(p):
        found = np.zeros(5)
        found[: min(5, len(p.coef))] = p.coef[:5]
        return np.polynomial.Polynomial(np.round(found) % 7)

    tokens = deque(re.findall(r'\d{5}|[+*@]', prompt))
    found = value(tokens.popleft())
    while tokens:
        operation, other = tokens.popleft(), value(tokens.popleft())
        apply = {'+': lambda a, b: a + b, '*': lambda a, b: a * b, '@': lambda a, b: a(b)}
        found = reduced(apply[operation](found, other))
    return ''.join(str(int(c)) for c in found.coef)


def minimal_pairs_python(prompt, choices):
    def valid(source):
        try:
            return bool(ast.parse(source))
        except SyntaxError:
            return False

    (right,) = [choice for choice in choices if valid(choice)]
    return right


def minimal_pairs_zh(prompt, choices):
    """What is wrong stands in one of these patterns."""
    classifiers = ''.join(sorted(set(language._ZH_CLASSIFIERS.values())))
    wrong = r'都也|比.+很|不.过|V|不.+吗？|(明天|后天|明年|下个月|下个星期).了'

    def bad(text):
        counted = re.search(rf'看见了.([{classifiers}])(.+)。', text)
        if counted:
            return language._ZH_CLASSIFIERS[counted[2]] != counted[1]
        return bool(re.search(wrong, text))

    (right,) = [choice for choice in choices if not bad(choice)]
    return right


def minimal_pairs_en(prompt, choices):
    """By the words that differ: number, gender and form."""
    one, other = (choice.rstrip('.').split() for choice in choices)
    (at,) = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]

    def right(words):
        word, before = words[at], words[:at]
        if 'ever' in words:
            return word == 'No'
        if word in language._GENDER.values():
            return language._GENDER[before[0]] == word
        if {'has', 'have'} & set(before):
            return word in language._PARTICIPLES
        if {'this', 'that', 'these', 'those'} & set(before):
            plural = bool({'these', 'those'} & set(before))
            return plural == (word in language._THINGS.values())
        plural = before[1] in language._PEOPLE.values()
        return plural == (word in language._VERBS)

    (found,) = [words for words in (one, other) if right(words)]
    return ' '.join(found) + '.'


SOLVERS = {
    **dict(star_graph=star_graph, induction=induction, needle=needle, polynomial=polynomial),
    **dict(same_function=same_function, minimal_pairs_python=minimal_pairs_python),
    **dict(minimal_pairs_zh=minimal_pairs_zh, minimal_pairs_en=minimal_pairs_en),
}


@pytest.mark.parametrize('name', sorted(SOLVERS))
def test_an_exact_solver_is_always_right(made, name):
    every = [one for split in splits.NAMES for one in made[name][split]]
    assert len(every) > N
    for one in every:
        found = SOLVERS[name](one.prompt.removesuffix(',').removesuffix('='), one.choices)
        assert found == one.answer, one


def test_a_reversal_is_known_from_what_was_told_the_other_way_round():
    trained = [one for split, one in language.reversal() if split == 'train']
    facts = {one.prompt.removesuffix(' is'): one.answer for one in trained if not one.choices}
    assert len(facts) > 390
    told = {description.removeprefix(' the '): person for person, description in facts.items()}
    assert len(told) == len(facts)
    asked = [one for split, one in language.reversal() if split == 'test']
    assert len(asked) > 150
    for one in asked:
        person = told[one.prompt.removeprefix('The ').removesuffix(' is')]
        assert f' {person}' == one.answer and one.answer in one.choices
    # Who is asked about is told of the other way round alone, and half are told of both ways.
    both = {one.answer.strip() for one in trained if one.choices}
    assert not both & {one.answer.strip() for one in asked}
    assert 0.4 < len(both) / len(facts) < 0.6
    # The control asks about the same people, word for word what training told.
    control = [one for split, one in language.told() if split == 'test']
    assert [one.prompt.removesuffix(' is') for one in control] == [
        one.answer.strip() for one in asked
    ]
    assert {one.text for one in control} <= {one.text for one in trained}


def test_tasks_of_the_installation_are_right_by_their_modules(made):
    held = [one for split in ('validation', 'test') for one in made['docstring_fits'][split]]
    of_module = {
        f'{module}:{record["module"]}': record for module, record in python_code._documented()
    }
    for one in held:
        record = of_module[one.key]
        assert record['docstring'].strip().startswith(one.answer.removeprefix(' '))
        assert record['body'].rstrip() in one.prompt
        assert splits.by_hash(one.key.partition(':')[0]) != 'train'
    every = {
        name: {
            split: {x.answer.strip() for of, x in task() if of == split} for split in splits.NAMES
        }
        for name, task in (
            ('order_sensitivity', python_code.order_sensitivity),
            ('docstring_fits', python_code.docstring_fits),
            ('minimal_pairs_python', python_code.minimal_pairs_python),
        )
    }
    for of_split in every.values():  # some stand in several modules
        assert not of_split['train'] & (of_split['validation'] | of_split['test'])
    for one in made['minimal_pairs_python']['test']:
        assert all(choice.endswith('\n') for choice in one.choices)
        assert not one.choices[0].startswith(one.choices[1])
    for one in made['order_sensitivity']['test']:
        assert len({' '.join(sorted(choice.split())) for choice in one.choices}) == 1
        assert one.answer in ' '.join(of_module[one.key]['text'].split())
    for one in made['cloze']['train']:
        assert one.answer.strip() in one.prompt  # as LAMBADA's, it can be found in the passage
        assert all(choice.strip() in one.prompt for choice in one.choices)
        assert one.text.startswith(one.prompt + one.answer)


GUESSES = {
    'first': lambda choices: 0,
    'longest': lambda choices: max(range(len(choices)), key=lambda i: len(choices[i])),
    'alphabet': lambda choices: min(range(len(choices)), key=choices.__getitem__),
}


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'polynomial'])
def test_who_does_not_read_is_right_by_chance(made, name):
    every = [one for split in splits.NAMES for one in made[name][split] if one.choices]
    chance = synthetic.TASKS[name].chance
    assert {len(one.choices) for one in every} == {round(1 / chance)}
    sigma = np.sqrt(chance * (1 - chance) / len(every))
    for guess, choose in GUESSES.items():
        if name.startswith('minimal') and guess == 'alphabet':
            continue  # it reads the words that differ
        right = np.mean([one.choices[choose(one.choices)] == one.answer for one in every])
        assert abs(right - chance) < 4 * sigma, guess


def test_the_documented_chance_is_that_of_the_task():
    page = (Path(__file__).parents[2] / 'docs' / 'tasks.md').read_text('utf-8')
    rows = dict(re.findall(r'^\| `(\w+)` \|.*\| ([\d/]+) \|$', page, re.MULTILINE))
    documented = {name: float(Fraction(rows[name])) for name in synthetic.TASKS}
    chance = {name: task.chance for name, task in synthetic.TASKS.items()}
    assert documented == pytest.approx(chance, abs=1e-4)


@pytest.mark.parametrize('name', ['star_graph', 'polynomial', 'minimal_pairs_zh', 'reversal'])
def test_a_task_is_asked_by_name(name, monkeypatch):
    for what in ('N_TEST', 'N_TRAIN'):
        monkeypatch.setattr(ready, what, 20)
    loaded = task.load(ready.made(name))
    test = list(synthetic.examples(name, 'test', ready.N_TEST))
    assert [item.prompt for item in loaded.items[: len(test)]] == [one.prompt for one in test]
    assert [item.answers[0] for item in loaded.items[: len(test)]] == [one.answer for one in test]
    assert loaded.task.kind == ('text' if name == 'polynomial' else 'choices')
    assert loaded.task.between == '' and isinstance(loaded.train[0], Item)
    assert not {item.prompt + item.answers[0] for item in loaded.train} & {
        one.prompt + one.answer for one in test
    }


def test_a_task_is_a_data_set_to_train_on(monkeypatch):
    monkeypatch.setattr(builder, 'SIZES', {'train': 30, 'validation': 5, 'test': 5})
    data = DataConfig(sources=(Source('synthetic/star_graph'),))
    for split, n in (('train', 30), ('validation', 5)):
        (documents,) = sources.open_sources(data, split).sources
        expected = synthetic.examples('star_graph', split, n)
        assert [documents[i] for i in range(len(documents))] == [one.text for one in expected]
    with pytest.raises(Exception, match='synthetic/ has minimal_pairs_python'):
        sources.open_sources(DataConfig(sources=(Source('synthetic/nothing'),)), 'train')
