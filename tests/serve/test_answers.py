"""What comes back: whole and streamed, with log-probabilities, echo, several choices, usage."""

import base64

import numpy as np
import pytest

from llama_jax.generate.finite import NotFiniteError
from tests.serve import fake
from tests.serve.asgi import get, post
from tests.serve.fake import says

COMPLETIONS, CHAT = '/v1/completions', '/v1/chat/completions'
TEXT = '你好，世界 🙂👩‍👩‍👧 naïve\n"quoted" \\ done'
HELLO = [{'role': 'user', 'content': 'hi'}]


def ask(path, **body):
    return {**({'prompt': 'ab'} if path == COMPLETIONS else {'messages': HELLO}), **body}


def text_of(choice):
    if 'delta' in choice:
        return choice['delta'].get('content', '')
    return choice['message']['content'] if 'message' in choice else choice['text']


def joined(events, index=0):
    choices = [c for event in events for c in event['choices'] if c['index'] == index]
    return ''.join(map(text_of, choices))


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
def test_whole(app, path):
    answer = post(app(script=says(TEXT)), path, ask(path, max_tokens=100))
    assert answer.status == 200 and answer.headers['content-type'] == 'application/json'
    told = answer.json()
    (choice,) = told['choices']
    assert text_of(choice) == TEXT
    assert choice['finish_reason'] == 'stop' and choice['logprobs'] is None
    assert told['model'] == fake.MODEL and told['created'] > 1.7e9
    usage = told['usage']
    assert usage['completion_tokens'] == len(TEXT.encode())
    assert usage['total_tokens'] == usage['prompt_tokens'] + usage['completion_tokens']
    kinds = {COMPLETIONS: ('text_completion', 'cmpl-'), CHAT: ('chat.completion', 'chatcmpl-')}
    assert told['object'] == kinds[path][0] and told['id'].startswith(kinds[path][1])


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
def test_stream_never_breaks_a_character(app, path):
    # One token is one byte: each character arrives in up to four of them.
    answer = post(app(script=says(TEXT)), path, ask(path, max_tokens=100, stream=True))
    assert answer.headers['content-type'].startswith('text/event-stream')
    assert 'content-length' not in answer.headers
    events = answer.events
    assert joined(events) == TEXT
    pieces = [text_of(event['choices'][0]) for event in events]
    assert not any('\ufffd' in piece for piece in pieces)
    assert {'你', '🙂'} <= set(pieces), 'a character is out as soon as it is there'
    assert [event['choices'][0]['finish_reason'] for event in events][-1] == 'stop'
    assert len({event['id'] for event in events}) == 1 and 'usage' not in events[0]


def test_a_chat_stream_begins_with_the_role(app):
    events = post(app(script=says('x')), CHAT, ask(CHAT, stream=True)).events
    assert events[0]['choices'][0]['delta'] == {'role': 'assistant', 'content': ''}
    assert events[0]['object'] == 'chat.completion.chunk'
    assert events[-1]['choices'][0]['delta'] == {}


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
def test_usage_of_a_stream(app, path):
    body = ask(path, stream=True, max_tokens=5, stream_options={'include_usage': True})
    *events, last = post(app(), path, body).events
    assert last['choices'] == [] and last['usage']['completion_tokens'] == 5
    assert all(event['usage'] is None for event in events)


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
@pytest.mark.parametrize('stream', [False, True])
def test_stop_string_and_length(app, path, stream):
    for body, text, reason in (
        ({'stop': ['XY', 'zz'], 'max_tokens': 50}, 'one X ', 'stop'),
        ({'max_tokens': 3}, 'one', 'length'),
    ):
        made = app(script=says('one X XY two'))
        answer = post(made, path, ask(path, stream=stream, **body))
        choices = [c for e in answer.events for c in e['choices']] if stream else []
        choices = choices or answer.json()['choices']
        assert ''.join(map(text_of, choices)) == text
        assert choices[-1]['finish_reason'] == reason


def test_several_prompts_and_samples(app):
    made = app(length=128, script=lambda r: [*f'{r.controls.seed}'.encode(), fake.EOS])
    body = {'prompt': ['a', 'b'], 'n': 2, 'seed': 5, 'max_tokens': 4}
    told = post(made, COMPLETIONS, body).json()
    assert [(c['index'], c['text']) for c in told['choices']] == [
        (0, '5'),
        (1, '6'),
        (2, '5'),
        (3, '6'),
    ]
    # Two prompts of two tokens (bos is one), each read for two choices, count once.
    assert told['usage']['prompt_tokens'] == 4 and told['usage']['completion_tokens'] == 4
    events = post(made, COMPLETIONS, {**body, 'stream': True}).events
    assert [joined(events, i) for i in range(4)] == ['5', '6', '5', '6']


