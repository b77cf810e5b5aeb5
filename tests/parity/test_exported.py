"""Exported models in other programs: transformers and llama.cpp load them, read text into the same
ids and continue it by the same tokens."""

import functools
import inspect
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments import models
from experiments.export import Options, export
from llama_jax.convert import pretrained
from llama_jax.data.train_tokenizer import train
from llama_jax.generate.generator import Generator
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig, RopeScaling
from tests.convert import run as runs
from tests.data.corpus import CHINESE
from tests.parity.smollm2 import one

pytestmark = pytest.mark.parity

CODE = inspect.getsource(textwrap)
PROMPTS = (
    *('def main(', 'The quick brown fox', ' a  b\n\t', '\U0001f600 e\u0301 <0x41> </p>'),
    *(CHINESE[0][:20], CHINESE[0][:120], CODE[2000:2300]),
)
N = 24
CONFIG = ModelConfig(
    vocab=1536,
    dim=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=96,
    context=256,
    rope_theta=5e5,
    rope_scaling=RopeScaling(original_context=64),
)


@functools.cache
def tokenizer():
    return train([CODE, *CHINESE], vocab=1500, kind='bpe')


def saved(path, config):
    """A run of this project, and what it is continued by."""
    config = replace(config, vocab_padding=config.vocab - tokenizer().vocab_size)
    return runs.save(path, config, runs.random_params(config), tokenizer())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = saved(tmp_path_factory.mktemp('runs') / 'run', CONFIG)
    model = models.from_run(path, one())
    generator = Generator(
        model.config,
        model.params,
        mesh=one(),
        compute=Compute(),
        eos_ids=model.end_ids,
        pad_id=model.pad_id,
    )
    prompts = [model.prompt(text) for text in PROMPTS]
    completions = generator(prompts, max_tokens=N, temperature=0.0)
    assert max(map(len, prompts)) > CONFIG.rope_scaling.original_context
    return path, model, prompts, [completion.tokens for completion in completions]


def test_transformers_continues_as_we_do(run, tmp_path):
    import torch
    import transformers

    path, model, prompts, expected = run
    export(Options(tmp_path / 'hf', 'huggingface', checkpoint=str(path), shard_gigabytes=2e-4))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    for text, prompt, tokens in zip(PROMPTS, prompts, expected, strict=True):
        assert theirs(text).input_ids == prompt
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=N, do_sample=False)
        found = [i for i in out[0].tolist()[len(prompt) :] if i not in model.end_ids]
        assert found == tokens, text
        assert theirs.decode(prompt, skip_special_tokens=True) == text
    assert peer.generation_config.pad_token_id == model.pad_id


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path):
        import cyllama.llama.llama_cpp as cpp

        cpp.disable_logging()
        cpp.ggml_backend_load_all()
        self._cpp = cpp
        self._model = cpp.LlamaModel(str(path), cpp.LlamaModelParams())
        settings = cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONFIG.context
        settings.n_threads = settings.n_threads_batch = 1
        self._context = cpp.LlamaContext(self._model, settings)
        self._sampler = cpp.LlamaSampler(cpp.LlamaSamplerChainParams())
        self._sampler.add_greedy()

    def ids(self, text):
        return list(self._model.get_vocab().tokenize(text, True, False))

    def likeliest(self, prompt, given=()):
        """The N tokens that are each the likeliest after what it wrote, or after those `given`."""
        self._context.kv_cache_clear()
        found, tokens, at = [], list(prompt), 0
        for i in range(N):
            self._context.decode(self._cpp.llama_batch_get_one(tokens, at))
            at += len(tokens)
            found.append(self._sampler.sample(self._context, -1))
            tokens = [given[i] if given else found[-1]]
        return found


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'q8_0'])
def test_llama_cpp_continues_as_we_do(run, tmp_path, dtype):
    path, _, prompts, expected = run
    export(Options(tmp_path / 'a.gguf', 'gguf', checkpoint=str(path), dtype=dtype))
    peer = LlamaCpp(tmp_path / 'a.gguf')
    agreed = []
    for text, prompt, tokens in zip(PROMPTS, prompts, expected, strict=True):
        assert peer.ids(text) == prompt
        assert len(tokens) == N
        if dtype == 'q8_0':
            found = peer.likeliest(prompt, given=tokens)
            agreed += [a == b for a, b in zip(found, tokens, strict=True)]
        else:
            assert peer.likeliest(prompt) == tokens, text
    # It rounds activations to 8 bits as well: a few near ties fall the other way.
    assert dtype != 'q8_0' or np.mean(agreed) > 0.9


def test_llama_cpp_continues_a_tied_model(tmp_path):
    """Whatever llama.cpp writes, each token is our likeliest after all before it. Other positions
    than Llama 3's: test_kinds.py."""
    path = saved(tmp_path / 'run', replace(CONFIG, rope_scaling=None, tied=True))
    export(Options(tmp_path / 'a.gguf', 'gguf', checkpoint=str(path), dtype='float32'))
    peer, model = LlamaCpp(tmp_path / 'a.gguf'), models.from_run(path, one())
    prompt = model.prompt(PROMPTS[5])
    row = [*prompt, *peer.likeliest(prompt)]
    with jax.set_mesh(one()):
        bound = layers.bind(model.config, model.params)
        logits_BTV, _ = bound(jnp.array([row]), compute=Compute())
    likeliest_T = np.asarray(logits_BTV)[0, :, : model.config.ids].argmax(-1)
    assert likeliest_T[len(prompt) - 1 : -1].tolist() == row[len(prompt) :]


def test_smollm2_goes_out_and_comes_back(tmp_path):
    import transformers

    original = pretrained.find('smollm2')
    export(Options(tmp_path / 'hf', 'huggingface', weights='smollm2', dtype='bfloat16'))
    export(Options(tmp_path / 'a.gguf', 'gguf', weights=str(tmp_path / 'hf'), dtype='bfloat16'))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = original.text()
    for text in PROMPTS:
        assert theirs(text).input_ids == ours.vocabulary.encode(text).tolist()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    chat = [{'role': 'user', 'content': 'What is the capital of France?'}]
    inputs = theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors='pt', return_dict=True
    )
    out = peer.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = theirs.decode(out[inputs['input_ids'].shape[1] :], skip_special_tokens=True)
    assert answer == 'The capital of France is Paris.'
    back = pretrained.find(str(tmp_path / 'a.gguf'))
    assert back.config == original.config
    for at in ('embed_VD',), ('norm', 'scale_D'), ('blocks', 29, 'attention', 'q_DNH'):
        w, expected = (functools.reduce(lambda x, i: x[i], at, m.unread) for m in (back, original))
        np.testing.assert_array_equal(w.read(), expected.read().astype(ml_dtypes.bfloat16))
