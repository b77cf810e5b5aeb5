"""Runs that go on with other settings: what may change, what must not, and the remedies."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.train import loop, resume, run
from llama_jax.train.checkpoint import SCORES, Checkpoints
from llama_jax.train.experiment import from_dict, to_dict
from llama_jax.train.records import read_metrics, read_run
from llama_jax.train.restore import check_start, load, named
from tests.train.conftest import changed

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)
make_mesh = meshes.make


def one_device(config):
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.fixture(scope='module')
def short(experiment):
    """8 steps, checkpoints and validations of the steps 4 and 8."""
    short = changed(experiment, 'train', steps=8)
    short = changed(short, 'evaluation', every=4, batches=1)
    short = scheduled(short, peak=1e-2, warmup_steps=2)
    return changed(short, 'checkpoint', every=4, keep=3)


@pytest.fixture(scope='module')
def finished(short, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(meshes, 'make', one_device)
        loop.train(short, workdir)
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, for a test to go on with."""
    return shutil.copytree(finished, tmp_path / 'run')


def scheduled(experiment, **values):
    schedule = replace(experiment.optimizer.schedule, **values)
    return changed(experiment, 'optimizer', schedule=schedule)


def rates(workdir):
    lines = [line for line in read_metrics(workdir) if line['kind'] == 'train']
    return {line['step']: line['learning_rate'] for line in lines}


def events(workdir):
    return [line['text'] for line in read_metrics(workdir) if line['kind'] == 'event']


def saved(workdir, step):
    """Metadata of a checkpoint."""
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=9, read_only=True)
    try:
        return checkpoints.metadata(step)
    finally:
        checkpoints.close()


def test_a_finished_run_goes_on_without_a_jump_and_a_kill_changes_nothing(copied, short, tmp_path):
    longer = changed(short, 'train', steps=16)
    loop.train(longer, copied)
    got = rates(copied)
    assert list(got) == list(range(1, 17))
    steps = np.array([got[step] for step in range(8, 17)])
    assert got[9] == pytest.approx(1e-3)  # where the cosine of 8 steps ended
    assert got[10] == pytest.approx((got[9] + got[11]) / 2)  # a line over the 2 steps of warm-up
    fresh = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * (np.arange(10, 16) - 2) / 14)) / 2)
    np.testing.assert_allclose(steps[3:], fresh, rtol=1e-5)  # then as if begun with 16
    (said,) = [text for text in events(copied) if 'learning rate' in text]
    assert 'from 0.001 after step 8' in said and 'after step 10' in said and '16 steps' in said
    # From the checkpoint of step 12, which knows of the line, and then of 8, which does not.
    losses = [line['loss'] for line in read_metrics(copied) if line['kind'] == 'train']
    for step in (16, 12):
        shutil.rmtree(copied / 'checkpoints' / str(step))
        loop.train(longer, copied)
        assert rates(copied) == got
        again = [line['loss'] for line in read_metrics(copied) if line['kind'] == 'train']
        assert again == losses


def test_what_is_said_of_the_rate(short, tmp_path):
    metadata = {'experiment': to_dict(short), 'step': 8, 'ramp': None}

    def said(experiment):
        notes = resume.continuation(metadata, experiment, tmp_path).notes
        return [note for note in notes if 'learning rate' in note]

    assert said(changed(short, 'train', steps=9)) == [
        'the learning rate stays at 0.001 until step 9'
    ]
    assert said(changed(short, 'train', steps=10)) == [
        'the learning rate stays at 0.001 until step 10'
    ]
    (line,) = said(changed(short, 'train', steps=11))
    assert line.startswith('the learning rate goes from 0.001 after step 8 in a straight line to ')
    assert line.endswith(' after step 10, then goes by the schedule of 11 steps')
    # Nothing of a run that is finished, nor of one whose rate is where it was.
    assert said(scheduled(short, peak=1e-3)) == said(short) == []
    assert said(scheduled(short, peak=1e-3, kind='constant')) == []


def test_a_lower_rate_holds_at_once(copied, short):
    shutil.rmtree(copied / 'checkpoints' / '8')
    loop.train(scheduled(short, peak=1e-3), copied)
    got = rates(copied)
    before = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * 2 / 6)) / 2)
    assert got[5] == pytest.approx(before / 10) and got[4] > before
    assert any('falls from 0.00775 to 0.000775 after step 4' in text for text in events(copied))