def test_logprobs_of_a_completion(app):
    body = {'prompt': 'p', 'logprobs': 2, 'max_tokens': 20}
    told = post(app(script=says('é你x')), COMPLETIONS, body).json()['choices'][0]
    logprobs = told['logprobs']
    assert told['text'] == 'é你x'
    assert logprobs['tokens'][:2] == [r'bytes:\xc3', r'bytes:\xa9']
    assert logprobs['tokens'][-2:] == ['x', '</s>'], 'what ended it is the last'
    assert logprobs['token_logprobs'] == [-0.25] * 7
    assert logprobs['text_offset'] == [0, 0, 1, 1, 1, 2, 3]
    assert logprobs['top_logprobs'][-2] == {'x': -0.25, 'A': -1.65}
    assert logprobs['top_logprobs'][-1] == {'</s>': -0.25, 'A': -1.65}
    events = post(app(script=says('é你x')), COMPLETIONS, {**body, 'stream': True}).events
    told = [e['choices'][0]['logprobs'] for e in events if e['choices'][0]['logprobs']]
    for name in ('tokens', 'token_logprobs', 'text_offset', 'top_logprobs'):
        assert sum((one[name] for one in told), []) == logprobs[name]


def test_logprobs_without_others(app):
    told = post(app(script=says('x')), COMPLETIONS, {'prompt': 'p', 'logprobs': 0}).json()
    logprobs = told['choices'][0]['logprobs']
    assert logprobs['token_logprobs'] == [-0.25] * 2 and logprobs['top_logprobs'] is None


def test_logprobs_of_a_chat(app):
    body = ask(CHAT, logprobs=True, top_logprobs=2, max_tokens=20)
    content = post(app(script=says('é')), CHAT, body).json()['choices'][0]['logprobs']['content']
    # A control token has a name and no bytes, as at OpenAI.
    assert [one['bytes'] for one in content] == [[0xC3], [0xA9], None]
    assert content[-1]['token'] == '</s>' and content[-1]['top_logprobs'][0]['token'] == '</s>'
    assert content[0]['token'] == r'bytes:\xc3' and content[0]['logprob'] == -0.25
    assert [one['token'] for one in content[0]['top_logprobs']] == [r'bytes:\xc3', 'A']
    events = post(app(script=says('é')), CHAT, {**body, 'stream': True}).events
    assert events[0]['choices'][0]['logprobs'] is None, 'there is no token yet'
    told = [e['choices'][0]['logprobs'] for e in events if e['choices'][0]['logprobs']]
    assert sum((one['content'] for one in told), []) == content


@pytest.mark.parametrize('prompt', ['né', [1, *'né'.encode()]])
def test_echo(app, prompt):
    text = 'né' if isinstance(prompt, str) else '\x01né'
    for more in ({}, {'logprobs': 1}):
        body = {'prompt': prompt, 'echo': True, 'max_tokens': 20, **more}
        whole = post(app(script=says('!')), COMPLETIONS, body).json()['choices'][0]
        events = post(app(script=says('!')), COMPLETIONS, {**body, 'stream': True}).events
        assert whole['text'] == joined(events) == text + '!'
    logprobs = whole['logprobs']
    # bos, or the 1, then the three bytes of the prompt, then what was drawn, and the end.
    assert logprobs['token_logprobs'] == [None, *[-0.25] * 5]
    assert logprobs['tokens'][0] == ('<s>' if isinstance(prompt, str) else '\x01')
    offsets = [0, 0, 1, 1, 2, 3] if isinstance(prompt, str) else [0, 1, 2, 2, 3, 4]
    assert logprobs['text_offset'] == offsets
    assert logprobs['top_logprobs'][0] is None


def test_scoring_alone(app):
    body = {'prompt': 'ab', 'echo': True, 'logprobs': 1, 'max_tokens': 0}
    for one in (body, {**body, 'logprobs': None}):
        told = post(app(), COMPLETIONS, one).json()
        (choice,) = told['choices']
        assert choice['text'] == 'ab' and choice['finish_reason'] == 'length'
        assert told['usage']['completion_tokens'] == 0
        assert one['logprobs'] is None or len(choice['logprobs']['tokens']) == 3


def test_a_score_of_lm_eval_has_one_token_more_than_its_prompt(app):
    """lm-eval sums the entries behind its context, but for the last: that of the drawn token."""
    body = {'prompt': [97, 98], 'echo': True, 'logprobs': 1, 'max_tokens': 1, 'temperature': 0}
    for script in (says(''), says('c')):  # the token drawn is the end, or is not
        made = app(script=script)
        told = post(made, COMPLETIONS, body).json()['choices'][0]['logprobs']
        assert {name: len(of) for name, of in told.items()} == dict.fromkeys(told, 3)
        events = post(made, COMPLETIONS, {**body, 'stream': True}).events
        streamed = [e['choices'][0]['logprobs'] for e in events if e['choices'][0]['logprobs']]
        assert sum((one['tokens'] for one in streamed), []) == told['tokens']


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
def test_logprobs_of_the_prompt(app, path):
    body = ask(path, prompt_logprobs=1, max_tokens=2)
    told = post(app(), path, body).json()
    scores = told['choices'][0]['prompt_logprobs']
    assert len(scores) == told['usage']['prompt_tokens']
    assert scores[0]['logprob'] is None and scores[1]['logprob'] == -0.25
    events = post(app(), path, {**body, 'stream': True}).events
    chunks = [e['choices'][0] for e in events if 'prompt_logprobs' in e['choices'][0]]
    assert [chunk['prompt_logprobs'] for chunk in chunks] == [scores]
    if path == COMPLETIONS:  # beside an echo with its own
        body |= {'echo': True, 'logprobs': 1, 'stream': True}
        events = post(app(), path, body).events
        chunks = [e['choices'][0] for e in events if 'prompt_logprobs' in e['choices'][0]]
        assert [chunk['prompt_logprobs'] for chunk in chunks] == [scores]


