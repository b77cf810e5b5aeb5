"""Rewards: what they give, and what is said where they do not."""

import math

import numpy as np
import pytest

from llama_jax.data.record import Problem
from llama_jax.errors import UserError
from llama_jax.objectives.rollout import Rollout
from llama_jax.train.rewards import BUILT_IN, judge

CHAT = ({'role': 'user', 'content': 'write a function'},)


@pytest.mark.parametrize(
    ('completion', 'answer', 'right'),
    [
        ('so 42', '42', True),
        ('6 x 7 = 42.0 dollars', '#### 42', True),
        ('#### 1,234 (of 5)', '1234', True),
        ('42 #### 41', '42', False),
        ('#### 7\n#### 8', '8', True),  # it corrected itself
        ('####', '0', False),
        (r'42, no \boxed{-7}', '-7', True),
        (r'\boxed{\frac{1}{2}}', '2', False),  # no number
        (r'\boxed{12', '12', True),  # cut off: the last number of the text
        ('\N{MINUS SIGN}5', '-5', True),
        ('.50', '0.5', True),
        ('1e400', '1e400', True),
        ('9' * 5000, '9' * 5000, True),
        ('1e99999999999999999999', '1', False),
        ('', '42', False),
        ('none', 'none', False),  # no number is none's equal
    ],
)
def test_number(completion, answer, right):
    assert BUILT_IN['number'](completion, Problem('', answer)) == right


@pytest.mark.parametrize(
    ('prompt', 'completion', 'right'),
    [
        ('def f(x):\n', '    return x\n', True),
        ('def f(x):\n', 'return x\n', False),
        ('x = 1\n', '', False),  # it parses, and nothing was written
        ('x = ', '\x00', False),
        ('x = ', '(' * 5000, False),
        ('x = ', "'\\d'", True),  # a warning of the parser is no matter of ours
        (CHAT, 'Here:\n```python\nx = 1\n```\nDone!', True),
        (CHAT, 'x = 1', True),
        (CHAT, 'Sure, I can.', False),
    ],
)
def test_python(prompt, completion, right):
    assert BUILT_IN['python'](completion, Problem(prompt, '')) == right


def test_others():
    given = {
        name: function(' 4a ', Problem('', answer))
        for name, function, answer in (
            ('answer', BUILT_IN['answer'], '4a\n'),
            ('contains', BUILT_IN['contains'], 'a'),
            ('regex', BUILT_IN['regex'], r'\d.'),
            ('brief', BUILT_IN['brief'], ''),
        )
    }
    assert given == {'answer': 1, 'contains': 1, 'regex': 1, 'brief': -0.004}
    assert BUILT_IN['regex']('4ab', Problem('', r'\d.')) == 0
    assert BUILT_IN['answer']('4', Problem('', '4a')) == 0
    assert BUILT_IN['contains']('4', Problem('', 'a')) == 0


@pytest.fixture
def own(tmp_path):
    """The name of a reward in a file of one's own, by what it returns."""

    def make(body):
        path = tmp_path / 'own.py'
        path.write_text(f'import math\ndef mine(completion, problem):\n    {body}\n')
        return f'{path}:mine'

    return make


def test_sum_of_rewards(own):
    name = own("return len(completion) + problem.fields['more']")
    judged = judge(Rollout(rewards=('answer', name), weights=(2.0, 0.5)))
    given = judged('42', Problem('', '42', {'more': 3}), 'line 1')
    assert given == {'answer': 1.0, name: 5.0} and judged.total(given) == 2 + 2.5
    assert judge(Rollout(rewards=(name,))).total({name: 5.0}) == 5.0


@pytest.mark.parametrize(
    ('value', 'right'),
    [('True', 1.0), ('2', 2.0), ('__import__("numpy").float32(0.5)', 0.5)]
    + [('__import__("numpy").array(3)', 3.0)],
)
def test_numbers_of_any_kind(own, value, right):
    name = own(f'return {value}')
    given = judge(Rollout(rewards=(name,)))('', Problem('', ''), '')
    assert given == {name: right} and type(given[name]) is float


@pytest.mark.parametrize(
    ('body', 'match'),
    [
        ('return math.nan', 'returned nan, which is no finite number'),
        ('return math.inf', 'returned inf'),
        ('return None', 'returned None, which is no number'),
        ("return '1'", "returned '1'"),
        ('return [1.0]', r'returned \[1.0\]'),
        ('return 1j', 'returned 1j'),
        ('return __import__("numpy").zeros(2)', r'returned array\(\[0., 0.\]\)'),
        ('raise KeyError("solution")', "raised KeyError: 'solution'"),
        ('assert completion == "a\\nb"', 'raised AssertionError'),
    ],
)
def test_what_is_no_reward_is_named(own, body, match):
    name = own(body)
    completion, problem = 'several\nlines', Problem('', '42')
    with pytest.raises(UserError, match=match) as failure:
        judge(Rollout(rewards=('answer', name)))(completion, problem, 'p.jsonl line 7')
    said = str(failure.value)
    assert '\n' not in said and name in said and 'p.jsonl line 7' in said
    assert "'several lines'" in said and "'42'" in said and 'rollout.failed skip' in said

    judged = judge(Rollout(rewards=('answer', name), failed='skip'))
    given = judged('42', problem, '')
    assert given['answer'] == 1 and math.isnan(given[name]) and np.isnan(judged.total(given))


@pytest.mark.parametrize(
    ('name', 'match'),
    [
        ('anwser', 'there is no reward .anwser.: there are answer, number'),
        ('gone.py:f', 'there is no file gone.py'),
        ('{own}:f', r'has no function f \(there: mine\)'),
        ('{own}', 'path/to/file.py:function'),
        ('{broken}:f', 'fails with ZeroDivisionError'),
    ],
)
def test_rewards_that_are_not_there(own, tmp_path, name, match):
    (tmp_path / 'broken.py').write_text('1 / 0')
    name = name.format(own=own('return 1').partition(':')[0], broken=tmp_path / 'broken.py')
    with pytest.raises(UserError, match=match):
        judge(Rollout(rewards=(name,)))


@pytest.mark.parametrize('weight', [0.0, math.nan])
def test_weights_that_are_none(weight):
    with pytest.raises(UserError, match='weight'):
        judge(Rollout(weights=(weight,)))
