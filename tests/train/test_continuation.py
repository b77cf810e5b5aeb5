"""Runs that go on with other settings: what may change, what must not, and the remedies."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.optim.schedule import Ramp
from llama_jax.train import loop, resume
from llama_jax.train.branch import branch
from llama_jax.train.checkpoint import SCORES, Checkpoints, present
from llama_jax.train.config_file import ConfigFile
from llama_jax.train.experiment import from_dict, to_dict
from llama_jax.train.records import read_metrics, read_run
from llama_jax.train.restore import load
from tests.train.conftest import changed, events, one_device, scheduled

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


def rates(workdir):
    lines = [line for line in read_metrics(workdir) if line['kind'] == 'train']
    return {line['step']: line['learning_rate'] for line in lines}


def saved(workdir, step):
    """Metadata of a checkpoint."""
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=9, read_only=True)
    try:
        return checkpoints.metadata(step)
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_a_finished_run_goes_on_without_a_jump_and_a_kill_changes_nothing(
    copied_run, short, tmp_path
):
    longer = changed(short, 'train', steps=16)
    loop.train(longer, copied_run)
    got = rates(copied_run)
    assert list(got) == list(range(1, 17))
    steps = np.array([got[step] for step in range(8, 17)])
    assert got[9] == pytest.approx(1e-3)  # where the cosine of 8 steps ended
    assert got[10] == pytest.approx((got[9] + got[11]) / 2)  # a line over the 2 steps of warm-up
    fresh = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * (np.arange(10, 16) - 2) / 14)) / 2)
    np.testing.assert_allclose(steps[3:], fresh, rtol=1e-5)  # then as if begun with 16
    (said,) = [text for text in events(copied_run) if 'learning rate' in text]
    assert 'from 0.001 after step 8' in said and 'after step 10' in said and '16 steps' in said
    # A run that is killed on the line, or behind it, knows of it.
    assert saved(copied_run, 8)['ramp'] is None
    kept = saved(copied_run, 12)
    assert kept['ramp'] == {'begin': 8, 'rate': pytest.approx(1e-3), 'steps': 2}
    for step in (9, 12):
        again = resume.continuation({**kept, 'step': step}, longer, copied_run)
        assert again == (Ramp(**kept['ramp']), [])
    # From the checkpoint of step 12, which knows of the line, and then of 8, which does not.
    losses = [line['loss'] for line in read_metrics(copied_run) if line['kind'] == 'train']
    for step in (16, 12):
        shutil.rmtree(copied_run / 'checkpoints' / str(step))
        loop.train(longer, copied_run)
        assert rates(copied_run) == got
        again = [line['loss'] for line in read_metrics(copied_run) if line['kind'] == 'train']
        assert again == losses


def test_a_branch_goes_on_as_the_run_did(short_run, short, tmp_path):
    workdir = tmp_path / 'branch'
    branch(f'{short_run}@4', workdir)
    loop.train(short, workdir)

    def losses(run):
        lines = [line for line in read_metrics(run) if line['kind'] == 'train']
        return {line['step']: line['loss'] for line in lines}

    assert losses(workdir) == losses(short_run)
    assert 'resumed from the checkpoint of step 4' in events(workdir)
    branch(f'{short_run}@4', workdir)  # the same command again goes on
    assert present(workdir / 'checkpoints') == [4, 8]
    for run, where, said in (
        (f'{short_run}@8', workdir, 'holds something that is no branch of'),
        (f'{short_run}@4', tmp_path, 'holds something that is no branch of'),
        (f'{short_run}@5', tmp_path / 'other', 'has no checkpoint of step 5'),
        (f'{short_run}@mean:2', tmp_path / 'other', 'a mean has no optimizer'),
    ):
        with pytest.raises(UserError, match=said):
            branch(run, where)


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
    # Nothing of a run that is short_run, nor of one whose rate is where it was.
    assert said(scheduled(short, peak=1e-3)) == said(short) == []
    assert said(scheduled(short, peak=1e-3, kind='constant')) == []


@pytest.mark.slow
def test_a_lower_rate_holds_at_once(copied_run, short):
    shutil.rmtree(copied_run / 'checkpoints' / '8')
    loop.train(scheduled(short, peak=1e-3), copied_run)
    got = rates(copied_run)
    before = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * 2 / 6)) / 2)
    assert got[5] == pytest.approx(before / 10) and got[4] > before
    assert any('falls from 0.00775 to 0.000775 after step 4' in text for text in events(copied_run))


@pytest.mark.slow
def test_optimizer_settings_that_may_change_load_the_state_and_hold(copied_run, short):
    """Clip, decay, betas and another kind of schedule, in a real restore."""
    shutil.rmtree(copied_run / 'checkpoints' / '8')
    other = changed(
        scheduled(short, kind='wsd', warmup_steps=1, decay_share=0.5),
        'optimizer',
        clip=1e-6,
        weight_decay=1e-6,
        decay_embeddings=True,
        beta1=0.8,
        beta2=0.9,
        eps=1.0,
    )
    other = scheduled(other, kind='wsd', warmup_steps=1, decay_share=0.5)
    before = load(f'{copied_run}@4', one_device(MeshConfig()))
    loop.train(other, copied_run)
    after = load(copied_run, one_device(MeshConfig()))
    assert after.step == 8
    # Clipped to nothing, almost without decay, and with an epsilon of 1: what is left of the first
    # moment is all that moves.
    moved = np.abs(np.subtract(after.params['embed_VD'], before.params['embed_VD'])).max()
    assert 0 < moved < 1e-3
    assert from_dict(saved(copied_run, 8)['experiment']).optimizer == other.optimizer
    assert 'resumed from the checkpoint of step 4' in events(copied_run)
    assert sum('setting changed' in text for text in events(copied_run)) == 9


@pytest.mark.parametrize('steps', [4, 7])
def test_fewer_steps_than_taken_are_refused_and_the_remedy_works(copied_run, short, steps):
    with pytest.raises(UserError, match='has taken 8 steps') as raised:
        loop.train(changed(short, 'train', steps=steps), copied_run)
    assert '\n' not in str(raised.value)
    remedy = int(re.search(r'set --train.steps (\d+) or more', str(raised.value))[1])
    loop.train(changed(short, 'train', steps=remedy), copied_run)  # equal: nothing to train
    assert list(rates(copied_run)) == list(range(1, 9))


def test_moved_files_of_equal_content_are_taken(copied_run, short, text, tmp_path):
    (tmp_path / 'moved').mkdir()
    shutil.copy(text, tmp_path / 'moved')
    source = replace(short.data.sources[0], files=(str(tmp_path / 'moved' / '*.jsonl'),))
    tokenizer = replace(short.data.tokenizer, path=str(copied_run / 'tokenizer.model'))
    moved = changed(short, 'data', sources=(source,), tokenizer=tokenizer)
    reference = rates(copied_run)
    shutil.rmtree(copied_run / 'checkpoints' / '8')
    loop.train(moved, copied_run)
    assert rates(copied_run) == reference
    assert sum('with the same content: data.' in text for text in events(copied_run)) == 2


@pytest.mark.slow
def test_files_of_other_content_are_refused_and_the_remedy_works(copied_run, short, text, tmp_path):
    (tmp_path / text.name).write_text(text.read_text() + '\n{"text": "def new(): ..."}')
    source = replace(short.data.sources[0], files=(str(tmp_path / text.name),))
    # The same tokenizer, so that the documents themselves are compared.
    tokenizer = replace(short.data.tokenizer, path=str(copied_run / 'tokenizer.model'))
    other = changed(short, 'data', sources=(source,), tokenizer=tokenizer)
    with pytest.raises(UserError, match='the data is not what the run') as raised:
        loop.train(other, copied_run)
    message = str(raised.value)
    assert f'data.sources.0.files.0: {str(text)!r} -> {str(tmp_path / text.name)!r}' in message
    assert f'--workdir and --start {copied_run}' in message
    other = changed(replace(other, start=str(copied_run)), 'train', steps=4)
    loop.train(other, tmp_path / 'other')
    assert f'begun with the parameters of {copied_run}, step 8' in events(tmp_path / 'other')


def test_another_tokenizer_is_refused_and_the_remedy_works(copied_run, short, monkeypatch):
    other = changed(short, 'data', tokenizer=replace(short.data.tokenizer, sample_bytes=20_000))
    with pytest.raises(UserError, match='the tokenizer is not that of') as raised:
        loop.train(other, copied_run)
    assert 'data.tokenizer.sample_bytes: ' in str(raised.value)
    assert 'the text has changed from which it is learnt' in str(raised.value)
    path = re.search(r'--data.tokenizer.path (\S+),', str(raised.value))[1]
    remedied = replace(other.data.tokenizer, path=path)
    loop.train(changed(other, 'data', tokenizer=remedied), copied_run)


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
    short_run, short, section, values, follow, tmp_path
):
    other = changed(short, section, **values)
    with pytest.raises(UserError, match='holds another experiment; it differs in') as raised:
        loop.train(other, short_run)
    message = str(raised.value)
    ((name, value),) = values.items()
    assert f'{name}: ' in message and f'-> {value!r}:' in message and '\n' not in message
    assert message.endswith(
        f'give another --workdir and --start {short_run}, which begins with the parameters '
        'trained; or go on with the settings it began with'
    )
    if follow:  # which compiles another program
        loop.train(changed(replace(other, start=str(short_run)), 'train', steps=3), tmp_path)
        assert list(rates(tmp_path)) == [1, 2, 3]
        assert load(tmp_path, one_device(MeshConfig())).step == 3


def test_another_architecture_begins_anew(short_run, short):
    for other in (changed(short, 'model', ffn=32), changed(short, 'model', ffn=32, context=65)):
        with pytest.raises(UserError) as raised:
            resume.check_workdir(short_run, other)
        assert 'model.ffn: 64 -> 32' in str(raised.value)
        assert '--start' not in str(raised.value)
        resume.check_workdir(short_run.parent, other)


def test_a_record_of_an_older_version_lacks_what_has_its_default(copied_run, short):
    facts = read_run(copied_run)
    del facts['experiment']['optimizer']['moments'], facts['experiment']['compute']['unroll']
    (copied_run / 'run.json').write_text(json.dumps(facts))
    resume.check_workdir(copied_run, short)
    with pytest.raises(UserError, match="optimizer.moments: 'float32' -> 'bfloat16'"):
        resume.check_workdir(copied_run, changed(short, 'optimizer', moments='bfloat16'))


def test_a_broken_record_is_one_line_and_the_remedy_works(copied_run, short):
    for broken in ('[]', '{}', '{"experiment": {}}', '{"experiment": {"mod'):
        (copied_run / 'run.json').write_text(broken)
        with pytest.raises(UserError, match=r'run\.json') as raised:
            loop.train(short, copied_run)
        assert '\n' not in str(raised.value)
    (copied_run / 'run.json').unlink()
    loop.train(short, copied_run)
    assert read_run(copied_run)['experiment'] == json.loads(json.dumps(to_dict(short)))


def test_a_run_that_died_before_its_first_checkpoint_binds_nobody(copied_run, short):
    shutil.rmtree(copied_run / 'checkpoints')
    (copied_run / 'checkpoints' / '4.orbax-checkpoint-tmp').mkdir(parents=True)
    resume.check_workdir(copied_run, changed(short, 'model', ffn=32))


def test_checkpoints_of_another_format_are_refused(copied_run, short, monkeypatch):
    monkeypatch.setattr(resume, 'FORMAT', resume.FORMAT + 1)
    with pytest.raises(UserError, match='saved by another version'):
        loop.train(short, copied_run)


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


@pytest.mark.slow
def test_the_file_of_a_configuration_is_kept_and_a_change_of_it_is_said(
    short, copied_run, tmp_path
):
    first = ConfigFile(tmp_path / 'mine.py', 'experiment', 'def experiment(): ...  # 一'.encode())
    for config_file in (first, replace(first, source=b'another')):
        loop.train(short, copied_run, config_file=config_file)
        assert (copied_run / 'configuration.py').read_bytes() == config_file.source
        facts = read_run(copied_run)['configuration']
        assert facts['sha256'] == config_file.digest and facts['name'] == 'experiment'
    (line,) = [line for line in events(copied_run) if 'mine.py' in line]
    assert line.startswith(f'{first} is not as it was when the run was last started (sha256 ')


@pytest.mark.slow
def test_scores_of_another_validation_do_not_choose_the_best(copied_run, short):
    """Its figures are of other texts: no level of theirs ends the run or keeps a checkpoint."""
    scores = copied_run / SCORES
    before = json.loads(scores.read_text())
    before['scores'] = dict.fromkeys(before['scores'], 0.0)  # no figure to come is better
    scores.write_text(json.dumps(before))
    longer = changed(short, 'train', steps=12)
    loop.train(changed(longer, 'evaluation', batches=2, patience=1), copied_run)
    assert any(
        text.startswith('the validation reads something else than before: the scores of steps 4, 8')
        for text in events(copied_run)
    )
    after = json.loads(scores.read_text())
    assert after['scores'].keys() == {'8', '12'} and after['of'] != before['of']
    assert min(after['scores'].values()) > 0
