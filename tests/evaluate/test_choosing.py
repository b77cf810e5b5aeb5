"""Tasks within a suite: the likeliest choice, for whoever gives a text a likelihood."""

import numpy as np
import pytest

from llama_jax.data import synthetic
from llama_jax.data.synthetic import Made
from llama_jax.errors import UserError
from llama_jax.evaluate import choosing
from llama_jax.evaluate.likelihood import Answer
from llama_jax.evaluate.scores import Scores
from llama_jax.objectives.asked import LEFT_TO_RIGHT, NOTHING
from llama_jax.objectives.masked import MaskedLM


class Letters:
    """A token for each character; no space is put in front of a text that goes on."""

    bos_id, mask_id, pad_id = 1, 2, 0
    byte_lengths = np.ones(200, np.int32)
    dummy_prefix = False

    def encode(self, text, continues=False):
        return np.array([ord(c) for c in text], np.int32)


MADE = [
    Made('one', 'ab', ' x', (' x', ' y', ' zz')),
    Made('two', 'cd', ' y', (' x', ' y', ' zz')),
    Made('three', 'ef', ' zz', (' x', ' y', ' zz')),
]


@pytest.fixture
def named(monkeypatch):
    def make(made):
        # Choices of a run see validation: nothing of it is asked.
        of_split = {'validation': made[:1], 'test': made}
        monkeypatch.setattr(synthetic, 'examples', lambda name, split, n: of_split[split][:n])
        return choosing.asked('tiny', Letters(), n=9, longest=20)

    return make


def answered(rule):
    """Log-probabilities of the characters of a middle by `rule`."""

    def ask(question, texts, items):
        examples, owner, log_p = [], [], []
        for number, text in enumerate(texts):
            made = question.examples(text, Letters(), np.random.default_rng(0))
            examples += made
            owner += [number] * len(made)
            for example in made:
                at = np.flatnonzero(example['weights'])
                log_p.append([rule(chr(example['targets'][i])) for i in at])
        P = max(map(len, log_p))
        padded = np.array([[*row, *[0.0] * (P - len(row))] for row in log_p])
        chosen = np.full(padded.shape, ord('4'))
        return Answer(examples, np.array(owner), Scores(padded, chosen, padded, padded))

    return ask


@pytest.mark.parametrize('reading', [LEFT_TO_RIGHT, MaskedLM().reading], ids=['causal', 'masked'])
def test_the_likeliest_choice_is_taken_and_equal_ones_share_the_point(named, reading):
    task = named(MADE)
    assert task.owner_K.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert task.documents == ['one', 'two', 'three'] and len(set(task.ids)) == 3
    x_best = answered(lambda c: {'x': -1.0, ' ': 0.0}.get(c, -2.0))
    assert named([one._replace(group='m') for one in MADE]).documents == ['m'] * 3
    right_N, by = choosing.right(task, reading, Letters(), x_best)
    assert right_N.tolist() == [1, 0, 0]
    assert by == ('exact' if reading is LEFT_TO_RIGHT else 'pseudo')
    x_or_y = answered(lambda c: -1.0 if c in 'xyz' else 0.0)  # zz costs 2
    assert choosing.right(task, reading, Letters(), x_or_y)[0].tolist() == [0.5, 0.5, 0]


def test_texts_without_a_prompt_are_asked_from_their_beginning(named):
    task = named([one._replace(prompt='', choices=('x', 'yy'), answer='x') for one in MADE])
    seen = []

    def ask(question, texts, items):
        seen.append((question, texts[0].prefix.tolist(), items))
        return answered(lambda c: -1.0)(question, texts, items)

    assert choosing.right(task, LEFT_TO_RIGHT, Letters(), ask)[0].tolist() == [1, 1, 1]
    # Choices of one item are hidden alike.
    assert seen == [(LEFT_TO_RIGHT.whole, [1], [0, 0, 1, 1, 2, 2])]
    assert choosing.right(task, NOTHING, Letters(), ask) is None


def test_an_answer_without_choices_has_to_be_the_most_likely_text(named):
    answers = ('44', '4', '45')
    made = [one._replace(choices=(), answer=x) for one, x in zip(MADE, answers, strict=True)]
    task = named(made)
    assert task.written and len(task.texts) == 3
    found, by = choosing.right(task, LEFT_TO_RIGHT, Letters(), answered(lambda c: -1.0))
    assert found.tolist() == [1, 1, 0] and by == 'exact'
    assert choosing.right(task, MaskedLM().reading, Letters(), answered(lambda c: -1.0)) is None


def test_what_does_not_fit_is_refused_in_one_line(named):
    with pytest.raises(UserError, match='the task tiny has prompts of 34 tokens, and 20 fit'):
        named([MADE[0]._replace(prompt='a' * 31), *MADE[1:]])
