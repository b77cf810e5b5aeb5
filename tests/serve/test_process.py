"""`experiments.serve` as a process with real weights, asked by OpenAI's own client: its answers are
those of the model computed here, without an engine."""

import asyncio
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

openai = pytest.importorskip('openai')
pydantic = pytest.importorskip('pydantic')

from experiments import models  # noqa: E402
from llama_jax.convert import params as params_lib  # noqa: E402
from llama_jax.mesh import MeshConfig, make  # noqa: E402
from llama_jax.model import layers  # noqa: E402
from llama_jax.model.config import Compute  # noqa: E402
from tests.serve.process import MARKS, MODEL, serving, write_model  # noqa: E402

LENGTH = 160
KEY = 'right'
ASKED = [{'role': 'user', 'content': '你好 👋'}]
TEMPLATE = (
    '{% if tools %}<tool_call>{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}'
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('model') / 'theirs')


@pytest.fixture(scope='module')
def model(directory):
    one = make(MeshConfig(), jax.devices()[:1])
    read = models.from_weights(str(directory), one)
    params = params_lib.placed(read.params, one)

    @jax.jit
    def log_probs(token_BT):
        logits_BTV, _ = layers.bind(MODEL, params)(token_BT, compute=Compute())
        return jax.nn.log_softmax(logits_BTV[0])

    def of(ids):
        """Log-probabilities [T, V] behind each of the ids."""
        with jax.set_mesh(one):
            padded = jnp.asarray([[*ids, *[0] * (LENGTH - len(ids))]])
            return np.asarray(log_probs(padded))[: len(ids)]

    return read, of


@pytest.fixture(scope='module')
def server(directory, tmp_path_factory):
    template = tmp_path_factory.mktemp('template') / 'chat.jinja'
    template.write_text(TEMPLATE)
    options = {
        'weights': directory,
        'name': 'tiny/one',
        'length': LENGTH,
        'rows': 2,
        'queue': 4,
        'timeout': 50,
        'cors': 'https://a.example',
        'chat-template': template,
    }
    given = [word for name, value in options.items() for word in (f'--{name}', value)]
    with serving(*given, LLAMA_JAX_API_KEYS=f'other, {KEY}') as one:
        yield one


@pytest.fixture(scope='module')
def client(server):
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key=KEY, max_retries=0) as one:
        yield one


def greedy(model, ids, n):
    """`ids`, and after them the likeliest ones, up to the end."""
    read, logp_of = model
    ids = list(ids)
    for _ in range(n):
        token = int(logp_of(ids)[-1].argmax())
        if token in read.end_ids:
            break
        ids.append(token)
    return ids


def test_completion_is_the_models(client, model):
    read, logp_of = model
    prompt = 'def wrap(text, width):'
    ids = read.prompt(prompt)
    told = client.completions.create(
        model='tiny/one', prompt=prompt, max_tokens=10, temperature=0, echo=True, logprobs=1
    )
    (choice,) = told.choices
    drawn = greedy(model, ids, 10)
    assert choice.text == read.vocabulary.decode(drawn)
    logp_TV = logp_of(drawn)
    expected = logp_TV[np.arange(len(drawn) - 1), drawn[1:]]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=1e-4)
    assert told.usage.prompt_tokens == len(ids)


def test_suffix_asks_for_the_text_between(client, model):
    read, _ = model
    before, between, behind = (read.vocabulary.control[name] for name in MARKS)
    prefix, suffix = (read.vocabulary.encode(text).tolist() for text in ('def f(', '):\n'))
    ids = [before, *prefix, between, *suffix, behind]
    told = client.completions.create(
        model='tiny/one', prompt='def f(', suffix='):\n', max_tokens=10, temperature=0
    )
    drawn = greedy(model, ids, 10)[len(ids) :]
    assert told.choices[0].text == read.vocabulary.decode(drawn)
    assert told.usage.prompt_tokens == len(ids)


