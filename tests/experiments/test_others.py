"""`--start` and `--from` with the directory of a model that was made elsewhere."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import cli, evaluate, pretrain
from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Linear, ModelConfig, RopeScaling, Yarn
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.start import check_start
from tests.convert import written

MODEL = ModelConfig(
    vocab=520, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=300
)


@pytest.fixture(scope='session')
def others(tmp_path_factory):
    rng = np.random.default_rng(5)
    params = trees.map_named(
        lambda _, x: rng.normal(size=x.shape).astype(np.float32), layers.abstract(MODEL)
    )
    return written.directory(tmp_path_factory.mktemp('others') / 'theirs', MODEL, params)


@pytest.fixture
def read(monkeypatch):
    def read(*arguments):
        monkeypatch.setattr('sys.argv', ['script', *map(str, arguments)])
        return cli.read('pretrain', '')[0]

    return read


def test_the_command_line_says_what_is_otherwise(read, others):
    found = read('quickstart', '--start', others)
    usual = read('quickstart')
    assert found == replace(
        usual,
        start=str(others),
        model=replace(MODEL, dropout=usual.model.dropout),
        data=replace(usual.data, tokenizer=TokenizerConfig(path=str(others))),
    )
    other = read('quickstart', f'--start={others}', '--model.context', 600, '--train.steps', '7')
    assert other.model == replace(found.model, context=600) and other.train.steps == 7
    assert read('quickstart', '--start', others, '--model.vocab', 640).model.vocab == 640
    scaled = read('quickstart', '--start', others, '--model.rope-scaling', 'linear', 'factor=2')
    assert scaled.model == replace(found.model, rope_scaling=Linear(2.0))
    assert read('quickstart', '--start', 'None') == usual


def test_all_arms_of_a_grid_begin_with_it(monkeypatch, others):
    monkeypatch.setattr('sys.argv', ['script', 'objectives', '--start', str(others)])
    grid, _ = cli.read_grid('compare', '')
    for arm in grid.arms:
        experiment = arm.experiment
        assert experiment.start == str(others) and experiment.data.tokenizer.path == str(others)
        if not experiment.model.encoder_layers:
            assert replace(experiment.model, dropout=0.0) == replace(MODEL, vocab=0)
            check_start(experiment)


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [
        ('none', None),
        ('llama3 factor=32', RopeScaling(factor=32)),
        ('yarn factor=4 original_context=300 truncate=false', Yarn(4, 300, truncate=False)),
    ],
)
def test_a_rope_scaling_is_named(read, words, wanted):
    model = read('quickstart', '--model.rope-scaling', *words.split(), '--seed', 3).model
    assert model.rope_scaling == wanted


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('', 'the first word is one of none, llama3, linear, dynamic, yarn, longrope'),
        ('ntk factor=2', 'the first word is one of none'),
        ('none factor=2', 'takes no values: leave out factor=2'),
        ('linear fctor=2', "'fctor=2' is none of factor, as name=3"),
        ('linear factor=two', 'factor=two is no value of its kind'),
        ('linear factor=-1', 'factor is -1.0, it must be positive'),
        ('dynamic factor=2', 'dynamic needs original_context too'),
    ],
)
def test_a_rope_scaling_that_is_none(read, words, message):
    with pytest.raises(UserError, match=message):
        read('quickstart', '--model.rope-scaling', *words.split())


def test_the_first_batch_and_what_is_refused(run_script, others, text):
    given = ('quickstart', '--start', others, '--data.files', text, '--train.batch', 8)
    code, out, error = run_script(pretrain.main, *given, '--train.seq-len', 64, '--show-batch', 1)
    assert code == 0 and 'batch 1, row 1 of 8' in out, error
    assert f'the model of {others}: 1 layers of 16, a vocabulary of 520' in error[0]
    for more, message in (
        (('--train.seq-len', 512), 'train.seq_len 512 is longer than the model context 300'),
        (('--model.dim', 32, '--train.seq-len', 64), 'dim: 16 -> 32: give --model.dim as it has'),
        (('--data.tokenizer.kind', 'unigram'), '--data.tokenizer.kind has no effect with --start'),
    ):
        code, _, error = run_script(pretrain.main, *given, *more)
        assert code == 2 and message in error[-1]
    code, _, error = run_script(pretrain.main, 'quickstart', '--start', 'nowhere')
    assert (code, len(error)) == (2, 1) and 'nowhere holds no run, and no model' in error[0]


def test_any_text_is_measured(run_script, others, tmp_path):
    (tmp_path / 'short.txt').write_text('def f(x): return x')
    given = ('--from', others, '--text', tmp_path / 'short.txt', '--output', tmp_path / 'x.json')
    code, out, _ = run_script(evaluate.main, *given)
    assert code == 0 and 'bits per byte' in out and 'nothing else is measured: short has too' in out
    found = json.loads((tmp_path / 'x.json').read_text())['whole']
    assert f'{found["nats_per_token"]:.4f} nats per token' in out
    assert found['documents'] == 1 and found['bytes'] == 15
    for arguments, message in (
        (['runs/x', '--from', others], 'give either RUN or --from NAME'),
        ([], 'give either RUN or --from NAME'),
        (['--from', others, '--own'], '--own is what a run validates on'),
        (['--from', others, '--output', 'no/x.json'], 'there is no directory no'),
        (['--from', 'nowhere'], "no weights are called 'nowhere'"),
    ):
        code, _, (line,) = run_script(evaluate.main, *arguments)
        assert code == 2 and message in line
