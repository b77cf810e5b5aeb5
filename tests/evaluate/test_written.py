"""Scores of what a model writes, against hand cases and scikit-learn."""

import pytest
from sklearn.metrics import classification_report

from llama_jax.evaluate import written


@pytest.mark.parametrize(
    ('text', 'answers', 'exact', 'f1'),
    [
        ('The Eiffel Tower!', ['eiffel tower'], 1, 1),
        ('Ｐａｒｉｓ', ['paris'], 1, 1),  # full width
        ('in Paris, France', ['Lyon', 'Paris'], 0, 0.5),  # the better answer
        ('首都是巴黎。', ['巴黎'], 0, 4 / 7),  # by characters
        ('Ответ: Москва', ['москва'], 0, 2 / 3),
        ('red red', ['red'], 0, 2 / 3),  # each word as often as it is there
        ('', ['x'], 0, 0),
        ('...', ['...'], 1, 1),
    ],
)
def test_exact_and_f1(text, answers, exact, f1):
    found = written.scores(text, answers)
    assert (found['exact'], found['f1']) == (exact, pytest.approx(f1))


def test_rouge_and_chrf_of_their_libraries():
    found = written.scores('the cat sat on the mat', ['the cat lay on the mat'])
    assert found['rouge1'] == pytest.approx(5 / 6)
    assert found['rouge2'] == pytest.approx(3 / 5)
    assert found['rougeL'] == pytest.approx(5 / 6)
    import sacrebleu

    expected = sacrebleu.sentence_chrf('the cat sat on the mat', ['the cat lay on the mat']).score
    assert found['chrf'] == pytest.approx(expected / 100)


def test_rouge_reads_every_script():
    """The library's own words are of a to z and digits alone: Chinese would always score 0."""
    assert written.scores('天下大势', ['天下大勢'])['rouge1'] == pytest.approx(3 / 4)
    assert written.scores('Москва река', ['москва'])['rouge1'] == pytest.approx(2 / 3)


def test_report_equals_scikit_learn():
    gold = ['a', 'b', 'b', 'c', 'a', 'b', 'c', 'c']
    chosen = ['a', 'b', 'c', 'c', 'b', 'b', 'c', 'a']
    labels = ['a', 'b', 'c', 'never']
    found = written.report(gold, chosen, labels)
    theirs = classification_report(gold, chosen, labels=labels, output_dict=True, zero_division=0.0)
    for label in labels:
        one = theirs[label]
        assert found['classes'][label] == {
            'precision': one['precision'],
            'recall': one['recall'],
            'f1': one['f1-score'],
            'n': one['support'],
        }
    macro = theirs['macro avg']
    assert found['macro'] == pytest.approx(
        {'precision': macro['precision'], 'recall': macro['recall'], 'f1': macro['f1-score']}
    )


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        ('1,000', '1000'),
        ('$5', '5'),
        ('U.S.', 'US'),
        ("don't", 'dont'),
        ('the C++', 'c'),
        ('<unk>', 'unk'),
        ('state-of-the-art', 'stateoftheart'),
        ('Ａ１，你好', 'a1你好'),
    ],
)
def test_exact_is_that_of_squad(text, answer):
    """As its script has it, which deletes ASCII punctuation and then drops articles."""
    assert written.scores(text, [answer])['exact'] == 1
    assert written.scores('A-ha', ['ha'])['exact'] == 0