def test_best_of(client):
    asked = {'model': 'tiny/one', 'prompt': 'a', 'max_tokens': 6, 'seed': 3}
    drawn = client.completions.create(**asked, n=3, logprobs=0).choices
    means = [np.mean(choice.logprobs.token_logprobs) for choice in drawn]
    told = client.completions.create(**asked, best_of=3)
    assert [choice.text for choice in told.choices] == [drawn[int(np.argmax(means))].text]
    assert len({choice.text for choice in drawn}) > 1


def test_chat_by_the_template_of_the_command_line(client, model):
    read, _ = model
    start, end = (read.vocabulary.control[f'<|im_{name}|>'] for name in ('start', 'end'))
    said = read.vocabulary.encode(f'user: {ASKED[0]["content"]}').tolist()
    ids = [start, *said, end, start]
    drawn = greedy(model, ids, 8)[len(ids) :]
    asked = {'model': 'tiny/one', 'messages': ASKED, 'max_tokens': 8, 'temperature': 0}
    told = client.chat.completions.create(**asked)
    assert told.choices[0].message.content == read.vocabulary.decode(drawn)
    assert told.usage.prompt_tokens == len(ids)

    async def streamed():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY) as one:
            stream = await one.chat.completions.create(
                **asked, stream=True, stream_options={'include_usage': True}
            )
            return [chunk async for chunk in stream]

    chunks = asyncio.run(streamed())
    text = ''.join(c.delta.content or '' for chunk in chunks for c in chunk.choices)
    assert text == told.choices[0].message.content
    assert chunks[-1].usage.total_tokens == told.usage.total_tokens


def test_parsed_answer(client):
    class Answer(pydantic.BaseModel):
        colour: Literal['red', 'blue']
        sure: bool

    told = client.chat.completions.parse(
        model='tiny/one', messages=ASKED, response_format=Answer, seed=1
    )
    assert isinstance(told.choices[0].message.parsed, Answer)


def test_tool_call(client):
    parameters = {'properties': {'to': {'enum': ['东', '西']}}, 'required': ['to']}
    function = {'name': 'go', 'parameters': {**parameters, 'additionalProperties': False}}
    told = client.chat.completions.create(
        model='tiny/one',
        messages=ASKED,
        tools=[{'type': 'function', 'function': function}],
        tool_choice={'type': 'function', 'function': {'name': 'go'}},
        seed=1,
    )
    (choice,) = told.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == 'tool_calls' and call.function.name == 'go'
    assert json.loads(call.function.arguments)['to'] in ('东', '西')


def test_embeddings(client):
    texts = ['def f(x):', '中国', 'def f(x):']
    told = client.embeddings.create(model='tiny/one', input=texts)  # in base64
    vectors = np.array([one.embedding for one in told.data])
    assert vectors.shape == (3, MODEL.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_options_reach_the_server(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.length, model.grammars) == ('tiny/one', LENGTH, True)
    page = {'Origin': 'https://a.example'}
    headers = client.models.with_raw_response.list(extra_headers=page).headers
    assert headers['access-control-allow-origin'] == page['Origin']
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key='wrong').models.list()
    metrics = client.with_options(base_url=server.url).get('/metrics', cast_to=str)
    assert '\nllama_jax_rows 2\n' in metrics
    for wrong in ({'n': 4}, {'extra_body': {'timeout': 51}}):  # of a queue of 4, and of --timeout
        with pytest.raises(openai.BadRequestError, match='at most 3|at most 50'):
            client.completions.create(model='tiny/one', prompt='a', max_tokens=1, **wrong)


def test_interrupted_it_ends_what_runs_and_exits_with_0(client, server):
    stream = client.completions.create(
        model='tiny/one', prompt='a', max_tokens=80, stream=True, extra_body={'ignore_eos': True}
    )
    chunks = iter(stream)
    first = next(chunks)
    server.interrupt()
    rest = list(chunks)
    assert first.choices[0].finish_reason is None
    assert rest[-1].choices[0].finish_reason == 'length'
    assert server.exit_code() == 0
    assert not any('Traceback' in line for line in server.log), server.log
