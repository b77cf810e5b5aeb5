"""Adapters from a run to others and back: generated with, exported merged and alone, refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import export, generate, models, pretrain
from llama_jax import mesh as meshes
from llama_jax.convert import huggingface, peft, pretrained
from llama_jax.convert import params as params_lib
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.adapted import Adapted
from llama_jax.model.tune import LoRA, combined
from llama_jax.train import restore
from llama_jax.train.base import merged
from tests.convert import run as runs
from tests.convert import written
from tests.experiments.exported import CONFIG, refused, run, tokenizer
from tests.model.test_adapted import factors

__all__ = ['run', 'tokenizer']
TUNE = LoRA(rank=2, alpha=8.0, targets=('q_DNH', 'mlp'))


@pytest.fixture
def one():
    return meshes.make(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def base(tmp_path_factory, tokenizer):
    """The directory of a model of others, with its settings and parameters."""
    config = replace(CONFIG, vocab=tokenizer.vocab_size, vocab_padding=0)
    params = runs.random_params(config)
    path = tmp_path_factory.mktemp('base') / 'base'
    written.weights(path, config, params)
    tokenizer.save(path / 'tokenizer.model')
    return path, config, params


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, tokenizer, base):
    """A run of adapters upon it, with its settings and merged parameters."""
    path, config, params = base
    one = meshes.make(MeshConfig(), jax.devices()[:1])
    found = restore.base(
        replace(runs.experiment(config), start=str(path), tune=TUNE), one, None, recorded=None
    )
    adapters = factors(config, TUNE)
    workdir = runs.save(
        *(tmp_path_factory.mktemp('runs') / 'run', config, adapters, tokenizer),
        metadata={'start': found[1]},
        start=str(path),
        tune=TUNE,
    )
    whole = merged(combined(TUNE, jax.device_put(adapters), jax.device_put(params)), one)
    return workdir, config, jax.device_get(whole)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.slow
def test_merged_on_export_and_not_before(run_script, tuned, one):
    workdir, config, whole = tuned
    code, _, _ = run_script(export.main, 'out', '--checkpoint', workdir, '--to', 'huggingface')
    assert code == 0
    found = huggingface.load(Path('out'))
    assert found[0] == config
    assert_close(found[1], whole)
    assert isinstance(models.from_run(workdir, one).params['blocks']['attention']['q_DNH'], Adapted)
    text = ('--prompt', 'a', '--max-tokens', '12', '--temperature', '0')
    mine = run_script(generate.main, '--checkpoint', workdir, *text)
    theirs = run_script(generate.main, '--weights', 'out', *text)
    assert mine[:2] == theirs[:2] and mine[0] == 0 and len(mine[1]) > 1


@pytest.mark.slow
def test_alone_and_read_back_upon_their_base(run_script, tuned, base, one):
    workdir, config, whole = tuned
    code, _, error = run_script(export.main, 'out', '--checkpoint', workdir, '--to', 'peft')
    n = sum(x.size for x in jax.tree.leaves(factors(config, TUNE)))
    assert code == 0 and error[-1].startswith(f'wrote out: adapters of {n:,} parameters')
    assert sum(p.stat().st_size for p in Path('out').iterdir()) < 4 * n + 5000
    for name in ('out', f'{base[0]}+out'):
        found = pretrained.find(name)
        assert_close(params_lib.stacked(found.unread), whole)
        block = found.unmerged['blocks'][1]
        assert isinstance(block['mlp']['down_FD'], Adapted)
        assert not isinstance(block['attention']['k_DKH'], Adapted)
    text = ('--prompt', 'a', '--max-tokens', '12', '--temperature', '0')
    mine = run_script(generate.main, '--checkpoint', workdir, *text)
    theirs = run_script(generate.main, '--weights', 'out', *text)
    assert mine[:2] == theirs[:2] and mine[0] == 0
    other = ('other', '--checkpoint', workdir, '--to', 'peft', '--base', 'org/name')
    run_script(export.main, *other, '--dtype', 'bfloat16')
    kinds = {w.dtype.name for w in load_file('other/adapter_model.safetensors').values()}
    assert kinds == {'bfloat16'}
    assert (
        json.loads(Path('other/adapter_config.json').read_text())['base_model_name_or_path']
        == 'org/name'
    )
    with pytest.raises(UserError, match='adapters of org/name, which is not here'):
        pretrained.find('other')


@pytest.mark.parametrize(('alpha', 'said'), [(8.0, '8'), (2.5, '2.5')])
def test_alpha_is_a_whole_number_where_it_can_be(alpha, said, run_script, tuned):
    run_script(export.main, 'out', '--checkpoint', tuned[0], '--to', 'peft')
    params, tune = pretrained.find('out').unmerged, replace(TUNE, alpha=alpha)
    peft.write(Path('again'), params, tuned[1], tune, base='b', dtype='float32')
    assert f'"lora_alpha": {said},' in Path('again/adapter_config.json').read_text()


def test_alpha_is_8_where_nothing_is_said(run_script, tuned):
    """As PEFT's own default is."""
    run_script(export.main, 'out', '--checkpoint', tuned[0], '--to', 'peft')
    path = Path('out/adapter_config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | {'lora_alpha': None}))
    assert TUNE.alpha == 8
    assert_close(params_lib.stacked(pretrained.find('out').unread), tuned[2])


def test_one_layer_may_have_adapters(run_script, tuned, base, one):
    run_script(export.main, 'out', '--checkpoint', tuned[0], '--to', 'peft')
    tensors = load_file('out/adapter_model.safetensors')
    save_file(
        {k: v for k, v in tensors.items() if 'layers.1.' in k}, 'out/adapter_model.safetensors'
    )
    found = pretrained.find('out')
    w = params_lib.stacked(found.unread)['blocks']['mlp']['up_DF']
    np.testing.assert_array_equal(w[0], base[2]['blocks']['mlp']['up_DF'][0])
    np.testing.assert_allclose(w[1], tuned[2]['blocks']['mlp']['up_DF'][1], atol=1e-6)
    assert models.from_weights('out', one).programs(one, generate.Compute()) is not None


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'use_dora': True}, 'use_dora = True is not supported'),
        ({'bias': 'all'}, "bias = 'all' is not supported"),
        ({'modules_to_save': ['lm_head']}, "modules_to_save = .'lm_head'. is not supported"),
        ({'init_lora_weights': 'pissa'}, "init_lora_weights = 'pissa' is not supported"),
        ({'peft_type': 'IA3'}, "peft_type is 'IA3', and LORA is supported"),
        ({'of_tomorrow': 3}, 'of_tomorrow = 3 is not known'),
        ({'of_tomorrow': True}, 'of_tomorrow = True is not known'),
        ({'r': 4}, 'has shape .2, 32., and this model takes .4, 32.: .* is of other adapters'),
        ({'r': None}, 'and this model takes .8, 32.'),
        ({'rank_pattern': {'up_proj': 3}}, 'up_proj has shape .2, 32., and this model takes .3,'),
        ({'rank_pattern': {'up_proj': 0.5}}, 'rank_pattern.up_proj = 0.5 is no whole number'),
        ({'lora_alpha': 'x'}, "lora_alpha = 'x' is no positive number"),
        ({'target_modules': ['q_proj', 'k_proj']}, "targets 'k_proj', of which there are no"),
        ({'base_model_name_or_path': None}, 'names no base: name it before them, BASE+'),
        ({'base_model_name_or_path': ''}, 'names no base: name it before them, BASE+'),
        ({'base_model_name_or_path': 7}, 'names no base: name it before them, BASE+'),
        ({'base_model_name_or_path': 'out'}, 'out holds adapters of out, which is not here'),
    ],
)
def test_settings_that_would_compute_something_else(settings, message, run_script, tuned):
    run_script(export.main, 'out', '--checkpoint', tuned[0], '--to', 'peft')
    path = Path('out/adapter_config.json')
    unused = {'qalora_group_size': 16, 'lora_dropout': 0.3, 'revision': 'main', 'of_now': None}
    unused |= {'of_then': False}
    path.write_text(json.dumps(json.loads(path.read_text()) | unused))
    pretrained.find('out')
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        pretrained.find('out')