def test_optimizer_settings_that_may_change_load_the_state_and_hold(copied, short):
    """Clip, decay, betas and another kind of schedule, in a real restore."""
    shutil.rmtree(copied / 'checkpoints' / '8')
    other = changed(
        scheduled(short, kind='wsd', warmup_steps=1, decay_share=0.5),
        'optimizer',
        clip=1e-6,
        weight_decay=0.0,
        decay_embeddings=True,
        beta1=0.8,
        beta2=0.9,
        eps=1.0,
    )
    other = scheduled(other, kind='wsd', warmup_steps=1, decay_share=0.5)
    before = load(f'{copied}@4', one_device(MeshConfig()))
    loop.train(other, copied)
    after = load(copied, one_device(MeshConfig()))
    assert after.step == 8
    # Clipped to nothing, without decay, and with an epsilon of 1: what is left of the first
    # moment is all that moves.
    moved = np.abs(np.subtract(after.params['embed_VD'], before.params['embed_VD'])).max()
    assert 0 < moved < 1e-3
    assert from_dict(saved(copied, 8)['experiment']).optimizer == other.optimizer
    assert 'resumed from the checkpoint of step 4' in events(copied)
    assert sum('setting changed' in text for text in events(copied)) == 9


@pytest.mark.parametrize('steps', [4, 7])
def test_fewer_steps_than_taken_are_refused_and_the_remedy_works(copied, short, steps):
    with pytest.raises(UserError, match='has taken 8 steps') as raised:
        loop.train(changed(short, 'train', steps=steps), copied)
    assert '\n' not in str(raised.value)
    remedy = int(re.search(r'set --train.steps (\d+) or more', str(raised.value))[1])
    loop.train(changed(short, 'train', steps=remedy), copied)  # equal: nothing to train
    assert list(rates(copied)) == list(range(1, 9))


def test_moved_files_of_equal_content_are_taken(copied, short, text, tmp_path):
    (tmp_path / 'moved').mkdir()
    shutil.copy(text, tmp_path / 'moved')
    source = replace(short.data.sources[0], files=(str(tmp_path / 'moved' / '*.jsonl'),))
    tokenizer = replace(short.data.tokenizer, path=str(copied / 'tokenizer.model'))
    moved = changed(short, 'data', sources=(source,), tokenizer=tokenizer)
    reference = rates(copied)
    shutil.rmtree(copied / 'checkpoints' / '8')
    loop.train(moved, copied)
    assert rates(copied) == reference
    assert sum('with the same content: data.' in text for text in events(copied)) == 2


def test_files_of_other_content_are_refused_and_the_remedy_works(copied, short, text, tmp_path):
    (tmp_path / text.name).write_text(text.read_text() + '\n{"text": "def new(): ..."}')
    source = replace(short.data.sources[0], files=(str(tmp_path / text.name),))
    # The same tokenizer, so that the documents themselves are compared.
    tokenizer = replace(short.data.tokenizer, path=str(copied / 'tokenizer.model'))
    other = changed(short, 'data', sources=(source,), tokenizer=tokenizer)
    with pytest.raises(UserError, match='the data is not what the run') as raised:
        loop.train(other, copied)
    message = str(raised.value)
    assert f'data.sources.0.files.0: {str(text)!r} -> {str(tmp_path / text.name)!r}' in message
    assert f'--workdir and --start {copied}' in message
    other = changed(replace(other, start=str(copied)), 'train', steps=4)
    loop.train(other, tmp_path / 'other')
    assert f'begun with the parameters of {copied}, step 8' in events(tmp_path / 'other')


def test_another_tokenizer_is_refused_and_the_remedy_works(copied, short, monkeypatch):
    other = changed(short, 'data', tokenizer=replace(short.data.tokenizer, sample_bytes=20_000))
    with pytest.raises(UserError, match='the tokenizer is not that of') as raised:
        loop.train(other, copied)
    assert 'data.tokenizer.sample_bytes: ' in str(raised.value)
    assert 'the text has changed from which it is learnt' in str(raised.value)
    path = re.search(r'--data.tokenizer.path (\S+),', str(raised.value))[1]
    remedied = replace(other.data.tokenizer, path=path)
    loop.train(changed(other, 'data', tokenizer=remedied), copied)


