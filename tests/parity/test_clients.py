"""Clients that people use, each against a server of the real SmolLM2: LangChain, `llm`, Vercel's AI
SDK. OpenAI's own is in tests/serve/test_process.py, lm-eval in test_client_lm_eval.py."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from llama_jax.data.config import cache_dir

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('default')]

MODEL = 'smollm2'
QUESTION = 'What is the capital of France?'
ANSWER = 'The capital of France is Paris.'
PROMPT, COMPLETED = 'The capital of France is', ' Paris'
WIDTH = 576
VERCEL = Path(__file__).parent / 'vercel'


@pytest.fixture(scope='module')
def url(smollm2_server):
    return f'{smollm2_server.url}/v1'


@pytest.fixture
def langchain(url):
    """Makes clients by the name of their class."""
    module = pytest.importorskip('langchain_openai')

    def make(name, **settings):
        return getattr(module, name)(base_url=url, api_key='any', model=MODEL, **settings)

    return make


def test_langchain_chat(langchain):
    chat = langchain('ChatOpenAI', temperature=0, max_tokens=12)
    told = chat.invoke(QUESTION)
    assert told.content == ANSWER and told.response_metadata['finish_reason'] == 'stop'
    assert told.usage_metadata['output_tokens'] == 7
    pieces = list(chat.stream(QUESTION, stream_usage=True))
    assert ''.join(piece.content for piece in pieces) == ANSWER and len(pieces) > 2
    assert sum(p.usage_metadata['output_tokens'] for p in pieces if p.usage_metadata) == 7
    turns = [
        ('system', 'Be brief.'),
        ('user', 'Hello!'),
        ('assistant', 'Hello.'),
        ('user', QUESTION),
    ]
    texts = [one.content for one in chat.batch([QUESTION, turns, QUESTION])]
    assert texts[0] == texts[2] == ANSWER and 'Paris' in texts[1]
    sure = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert sure.response_metadata['logprobs']['content'][0]['token'] == 'The'


def test_langchain_structured_output(langchain):
    pydantic = pytest.importorskip('pydantic')

    class Capital(pydantic.BaseModel):
        """The capital of a country."""

        capital: Literal['Paris', 'Rome']
        large: bool | None

    chat = langchain('ChatOpenAI', temperature=0, max_tokens=40)
    for settings in ({}, {'strict': True}):
        assert isinstance(
            chat.with_structured_output(Capital, **settings).invoke(QUESTION), Capital
        )


def test_langchain_completions_and_embeddings(langchain):
    write = langchain('OpenAI', temperature=0, max_tokens=4).bind(stop=['.'])
    assert write.invoke(PROMPT) == COMPLETED == ''.join(write.stream(PROMPT))
    assert write.batch([PROMPT, 'The capital of Spain is']) == [COMPLETED, ' Madrid']
    drawn = langchain('OpenAI', max_tokens=2, n=2, best_of=2).generate([PROMPT])
    assert len(drawn.generations[0]) == 2
    # Otherwise it cuts texts by the tokens of OpenAI's models, and sends their ids.
    embed = langchain('OpenAIEmbeddings', check_embedding_ctx_length=False)
    vectors = np.array(embed.embed_documents(['Paris', '巴黎']))
    assert vectors.shape == (2, WIDTH)
    np.testing.assert_allclose(embed.embed_query('Paris'), vectors[0], atol=1e-5)


def test_llm(url, tmp_path, monkeypatch):
    """Simon Willison's `llm`, by its command line and its file of models."""
    monkeypatch.setenv('LLM_USER_PATH', str(tmp_path))
    monkeypatch.setenv('LLM_LOAD_PLUGINS', '')  # among them those that run models by themselves
    pytest.importorskip('llm')
    from click.testing import CliRunner

    served = {'model_name': MODEL, 'api_base': url}
    known = [
        {'model_id': 'chat', 'supports_schema': True, **served},
        {'model_id': 'completion', 'completion': True, **served},
    ]
    (tmp_path / 'extra-openai-models.yaml').write_text(json.dumps(known))  # JSON is YAML
    from llm.cli import cli

    def ask(*arguments):
        arguments = [*arguments, '-o', 'temperature', '0', '-o', 'max_tokens', '24']
        told = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert told.exit_code == 0, told.output
        return told.output

    assert ask('-m', 'chat', QUESTION) == f'{ANSWER}\n'
    assert ask('-m', 'chat', '--no-stream', QUESTION) == f'{ANSWER}\n'
    assert 'Paris' in ask('--continue', 'And where is it? The capital of France:')
    schema = {'type': 'object', 'properties': {'capital': {'enum': ['Paris', 'Rome']}}}
    schema |= {'required': ['capital'], 'additionalProperties': False}
    told = json.loads(ask('-m', 'chat', '--schema', json.dumps(schema), QUESTION))
    assert told['capital'] in ('Paris', 'Rome')
    assert ask('-m', 'completion', PROMPT).startswith(COMPLETED)


@pytest.fixture(scope='module')
def packages():
    """Vercel's AI SDK, installed by its lock file in the cache."""
    if shutil.which('npm') is None or shutil.which('node') is None:
        pytest.skip('no npm and node here: install Node.js 20 or newer')
    names = ('package.json', 'package-lock.json')
    lock = b''.join((VERCEL / name).read_bytes() for name in names)
    folder = cache_dir() / 'npm' / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'node_modules' / '.package-lock.json').exists():  # npm writes it last
        for name in names:
            shutil.copy(VERCEL / name, folder)
        command = ['npm', 'ci', '--no-audit', '--no-fund', '--ignore-scripts']
        subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


def test_vercel_ai_sdk(url, packages):
    script = shutil.copy(VERCEL / 'ask.mjs', packages)  # which looks for packages beside itself
    found = subprocess.run(
        ['node', script, url, MODEL],
        env={**os.environ, 'AI_SDK_LOG_WARNINGS': 'false'},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told['text'] == ''.join(told['streamed']) == ANSWER and len(told['streamed']) > 1
    assert told['reason'] == 'stop'
    assert told['usage']['outputTokens'] == told['streamedUsage']['outputTokens'] == 7
    assert told['object'].keys() == {'capital', 'large'}
    assert told['object']['capital'] in ('Paris', 'Rome')
    assert 'Paris' in told['completed']  # the prompt as a talk of user and assistant
    assert told['embedded'] == [WIDTH, WIDTH]