def rows_less(tensors, name):
    return tensors | {name: tensors[name][:, :-1]}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t, a, b: rows_less(t, a), 'takes .2, 32.: the adapters are of another model'),
        (lambda t, a, b: {k: v for k, v in t.items() if k != b}, 'there is lora_A alone'),
        (lambda t, a, b: t | {a: t[a] * np.nan}, 'holds numbers that are not finite'),
        (
            lambda t, a, b: (
                t | {a.replace('q_proj', 'w_proj'): t[a], b.replace('q_proj', 'w_proj'): t[b]}
            ),
            'is no weight of this model',
        ),
        (
            lambda t, a, b: t | {'base_model.model.lm_head.weight': t[a]},
            'is no factor of an adapter',
        ),
        (lambda t, a, b: {}, 'holds no adapters'),
    ],
)
def test_files_of_another_model(change, message, run_script, tuned):
    run_script(export.main, 'out', '--checkpoint', tuned[0], '--to', 'peft')
    tensors = load_file('out/adapter_model.safetensors')
    a, b = (f'base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight' for x in 'AB')
    save_file(
        {k: np.ascontiguousarray(v) for k, v in change(tensors, a, b).items()},
        'out/adapter_model.safetensors',
    )
    with pytest.raises(UserError, match=message):
        pretrained.find('out')


