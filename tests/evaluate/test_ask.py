"""Tasks put to a tiny model, against plain loops over the same texts."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluate import ask, task
from llama_jax.evaluate.subject import Subject
from llama_jax.evaluate.windows import windows
from llama_jax.generate.continuations import Request
from llama_jax.generate.generator import Generator
from llama_jax.generate.programs import Programs
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.text.chat import FORMATS, Conversation
from tests.evaluate.conftest import COMPUTE, MODEL

CONFIG = replace(MODEL, context=256)
WORDS = ['red', 'green', 'blue', 'grey', '红色', '蓝色']


@pytest.fixture(scope='module')
def subject(tokenizer):
    mesh = make(MeshConfig(), jax.devices()[:1])
    params = layers.create(CONFIG, jax.random.key(0), mesh)
    # Of random weights all is as likely as all else: a larger head makes a difference.
    params['head_VD' if 'head_VD' in params else 'embed_VD'] *= 8
    programs = Programs(
        CONFIG, params, mesh=mesh, compute=COMPUTE, end_ids=(tokenizer.eos_id,), pad_id=0
    )
    return Subject('tiny', programs, tokenizer, (tokenizer.bos_id,))


def written(path, items):
    path.write_text(''.join(json.dumps(item) + '\n' for item in items))


def loaded(tmp_path, test, train=(), **settings):
    written(tmp_path / 'test.jsonl', test)
    settings = {'test': 'test.jsonl', **settings}
    if train:
        written(tmp_path / 'train.jsonl', train)
        settings['train'] = 'train.jsonl'
    text = ''.join(f'{key} = {json.dumps(x)}\n' for key, x in settings.items())
    (tmp_path / 'colours.toml').write_text(text)
    return task.load(tmp_path / 'colours.toml')


def log_p(subject, context, continuation):
    """Of one text by itself."""
    (scored,) = subject.score([subject.pair(context, continuation)], shared=False)
    return scored.total


@pytest.mark.slow
def test_choices_by_every_norm(tmp_path, subject):
    items = [{'text': f'colour {i}', 'label': WORDS[i % 3]} for i in range(7)]
    choices = WORDS[:2] + WORDS[2:3] + WORDS[4:5]
    one = loaded(
        tmp_path,
        items,
        [{'text': f'shade {i}', 'label': WORDS[i % 3]} for i in range(9)],
        prompt='{{text}} is\nAnswer:',
        target='label',
        choices=choices,
        shots=2,
        shot_seeds=2,
    )
    found = ask.ask(subject, one)
    assert found.scores['acc'].shape == (2, 7)
    for seed, (shots, drawn) in enumerate(ask.shots_of(one, 0)):
        assert len({item.line for item in drawn}) == 2
        assert shots.count('\n\n') == 2 and shots.startswith(drawn[0].prompt)
        free = [
            np.exp([log_p(subject, f'{shots}{x} is\nAnswer:', f' {c}') for c in choices])
            for x in ('N/A', '', '[MASK]')
        ]
        prior = np.log(np.mean([p / p.sum() for p in free], axis=0))
        for i, item in enumerate(one.items):
            example = found.examples[seed * 7 + i]
            ll = np.array([log_p(subject, shots + item.prompt, f' {c}') for c in choices])
            alone = [log_p(subject, '', f' {c}') for c in choices]
            domain = [log_p(subject, 'Answer:', f' {c}') for c in choices]
            expected = {
                'acc': ll,
                'acc_chars': ll / [len(c) for c in choices],
                'acc_bytes': ll / [len(c.encode()) for c in choices],
                'acc_alone': ll - alone,
                'acc_domain': ll - domain,
                'acc_calibrated': ll - prior,
            }
            assert example['prompt'] == shots + item.prompt and example['shot_seed'] == seed
            np.testing.assert_allclose(example['log_p'], ll, atol=1e-3)
            for name, x in expected.items():
                assert example['chosen'][name] == int(np.argmax(x)), name
                right = float(np.argmax(x) == item.gold)
                assert example['scores'][name] == found.scores[name][seed, i] == right
    result = found.result()
    assert result['metrics']['acc']['value'] == found.scores['acc'].mean()
    chosen = [choices[e['chosen']['acc']] for e in found.examples]
    n = sum(row['n'] for row in result['report']['classes'].values())
    assert n == 14 and result['domain'] == 'Answer:'
    recall = result['report']['classes']['red']['recall']
    red = [c == 'red' for c, e in zip(chosen, found.examples, strict=True) if e['gold'] == 0]
    assert recall == pytest.approx(np.mean(red))
    # Read one by one the same comes out, and against itself there is no difference.
    other = ask.ask(subject, one, shared=False)
    assert other.scores['acc'].tolist() == found.scores['acc'].tolist()
    assert found.against(other)['acc']['high'] == 0.0


def test_shots_differ_by_seed_and_not_by_item(tmp_path, subject):
    train = [{'prompt': f'p{i}', 'answer': 'yes'} for i in range(50)]
    one = loaded(tmp_path, train[:2], train, kind='text', shots=4, shot_seeds=3)
    texts = [shots for shots, _ in ask.shots_of(one, 0)]
    assert len(set(texts)) == 3
    assert texts == [shots for shots, _ in ask.shots_of(one, 0)]
    assert texts != [shots for shots, _ in ask.shots_of(one, 1)]
    assert len(ask.shots_of(replace(one, task=replace(one.task, shots=0)), 0)) == 1


@pytest.mark.slow
def test_text_is_what_greedy_decoding_writes(tmp_path, subject):
    """By the engine, and by batches, as on a mesh of several replicas, which cannot stop early."""
    items = [{'prompt': f'def f{i}', 'answer': ['x', '(']} for i in range(3)]
    one = loaded(tmp_path, items, kind='text', max_tokens=8, until=['M', 'e'])
    found = ask.ask(subject, one)
    prompts = [subject.encode(item.prompt) for item in one.items]
    completions = Generator.of(subject.programs)(prompts, max_tokens=8)
    controls = ask.Controls(max_tokens=8, temperature=0.0, stop=('M', 'e'))
    batches = subject._in_batches([(prompt, controls) for prompt in prompts], lambda n: None)
    cut = 0
    for prompt, completion, batch, example in zip(
        prompts, completions, batches, found.examples, strict=True
    ):
        (scored,) = subject.score([ask.Request(prompt, completion.tokens)])
        assert scored.greedy.all() and len(completion.tokens) == 8
        whole = subject.vocabulary.decode(completion.tokens)
        text = min((whole.partition(stop)[0] for stop in 'Me'), key=len)
        cut += text != whole
        assert example['written'] == batch.text
        # Of a character that never became whole nothing is written.
        assert batch.text.rstrip('\ufffd') == text.rstrip('\ufffd')
        assert example['ended'] == batch.reason == ('stop' if text != whole else 'length')
        assert set(example['scores']) == set(found.scores)
    assert cut


@pytest.mark.parametrize('stride', [0, 5, 16])
def test_whole_texts_score_each_token_once(tmp_path, subject, stride):
    texts = ['a text of some words, ' * 9, '短文', 'x']
    one = loaded(
        tmp_path,
        [{'text': text} for text in texts],
        kind='perplexity',
        window=16,
        stride=stride,
    )
    found = ask.ask(subject, one)
    nats = []
    for text in texts:
        ids = [subject.begin[0], *subject.encode(text, begin=False)]
        total = 0.0
        for j in range(1, len(ids)):
            # The place of a token in its window: of the first 16 by themselves, then by strides.
            step = stride or 16
            end = j if j <= 16 else min(len(ids) - 1, 16 + -(-(j - 16) // step) * step)
            context = ids[max(0, end - 16) : j] if j > 16 else ids[:j]
            total -= log_p_of_one(subject, context, ids[j])
        nats.append(total)
    assert found.examples[0]['tokens'] == len(subject.encode(texts[0], begin=False))
    per_byte = [example['scores']['bits_per_byte'] for example in found.examples]
    expected = [n / np.log(2) / len(t.encode()) for n, t in zip(nats, texts, strict=True)]
    np.testing.assert_allclose(per_byte, expected, rtol=1e-4)
    result = found.result()
    n_bytes = sum(len(text.encode()) for text in texts)
    value = result['metrics']['bits_per_byte']['value']
    assert value == pytest.approx(sum(nats) / np.log(2) / n_bytes, rel=1e-4)
    assert result['perplexity'] == pytest.approx(np.exp(sum(nats) / result['tokens']), rel=1e-3)
    assert (result['window'], result['stride']) == (16, stride or 16)


def log_p_of_one(subject, context, token):
    (scored,) = subject.score([ask.Request(context, [token])])
    return scored.total


def test_windows_of_lm_eval():
    """The example of lm-eval's documentation: a context of 4, ten tokens."""
    found = [
        ([*r.context, *r.continuation][:-1], list(r.continuation))
        for r in windows(range(10), [99], window=4)
    ]
    assert found == [
        ([99, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    assert list(windows([], [99], window=4)) == []


@pytest.mark.parametrize('prompts', [{}, {'query': 'asked: ', 'document': 'there is: '}])
def test_retrieval(tmp_path, subject, prompts):
    subject = replace(subject, prompts=prompts)
    items = [
        {'query': f'{word} thing number {i}', 'document': f'{word} thing {i}'}
        for i, word in enumerate(WORDS * 2)
    ]
    # One document, of several questions: nobody is behind it more than once.
    items += [{'query': f'red {x}', 'document': items[0]['document']} for x in ('again', 'too')]
    found = ask.ask(subject, loaded(tmp_path, items, kind='retrieval'))
    q_ND, d_ND = (
        subject.vectors([prompts.get(key, '') + item[key] for item in items])
        for key in ('query', 'document')
    )
    for i, example in enumerate(found.examples):
        own = q_ND[i] @ d_ND[i]
        others = {
            item['document']: q_ND[i] @ d_ND[j]
            for j, item in enumerate(items)
            if item['document'] != items[i]['document']
        }
        assert example['rank'] == sum(x >= own - 1e-7 for x in others.values())
        assert example['scores']['mrr'] == 1 / (1 + example['rank'])
        assert example['scores']['recall_5'] == float(example['rank'] < 5)
    assert found.result()['documents'] == len({item['document'] for item in items})


def test_what_is_too_long_is_counted_and_named(tmp_path, subject):
    items = [{'prompt': 'word ' * n, 'choices': ['a', 'b'], 'answer': 0} for n in (3, 400, 500)]
    with pytest.raises(UserError, match='2 of 3 prompts .* 256 .* of line 2: .*--truncate'):
        ask.ask(subject, loaded(tmp_path, items))
    found = ask.ask(subject, loaded(tmp_path, items), truncate=True)
    assert found.result()['truncated'] == 2
    # What is left over is the end of it.
    request = subject.pair(items[1]['prompt'], ' a')
    (scored,) = subject.score([ask.Request(request.context[-256:], request.continuation)])
    assert found.examples[1]['log_p'][0] == pytest.approx(scored.total, abs=1e-3)
    with pytest.raises(UserError, match='max_tokens 300 leave no room'):
        text = [{'prompt': 'x', 'answer': 'y'}]
        ask.ask(subject, loaded(tmp_path, text, kind='text', max_tokens=300))


def test_a_task_in_chats(tmp_path, subject):
    """Shots are turns, the description is the system message; scores and texts are those of the
    chats written here."""
    chat, vocabulary = FORMATS['llama2'], subject.vocabulary
    talking = replace(subject, chat=chat, _made={})
    items = [{'text': f'colour {i}', 'label': WORDS[i % 2]} for i in range(3)]
    settings = {'chat': True, 'prompt': 'Which? {{text}}', 'description': 'Name it.'}
    settings |= {'target': 'label', 'shots': 1, 'shot_seeds': 1}
    one = loaded(tmp_path, items, items[:1] * 2, **settings, choices=WORDS[:3])
    found = ask.ask(talking, one)
    for item, example in zip(items, found.examples, strict=True):
        messages = [{'role': 'system', 'content': 'Name it.'}]
        for asked, answer in (('colour 0', WORDS[0]), (item['text'], None)):
            messages.append({'role': 'user', 'content': f'Which? {asked}'})
            messages += [{'role': 'assistant', 'content': answer}] if answer else []
        ids = chat.encode(Conversation(messages), vocabulary, begin=subject.begin)
        wanted = [
            talking.score([Request(ids, vocabulary.encode(word).tolist())], shared=False)[0].total
            for word in WORDS[:3]
        ]
        np.testing.assert_allclose(example['log_p'], wanted, atol=1e-4)
    assert set(found.scores) == {'acc', 'acc_chars', 'acc_bytes', 'acc_alone'}
    with pytest.raises(UserError, match='tiny has no chat format: leave chat out'):
        ask.ask(subject, one)
    for setting in ({'between': ''}, {'domain': 'x'}):
        with pytest.raises(UserError, match='has no effect on a chat'):
            loaded(tmp_path, items, items[:1] * 2, **settings, **setting, choices=WORDS[:3])
    with pytest.raises(UserError, match="chat is 'yes', it must be true or false"):
        loaded(tmp_path, items, **{**settings, 'chat': 'yes'})
