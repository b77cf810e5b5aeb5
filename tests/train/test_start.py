"""Runs that begin with weights of others: their model, their tokenizer, their loss."""

import json
import pickle
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax import layout, trees
from llama_jax import mesh as meshes
from llama_jax.convert import pretrained
from llama_jax.convert.meta import params_to_meta
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.masked import MaskedLM
from llama_jax.text.files import tokenizer_of
from llama_jax.text.template_files import kept
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import loop, restore
from llama_jax.train.records import read_metrics
from llama_jax.train.restore import grown
from llama_jax.train.run import prepare
from llama_jax.train.start import check_start, settled, started
from tests.convert import written
from tests.train.conftest import MAKE_MESH, changed, events, one_device, scheduled

ROWS = 521
MODEL = ModelConfig(
    vocab=ROWS, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=96, tied=True
)
"""9 rows of the embedding have no token."""

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.fixture(scope='session')
def params():
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        norm = path.endswith('scale_D')
        return (norm + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    return trees.map_named(draw, layers.abstract(MODEL))


@pytest.fixture(scope='session')
def others(params, tmp_path_factory):
    """The directory of a model that was made elsewhere."""
    return written.directory(tmp_path_factory.mktemp('others') / 'theirs', MODEL, params)


@pytest.fixture
def begun(short, others):
    """An experiment of 4 steps that begins with it."""
    short = changed(changed(short, 'train', steps=4), 'evaluation', every=0)
    short = scheduled(changed(short, 'checkpoint', every=2), peak=1e-3, warmup_steps=1)
    return started(replace(short, start=str(others)))


def losses(workdir):
    return [line['loss'] for line in read_metrics(workdir) if line['kind'] == 'train']


def test_model_and_tokenizer_are_theirs(short, others, caplog):
    mine = changed(short, 'model', dropout=0.2)
    with caplog.at_level('INFO', logger='llama_jax'):
        found = started(replace(mine, start=str(others)))
    assert found.model == replace(MODEL, dropout=0.2), 'dropout is a matter of training'
    assert found.data.tokenizer == TokenizerConfig(path=str(others))
    assert '2 layers of 32, a vocabulary of 521, a context of 96' in caplog.text
    assert started(short) == short
    check_start(found)


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_weights_and_no_row_is_added(begun, others, params, tmp_path):
    with prepare(begun, tmp_path / 'run') as run:
        jax.tree.map(np.testing.assert_array_equal, run.state.params, params)
        batch = next(run.loader)
        run.state, metrics = run.step(run.state, run.place(batch))
    assert run.experiment.model == MODEL
    assert max(batch[name].max() for name in ('inputs', 'targets')) < ROWS
    with jax.set_mesh(one_device(MeshConfig())):
        logits_BTV, _ = layers.bind(MODEL, jax.tree.map(jax.numpy.asarray, params))(
            batch['inputs'],
            segment_BT=batch['segments'],
            position_BT=batch['positions'],
            compute=Compute(),
        )
    log_BTV = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)
    nll_BT = -np.take_along_axis(log_BTV, batch['targets'][..., None], axis=-1)[..., 0]
    expected = (nll_BT * batch['weights']).sum() / batch['weights'].sum()
    assert float(metrics['nll']) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_when_they_are_gone(begun, others, tmp_path):
    away = tmp_path / 'theirs'
    shutil.copytree(others, away)
    workdir, start = tmp_path / 'run', replace(begun, start=str(away))
    loop.train(started(start), workdir)
    whole = losses(workdir)
    assert len(whole) == 4 and f'begun with the parameters of {away}' in events(workdir)
    shutil.rmtree(workdir / 'checkpoints' / '4')
    shutil.rmtree(away)
    with pytest.raises(UserError, match='holds no run, and no model of others is there'):
        started(start)
    again = started(start, workdir)
    assert again.model == MODEL and again.data.tokenizer.path == str(workdir)
    loop.train(again, workdir)
    assert losses(workdir) == whole
    trained = restore.load(workdir, one_device(MeshConfig()))
    assert trained.config == MODEL and trained.tokenizer.vocab_size == ROWS
    assert kept(workdir) == pretrained.find(str(others)).text().chat  # it can still be asked