@pytest.mark.parametrize(
    'section, values, follow',
    [
        ('train', {'batch': 16}, False),
        ('train', {'seq_len': 16}, False),
        ('model', {'context': 128}, True),
        ('model', {'rope_theta': 5e5}, False),
        ('optimizer', {'moments': 'bfloat16'}, True),
    ],
    ids=str,
)
def test_what_is_fixed_is_named_and_the_remedy_works(
    finished, short, section, values, follow, tmp_path
):
    other = changed(short, section, **values)
    with pytest.raises(UserError, match='holds another experiment; it differs in') as raised:
        loop.train(other, finished)
    message = str(raised.value)
    ((name, value),) = values.items()
    assert f'{name}: ' in message and f'-> {value!r}:' in message and '\n' not in message
    assert message.endswith(
        f'give another --workdir and --start {finished}, which begins with the parameters '
        'trained; or go on with the settings it began with'
    )
    if follow:  # which compiles another program
        loop.train(changed(replace(other, start=str(finished)), 'train', steps=3), tmp_path)
        assert list(rates(tmp_path)) == [1, 2, 3]
        assert load(tmp_path, one_device(MeshConfig())).step == 3


def test_another_architecture_begins_anew(finished, short):
    for other in (changed(short, 'model', ffn=32), changed(short, 'model', ffn=32, context=65)):
        with pytest.raises(UserError) as raised:
            resume.check_workdir(finished, other)
        assert 'model.ffn: 64 -> 32' in str(raised.value)
        assert '--start' not in str(raised.value)
        resume.check_workdir(finished.parent, other)


def test_a_record_of_an_older_version_lacks_what_has_its_default(copied, short):
    facts = read_run(copied)
    del facts['experiment']['optimizer']['moments'], facts['experiment']['compute']['unroll']
    (copied / 'run.json').write_text(json.dumps(facts))
    resume.check_workdir(copied, short)
    with pytest.raises(UserError, match="optimizer.moments: 'float32' -> 'bfloat16'"):
        resume.check_workdir(copied, changed(short, 'optimizer', moments='bfloat16'))


def test_a_broken_record_is_one_line_and_the_remedy_works(copied, short):
    for broken in ('[]', '{}', '{"experiment": {}}', '{"experiment": {"mod'):
        (copied / 'run.json').write_text(broken)
        with pytest.raises(UserError, match=r'run\.json') as raised:
            loop.train(short, copied)
        assert '\n' not in str(raised.value)
    (copied / 'run.json').unlink()
    loop.train(short, copied)
    assert read_run(copied)['experiment'] == json.loads(json.dumps(to_dict(short)))


def test_a_run_that_died_before_its_first_checkpoint_binds_nobody(copied, short):
    shutil.rmtree(copied / 'checkpoints')
    (copied / 'checkpoints' / '4.orbax-checkpoint-tmp').mkdir(parents=True)
    resume.check_workdir(copied, changed(short, 'model', ffn=32))


def test_checkpoints_of_another_format_are_refused(copied, short, monkeypatch):
    monkeypatch.setattr(resume, 'FORMAT', resume.FORMAT + 1)
    with pytest.raises(UserError, match='saved by another version'):
        loop.train(short, copied)


def test_the_longest_name_decides():
    assert resume.rule_of('data.sources.0.files.3').rule == 'by content'
    assert resume.rule_of('data.sources.12.weight').rule == 'fixed'
    assert resume.rule_of('data.sources').rule == 'fixed'
    assert resume.rule_of('data.workers').rule == 'may change'
    assert resume.rule_of('model.rope_scaling.factor').remedy
    assert resume.rule_of('names').rule == 'fixed'  # no setting has it
    assert resume.rule_of('train.steps').rule == 'may change'


def test_every_setting_has_a_rule_and_the_docs_have_the_table(short):
    def settings(value, path=''):
        if not isinstance(value, dict):
            yield path
            return
        for name, item in value.items():
            yield from settings(item, f'{path}.{name}'.lstrip('.'))

    for setting in settings(to_dict(short)):
        assert resume.rule_of(setting).why, setting
    page = Path(__file__).parents[2] / 'docs/training.md'
    assert resume.table() in page.read_text('utf-8')


def embedding(run):
    return np.asarray(load(run, one_device(MeshConfig())).params['embed_VD'])


