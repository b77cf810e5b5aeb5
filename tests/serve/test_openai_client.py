"""The client that people use, over a socket: openai's own."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest

openai = pytest.importorskip('openai')

from tests.serve import fake  # noqa: E402
from tests.serve.conftest import running  # noqa: E402
from tests.serve.fake import says  # noqa: E402

TEXT = '你好，世界 🙂👩‍👩‍👧 naïve'
HELLO = [{'role': 'user', 'content': 'hi'}]


@pytest.fixture
def client(app):
    """Makes a server with its engine, and a client of it."""
    with contextlib.ExitStack() as stack:

        def make(*, grace_seconds=10.0, **settings):
            made = app(**settings)
            url, server = stack.enter_context(running(made, grace_seconds=grace_seconds))
            one = openai.OpenAI(base_url=f'{url}/v1', api_key='key', max_retries=0)
            stack.callback(one.close)
            one.server, one.engine = server, made.state.service.served.engine
            return one

        yield make


def test_chat(client):
    told = client(script=says(TEXT)).chat.completions.create(
        model=fake.MODEL, messages=HELLO, max_tokens=100, logprobs=True, top_logprobs=2, seed=1
    )
    (choice,) = told.choices
    assert choice.message.content == TEXT and choice.finish_reason == 'stop'
    assert told.usage.completion_tokens == len(TEXT.encode())
    assert len(choice.logprobs.content) == told.usage.completion_tokens + 1, 'the end has one too'
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_chat_stream(client):
    stream = client(script=says(TEXT)).chat.completions.create(
        model=fake.MODEL,
        messages=HELLO,
        n=2,
        stream=True,
        stream_options={'include_usage': True},
        max_tokens=100,
    )
    texts, usage = ['', ''], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            piece = choice.delta.content or ''
            assert '\ufffd' not in piece
            texts[choice.index] += piece
    assert texts == [TEXT, TEXT] and usage.completion_tokens == 2 * len(TEXT.encode())


def test_completions(client):
    one = client()
    told = one.completions.create(
        model=fake.MODEL,
        prompt=['ab', 'cd'],
        max_tokens=4,
        echo=True,
        logprobs=1,
        extra_body={'top_k': 5, 'min_p': 0.1, 'timeout': 5},
    )
    assert [choice.text for choice in told.choices] == ['ababab', 'cdcdcd']
    assert told.choices[0].logprobs.token_logprobs[0] is None
    assert one.engine.requests[0].controls.top_k == 5
    stream = one.completions.create(model=fake.MODEL, prompt='ab', max_tokens=4, stream=True)
    assert ''.join(chunk.choices[0].text for chunk in stream) == 'abab'


def test_embeddings_and_models(client):
    one = client()
    told = one.embeddings.create(model=fake.MODEL, input=['ab', 'ba'])  # asks for base64
    first, second = (np.array(item.embedding) for item in told.data)
    np.testing.assert_allclose(first, second)
    np.testing.assert_allclose(np.linalg.norm(first), 1, rtol=1e-6)
    assert [model.id for model in one.models.list()] == [fake.MODEL]
    assert one.models.retrieve(fake.MODEL).id == fake.MODEL


def test_errors(client):
    one = client(keys=('right',))
    with pytest.raises(openai.AuthenticationError):
        one.models.list()
    one.api_key = 'right'
    with pytest.raises(openai.BadRequestError) as error:
        one.chat.completions.create(model=fake.MODEL, messages=HELLO, web_search_options={})
    assert error.value.param == 'web_search_options' and error.value.code == 'unsupported_parameter'
    with pytest.raises(openai.NotFoundError):
        one.chat.completions.create(model='gpt-4', messages=HELLO)


def test_client_that_stops_listening(client):
    one = client(pause=0.005)
    stream = one.completions.create(model=fake.MODEL, prompt='a', max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()
    assert one.engine.idle(1.0)
    assert one.engine.stats().requests_total == {'cancelled': 1}
    with pytest.raises(openai.APITimeoutError):
        one.completions.create(model=fake.MODEL, prompt='a', max_tokens=500, timeout=0.2)
    assert one.engine.idle(1.0)
    assert one.engine.stats().requests_total == {'cancelled': 2}


def test_full_queue(client):
    one = client(rows=1, queue=1, pause=0.005)

    def ask():
        return one.completions.create(model=fake.MODEL, prompt='a', max_tokens=100)

    others = [threading.Thread(target=ask) for _ in range(2)]
    for other, place in zip(others, ('rows_busy', 'waiting'), strict=True):
        other.start()
        until = time.monotonic() + 5
        while not getattr(one.engine.stats(), place):
            assert time.monotonic() < until
            time.sleep(0.002)
    with pytest.raises(openai.RateLimitError) as error:
        ask()
    assert int(error.value.response.headers['retry-after']) >= 1
    for other in others:
        other.join()


def test_end_of_the_server(client):
    # What is short enough goes on to its end; the rest is told that it was cut off.
    one = client(pause=0.005, grace_seconds=1.0)
    long = one.completions.create(model=fake.MODEL, prompt='a', max_tokens=500, stream=True)
    short = one.completions.create(model=fake.MODEL, prompt='a', max_tokens=60, stream=True)
    chunks = iter(long)
    next(chunks)
    begin = time.monotonic()
    one.server.should_exit = True
    assert [c.choices[0].finish_reason for c in short][-1] == 'length'
    assert [c.choices[0].finish_reason for c in chunks][-1] == 'cancelled'
    assert time.monotonic() - begin < 1.5


def test_fifty_clients_at_once(client):
    one = client(rows=8, queue=100)

    async def ask(asynchronous, i):
        text = '字🙂'[i % 2] * 4
        stream = await asynchronous.completions.create(
            model=fake.MODEL, prompt=text, max_tokens=24, stream=True
        )
        got = ''
        async for chunk in stream:
            got += chunk.choices[0].text
            if i % 3 == 0 and got:
                await stream.close()
                return
        assert got == (text.encode() * 2)[:24].decode()

    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=str(one.base_url), api_key='key', max_retries=0, timeout=120
        ) as asynchronous:
            await asyncio.gather(*(ask(asynchronous, i) for i in range(50)))

    asyncio.run(all_of_them())
    assert one.engine.idle()