@pytest.mark.slow
def test_a_run_from_them_is_begun_with_as_well(begun, tmp_path):
    """With an objective that has control tokens: rows are added for them. A run that begins with
    parameters is validated before its first step."""
    one = changed(changed(begun, 'train', steps=2), 'evaluation', every=2)
    with prepare(one, tmp_path / 'fresh') as run, jax.set_mesh(run.mesh):
        first = run.validate(run.state.params)['loss']
    loop.train(one, tmp_path / 'one')
    found = [line for line in read_metrics(tmp_path / 'one') if line['kind'] == 'validation']
    assert [line['step'] for line in found] == [0, 2] and found[0]['loss'] == first
    default = started(replace(begun, start=str(tmp_path / 'one'), objective=MaskedLM()))
    second = settled(default, default)
    assert second.model.vocab == 0 and second.data.tokenizer.path == str(tmp_path / 'one')
    trained = restore.load(tmp_path / 'one', one_device(MeshConfig()))
    with prepare(second, tmp_path / 'two') as run:
        table_VD = np.asarray(run.state.params['embed_VD'])
        before_VD = np.asarray(trained.params['embed_VD'])
        assert run.experiment.model.vocab == len(table_VD) == 768  # 521 + 141, in 128s
        np.testing.assert_array_equal(table_VD[:ROWS], before_VD)
        mean_D = np.broadcast_to(before_VD.mean(axis=0), (768 - ROWS, 32))
        np.testing.assert_allclose(table_VD[ROWS:], mean_D, rtol=1e-5, atol=1e-7)
        batch = next(run.loader)
        assert batch['inputs'].max() >= ROWS, 'masks are among what is added'
        assert kept(tmp_path / 'two').source == written.TEMPLATE
        _, metrics = run.step(run.state, run.place(batch))
        assert np.isfinite(float(metrics['loss'])) and not metrics['skipped']
    said = '247 rows are added to the 521 of the embedding, each the mean of those'
    assert said in events(tmp_path / 'two')


@pytest.mark.slow
def test_rows_are_added_to_weights_of_others(begun, params, tmp_path):
    masked = started(replace(begun, objective=MaskedLM()))
    with prepare(settled(masked, masked), tmp_path / 'run') as run:
        table_VD = np.asarray(run.state.params['embed_VD'])
        assert run.experiment.model.vocab == len(table_VD) == 768
    np.testing.assert_array_equal(table_VD[:ROWS], params['embed_VD'])
    mean_D = params['embed_VD'].mean(axis=0)
    np.testing.assert_allclose(table_VD[[ROWS, -1]], [mean_D] * 2, rtol=1e-5, atol=1e-7)