def test_minus_infinity(app, monkeypatch):
    low = fake.Logprob(120, -np.inf, ((120, -np.inf),))
    monkeypatch.setattr(fake, 'logprob', lambda token, top: low)
    told = post(app(script=says('x')), COMPLETIONS, {'prompt': 'p', 'logprobs': 1}).json()
    assert told['choices'][0]['logprobs']['token_logprobs'] == [-9999.0] * 2


@pytest.mark.parametrize('stream', [False, True])
def test_deadline(app, stream):
    body = {'prompt': 'ab', 'timeout': 0.15, 'max_tokens': 400, 'stream': stream}
    answer = post(app(pause=0.01), COMPLETIONS, body)
    last = answer.events[-1] if stream else answer.json()
    assert answer.status == 200 and last['choices'][0]['finish_reason'] == 'deadline'


def failing(engine):
    """Its rows fail after the second token."""
    step = engine._step

    def fails(row):
        if row.drawn < 2:
            return step(row)
        engine._end(row, 'error')
        return True

    engine._step = fails


@pytest.mark.parametrize('path', [COMPLETIONS, CHAT])
def test_failure_of_the_engine(app, path):
    made = app()
    failing(made.state.service.served.engine)
    answer = post(made, path, ask(path))
    assert answer.status == 500 and answer.error['message'] == 'the script says so'
    answer = post(made, path, ask(path, stream=True))
    assert answer.status == 200  # which was sent before
    last = answer.body.decode().split('\n\n')[-2]
    assert last.startswith('data: {"error":') and 'the script says so' in last


def test_embeddings(app):
    made = app()
    told = post(made, '/v1/embeddings', {'input': ['ab', 'c'], 'model': fake.MODEL}).json()
    assert [one['index'] for one in told['data']] == [0, 1]
    vectors = np.array([one['embedding'] for one in told['data']])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert told['usage'] == {'prompt_tokens': 3, 'total_tokens': 3}
    body = {'input': [97, 98], 'encoding_format': 'base64'}
    packed = post(made, '/v1/embeddings', body).json()['data'][0]['embedding']
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(packed), '<f4'), vectors[0].astype(np.float32)
    )


def test_vectors_that_are_no_numbers_are_an_error_of_the_server(app, monkeypatch):
    made = app()

    def embed(prompts):
        raise NotFiniteError('text 0: the model gives NaN')

    monkeypatch.setattr(made.state.service.served.engine, 'embed', embed)
    answer = post(made, '/v1/embeddings', {'input': 'a'})
    assert answer.status == 500
    told = {'message': 'text 0: the model gives NaN', 'type': 'server_error', 'param': None}
    assert answer.error == {**told, 'code': 'engine_error'}


def test_models(app):
    made = app()
    (told,) = get(made, '/v1/models').json()['data']
    assert told['id'] == fake.MODEL and told['length'] == 512 and told['chat'] is True
    assert get(made, f'/v1/models/{fake.MODEL}').json() == told
    answer = get(made, '/v1/models/other')
    assert answer.status == 404 and answer.error['code'] == 'model_not_found'


def test_metrics(app):
    made = app()
    post(made, COMPLETIONS, {'prompt': 'ab', 'max_tokens': 5})
    post(made, COMPLETIONS, {'prompt': 'ab', 'bad"\n': 5})
    get(made, '/nowhere')
    assert made.state.service.served.engine.idle(5.0)  # a row is free a moment after its last event
    answer = get(made, '/metrics')
    assert answer.headers['content-type'].startswith('text/plain; version=0.0.4')
    lines = answer.body.decode().splitlines()
    values = dict(line.rsplit(' ', 1) for line in lines if not line.startswith('#'))
    assert all(float(value) >= 0 for value in values.values())
    assert values['llama_jax_rows'] == '4' and values['llama_jax_rows_busy'] == '0'
    assert values['llama_jax_requests_total{reason="length"}'] == '1'
    assert values['llama_jax_generated_tokens_total'] == '5'
    http = 'llama_jax_http_requests_total{method="%s",path="%s",status="%s"}'
    assert values[http % ('POST', COMPLETIONS, 200)] == '1'
    assert values[http % ('POST', COMPLETIONS, 400)] == '1'
    assert values[http % ('GET', 'other', 404)] == '1'
    assert values['llama_jax_time_to_first_token_seconds_count'] == '1'
    assert values['llama_jax_time_between_tokens_seconds_bucket{le="+Inf"}'] == '4'
    assert values['llama_jax_request_seconds_count'] == '2'
    kinds = [line.split()[2:] for line in lines if line.startswith('# TYPE')]
    assert len({name for name, _ in kinds}) == len(kinds)