def test_a_checkpoint_is_named_by_its_step_or_as_the_best(finished, copied):
    loaded = {at: load(f'{finished}{at}', one_device(MeshConfig())) for at in ('', '@4', '@8')}
    assert {at: trained.step for at, trained in loaded.items()} == {'': 8, '@4': 4, '@8': 8}
    assert not np.array_equal(loaded['@4'].params['embed_VD'], loaded['@8'].params['embed_VD'])
    np.testing.assert_array_equal(embedding(finished), embedding(f'{finished}@8'))
    # The best is not the newest: as if step 8 had been validated worse.
    scores = json.loads((copied / SCORES).read_text())
    (copied / SCORES).write_text(json.dumps({**scores, '8': 99.0}))
    assert load(f'{copied}@best', one_device(MeshConfig())).step == 4
    assert load(f'{finished}@best', one_device(MeshConfig())).step == 8
    (copied / SCORES).unlink()
    with pytest.raises(UserError, match=r'was validated.* such as .*@8 \(there are 4, 8\)'):
        load(f'{copied}@best', one_device(MeshConfig()))


def test_without_a_likelihood_the_lowest_loss_is_the_best():
    assert run.score({'loss': 3.0, 'bits_per_byte': 1.5}) == 1.5
    assert run.score({'loss': 3.0}) == 3.0
    assert run.score({'loss': math.nan}) is None
    assert run.score({'loss': 3.0, 'bits_per_byte': math.inf}) is None


@pytest.mark.parametrize(
    'at, message',
    [
        ('@400', 'has no checkpoint of step 400: there are those of 4, 8'),
        ('@latest', 'after @ comes the number of a step, or best'),
        ('@', 'after @ comes the number of a step, or best'),
        ('/nowhere@4', 'holds no run'),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told(finished, at, message):
    with pytest.raises(UserError, match=message):
        load(f'{finished}{at}', one_device(MeshConfig()))


def test_a_directory_with_an_at_in_its_name_is_a_directory(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run@4')
    assert load(tmp_path / 'run@4', one_device(MeshConfig())).step == 8
    assert load(f'{tmp_path}/run@4@4', one_device(MeshConfig())).step == 4
    assert named('a@b/c').workdir == Path('a@b/c')
    assert named('~/runs/a@best') == (Path.home() / 'runs/a', 'best')


def test_a_named_checkpoint_that_is_damaged_is_told_not_passed_over(copied):
    files = [path for path in (copied / 'checkpoints/8/params').rglob('*') if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(UserError, match=r'checkpoint 8 in .* is damaged .* another of 4, 8'):
        load(f'{copied}@8', one_device(MeshConfig()))
    assert load(copied, one_device(MeshConfig())).step == 4


def test_a_run_begins_with_any_step_of_another_and_a_longer_context(finished, short, tmp_path):
    longer = changed(replace(short, start=f'{finished}@4'), 'model', context=128)
    prepared = run.prepare(longer, tmp_path)
    with prepared:
        np.testing.assert_array_equal(prepared.state.params['embed_VD'], embedding(f'{finished}@4'))
        assert int(prepared.state.step) == 0
    assert events(tmp_path) == [
        f'begun with the parameters of {finished}@4, step 4',
        'another setting than there: model.context: 64 -> 128',
    ]


@pytest.mark.parametrize(
    'start, values, message',
    [
        ('', {'ffn': 32}, 'differs in ffn: 64 -> 32: give --model.ffn as it has'),
        ('@5', {}, 'has no checkpoint of step 5'),
        ('/nowhere', {}, 'holds no run'),
    ],
)
def test_a_start_that_does_not_fit_is_told_before_anything_is_made(
    finished, short, monkeypatch, tmp_path, start, values, message
):
    monkeypatch.setattr(run, 'load_tokenizer', lambda config: 1 / 0)
    other = changed(replace(short, start=f'{finished}{start}'), 'model', **values)
    with pytest.raises(UserError, match=message):
        loop.train(other, tmp_path)


def test_learned_positions_do_not_grow(copied, short, tmp_path):
    facts = read_run(copied)
    facts['experiment']['model']['positions'] = 'learned'
    (copied / 'run.json').write_text(json.dumps(facts))
    start = changed(replace(short, start=str(copied)), 'model', positions='learned')
    check_start(start)
    with pytest.raises(UserError, match='a table of 64 rows: set --model.context 64'):
        check_start(changed(start, 'model', context=128))