def test_exports_that_cannot_be(run_script, run, tuned):
    line = refused(run_script, 'out', '--checkpoint', run[0], '--to', 'peft')
    assert 'trained no adapters (Full): give --to huggingface' in line
    for both in ((), ('--checkpoint', tuned[0])):
        line = refused(run_script, 'out', '--weights', 'x', '--to', 'peft', *both)
        assert 'give --checkpoint DIRECTORY' in line
    line = refused(
        run_script, 'out', '--checkpoint', tuned[0], '--to', 'huggingface', '--base', 'x'
    )
    assert '--base x is of adapters alone' in line


def test_a_base_that_is_gone_or_changed(tuned, base, one, tmp_path):
    workdir = shutil.copytree(tuned[0], tmp_path / 'run')
    path = shutil.copytree(base[0], tmp_path / 'base')
    text = (workdir / 'run.json').read_text().replace(str(base[0]), str(path))
    (workdir / 'run.json').write_text(text)
    restore.load(workdir, one)  # the same at another place
    written.weights(path, base[1], runs.random_params(base[1], seed=9))
    with pytest.raises(UserError, match='is no longer what the run began with'):
        restore.load(workdir, one)
    shutil.rmtree(path)
    with pytest.raises(UserError, match=str(path)):
        restore.load(workdir, one)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--tune', 'LoRA'), 'there are none: give --start'),
        (
            ('--tune', 'lora', '--start', '{base}', '--tune.targets', 'w_DF'),
            "'w_DF' names no weight",
        ),
        (('--tune', 'LoRA', '--start', '{base}', '--tune.rank', '0'), '--tune.rank is 0'),
        (('--tune', 'LoRA', '--start', '{base}', '--tune.dropout', '1'), 'must be in [0, 1)'),
        (('--tune', 'LoRA', '--start', '{base}', '--tune.alpha', '-1'), 'must be positive'),
        (('--tune', 'Frozen', '--start', '{base}'), 'trains the parameters of the objective alone'),
        (
            (
                '--tune',
                'QLoRA',
            ),
            '--tune QLoRA: did you mean LoRA? there are Full, LoRA, Frozen',
        ),
        (('--tune.rank', '4'), '--tune.rank is a setting of LoRA, and this trains Full'),
    ],
)
def test_a_tune_that_cannot_be(options, message, run_script, base):
    options = [option.format(base=base[0]) for option in options]
    code, _, error = run_script(pretrain.main, 'quickstart', *options)
    assert code == 2 and len([line for line in error if line]) <= 2 and message in error[-1]