def test_rows_are_added_before_they_are_placed(begun, params, tmp_path):
    """521 rows do not divide by 2, 576 do."""
    mesh = MAKE_MESH(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    found = pretrained.find(begun.start)
    with pytest.raises(ValueError, match='divi'):
        found.params(mesh)
    more_VD = np.asarray(found.params(mesh, rows=576)['embed_VD'])
    np.testing.assert_array_equal(more_VD[:ROWS], params['embed_VD'])
    mean_D = params['embed_VD'].mean(axis=0)
    np.testing.assert_allclose(more_VD[-1], mean_D, rtol=1e-5, atol=1e-7)


def test_rows_are_given_or_left_to_the_objective(begun):
    def rows(objective, **values):
        default = replace(begun, objective=objective)
        return settled(changed(default, 'model', **values), default).model.vocab

    assert (rows(CausalLM()), rows(MaskedLM()), rows(CausalLM(), vocab=640)) == (ROWS, 0, 640)
    check_start(changed(begun, 'model', vocab=640))
    with pytest.raises(UserError, match='differs in vocab: 521 -> 512: give --model.vocab'):
        check_start(changed(begun, 'model', vocab=512))


def test_a_tokenizer_of_another_model_gets_no_rows(begun, others, params, tmp_path):
    theirs = tmp_path / 'theirs'
    shutil.copytree(others, theirs)
    written.trained(600).save(str(theirs / 'tokenizer.json'))
    mine = started(replace(begun, start=str(theirs), objective=MaskedLM()))
    with pytest.raises(UserError, match='600 tokens and the embedding 521 rows: they are of'):
        settled(mine, mine)
    # Meta's files do not say how many rows there are; the weights do.
    meta = tmp_path / 'meta'
    meta.mkdir()
    facts = {'dim': 32, 'n_layers': 2, 'n_heads': MODEL.heads, 'n_kv_heads': MODEL.kv_heads}
    facts |= {'head_dim': MODEL.head_dim, 'hidden_dim': MODEL.ffn, 'norm_eps': 1e-5}
    (meta / 'params.json').write_text(json.dumps({**facts, 'max_seq_len': MODEL.context}))
    save_file(params_to_meta(params, MODEL), meta / 'consolidated.safetensors')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(theirs / name, meta / name)
    mine = started(replace(begun, start=str(meta), objective=MaskedLM()))
    with pytest.raises(UserError, match='600 tokens and the embedding 521 rows: they are of'):
        check_start(changed(mine, 'model', vocab=0))


def test_tokens_behind_the_embedding_are_left_out(begun, others, tmp_path, caplog):
    theirs = tmp_path / 'theirs'
    shutil.copytree(others, theirs)
    (theirs / 'added_tokens.json').write_text(json.dumps({'[PAD]': ROWS}))
    (theirs / 'adapter_config.json').write_text('{}')
    with prepare(started(replace(begun, start=str(theirs))), tmp_path / 'run') as run:
        assert run.experiment.model == MODEL
    assert f'tokens behind the embedding of {ROWS} rows are left out: [PAD]' in caplog.text
    assert caplog.text.count('holds an adapter') == 1, 'what is asked for often is told once'


@pytest.mark.slow
def test_what_may_be_set_otherwise_and_what_not(begun, tmp_path):
    longer = changed(begun, 'model', context=192, rope_theta=5e5)
    longer = changed(longer, 'train', seq_len=160, steps=2)
    loop.train(longer, tmp_path)
    said = [text for text in events(tmp_path) if 'another setting' in text]
    assert said == [
        'another setting than there: model.context: 96 -> 192',
        'another setting than there: model.rope_theta: 10000.0 -> 500000.0',
    ]
    other = changed(begun, 'model', ffn=32, bias=True)
    with pytest.raises(UserError, match='bias: False -> True; ffn: 64 -> 32: give --model.bias, -'):
        check_start(other)


def test_the_tokenizer_is_theirs(begun, others, tmp_path):
    recipe = begun.data.tokenizer
    small = changed(begun, 'data', tokenizer=replace(recipe, vocab=600))
    with pytest.raises(UserError, match='--data.tokenizer.vocab has no effect with --start'):
        settled(small, begun)
    own = changed(begun, 'data', tokenizer=TokenizerConfig(vocab=512))
    with pytest.raises(UserError, match=f'another tokenizer: set --data.tokenizer.path {others}'):
        loop.train(own, tmp_path / 'own')
    path = tmp_path / 'other.json'
    written.trained(480).save(str(path))
    another = changed(begun, 'data', tokenizer=replace(recipe, path=str(path)))
    with pytest.raises(UserError, match='another tokenizer'):
        loop.train(another, tmp_path / 'another')
    # The same one from elsewhere is the same.
    shutil.copytree(others, tmp_path / 'moved', ignore=shutil.ignore_patterns('*.safetensors'))
    moved = changed(begun, 'data', tokenizer=replace(recipe, path=str(tmp_path / 'moved')))
    with prepare(moved, tmp_path / 'run') as run:
        assert run.experiment.model.vocab == ROWS


@pytest.mark.parametrize(
    ('lacking', 'message'),
    [
        (['tokenizer.json'], 'has neither tokenizer.model nor tokenizer.json'),
        (['config.json'], 'holds no run, and is no model: .* has no config.json'),
        (['model.safetensors'], 'model.safetensors'),
    ],
)
def test_a_directory_that_is_not_whole(begun, others, tmp_path, lacking, message):
    broken = tmp_path / 'broken'
    shutil.copytree(others, broken, ignore=shutil.ignore_patterns(*lacking))
    with pytest.raises(UserError, match=message):
        loop.train(started(replace(begun, start=str(broken))), tmp_path / 'run')


def test_narrow_tokenizers(others):
    whole = tokenizer_of(others)
    assert whole.vocab_size > ROWS and whole.whole is whole
    narrow = whole.narrowed(ROWS)
    assert narrow.vocab_size == ROWS == len(narrow.byte_lengths) and narrow.whole is whole
    assert (narrow.bos_id, narrow.eos_id, narrow.pad_id) == (1, 2, 2)
    assert narrow.digest not in (whole.digest, whole.narrowed(ROWS + 1).digest)
    text = 'def f(x):\n    return x 你好'
    np.testing.assert_array_equal(narrow.encode(text), whole.encode(text))
    there = pickle.loads(pickle.dumps(narrow))
    assert (there.vocab_size, there.pad_id, there.digest) == (ROWS, 2, narrow.digest)
    with pytest.raises(KeyError):
        narrow.mask_id  # noqa: B018
    assert whole.narrowed(500) is None, 'there is text behind'


def test_rows_grow_on_a_mesh(params):
    mesh = MAKE_MESH(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    table_VD = params['embed_VD'][:520]
    placed = jax.device_put(table_VD, layout_of(table_VD, mesh))
    more = grown({'embed_VD': placed, 'norm': 1}, 640, ids=512, mesh=mesh)
    assert more['norm'] == 1 and more['embed_VD'].sharding == layout_of(more['embed_VD'], mesh)
    new_VD = np.asarray(more['embed_VD'])
    np.testing.assert_array_equal(new_VD[:520], table_VD)
    mean_D = table_VD[:512].mean(axis=0)
    np.testing.assert_allclose(new_VD[520:], np.tile(mean_D, (120, 1)), rtol=1e-5, atol=1e-7)


def layout_of(table, mesh):
    return layout.shardings({'embed_VD': table}, mesh)['embed_VD']
