"""A run with heads for tokens further ahead: they draft, and stay behind where it is exported."""

import jax
import numpy as np
import pytest

from experiments import export, generate, serve
from llama_jax.errors import UserError
from llama_jax.model import heads
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import HEADS
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.weighted import Weighted
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.train.step import EXTRA
from tests.convert import run as runs
from tests.experiments.test_generate import ONE

CONFIG = ModelConfig(
    vocab=399, dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, ffn=32, context=64
)
PARAMS = runs.random_params(CONFIG)
BESIDE = jax.tree.map(np.asarray, heads.create(CONFIG, 3, jax.random.key(0)))


@pytest.fixture
def run(tmp_path):
    params = {**PARAMS, EXTRA: {HEADS: BESIDE}}
    return runs.save(
        *(tmp_path / 'run', CONFIG, params, bytes_tokenizer()), objective=MultiToken(heads=3)
    )


@pytest.mark.slow
def test_heads_draft_and_stay_behind(run_script, run, tmp_path, monkeypatch):
    options = ['--checkpoint', run, '--prompt', 'a', '--seed', 3, *ONE[:-2], '--max-tokens', 20]
    _, expected, _ = run_script(generate.main, *options)
    code, out, error = run_script(generate.main, *options, '--draft', 'heads')
    assert code == 0 and out == expected and len(out) > 3
    assert 'drafts accepted; ' in error[-1] and '20 tokens in' in error[-1]

    def engine(programs, **how):
        raise UserError(f'an engine with {how["speculate"]}')

    monkeypatch.setattr(serve, 'Engine', engine)
    serving = ['--checkpoint', run, '--port', 0, '--draft', 'heads', *ONE[:-2]]
    code, _, error = run_script(serve.main, *serving)
    assert code == 2 and 'an engine with Heads(n_draft=2)' in error[-1]
    code, _, error = run_script(serve.main, *serving, '--lookup', 3)
    assert code == 2 and '--lookup and --draft: one of them drafts' in error[-1]

    for kind, name in (('gguf', 'whole.gguf'), ('huggingface', 'whole')):
        code, _, error = run_script(export.main, tmp_path / name, '--checkpoint', run, '--to', kind)
        assert code == 0 and error[-1] == 'of the objective stays behind: heads'


def test_runs_and_weights_without_heads(run_script, tmp_path):
    plain = runs.save(tmp_path / 'plain', CONFIG, {}, bytes_tokenizer())
    both = Weighted((InfoNCE(), MultiToken(heads=1)), (1.0, 1.0), (0.5, 0.5))
    one = runs.save(tmp_path / 'one', CONFIG, {}, bytes_tokenizer(), objective=both)
    for given, words in (
        (('--checkpoint', plain), 'was not trained with heads that draft; --objective multi-token'),
        (('--checkpoint', one), 'was not trained with heads that draft'),
        (('--weights', 'y'), '--draft heads: y holds weights of others'),
    ):
        options = [*given, '--prompt', 'a', '--draft', 'heads']
        code, _, error = run_script(generate.main, *options)
        assert code == 2 and words in error[-1]
