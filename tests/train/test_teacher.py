"""Distillation by runs: with the teacher beside the model, and with what it said before."""

import errno
import gc
import json
import shutil
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
import pytest

from llama_jax.data.config import Source
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.mesh import make as make_mesh
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.masked_inputs import MaskedInputs
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import loop, run, teacher
from llama_jax.train.checkpoint import numpy_tree
from tests.train import preferring
from tests.train.conftest import changed, one_device
from tests.train.every import VOCAB
from tests.train.preferring import lines

TASK = InstructionTuning(z_loss=1e-3)


@pytest.fixture(autouse=True)
def of_one_device(monkeypatch):
    monkeypatch.setattr(run.meshes, 'make', one_device)


def chats(path):
    """The answers of pairs as chats, which are never cut."""
    said = [
        {
            'messages': [
                {'role': 'user', 'content': one['prompt'][:8]},
                {'role': 'assistant', 'content': one['chosen'][:12]},
            ]
        }
        for one in preferring.read(preferring.written(path))
    ]
    path.write_text('\n'.join(map(json.dumps, said)), 'utf-8')
    return path


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    directory = tmp_path_factory.mktemp('chats')
    experiment = preferring.experiment(TASK, directory)
    files = str(chats(directory / 'chats.jsonl'))
    data = replace(
        experiment.data,
        sources=(Source('records', files=(files,)),),
        validation=(Source('records', files=(files,), label='again'),),
        chat='llama2',
    )
    experiment = replace(experiment, data=data, seed=1)
    return changed(experiment, 'train', seq_len=64)


@pytest.fixture(scope='module')
def taught(student, tmp_path_factory):
    """A run that knows a little more."""
    workdir = tmp_path_factory.mktemp('teacher') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(run.meshes, 'make', one_device)
        loop.train(changed(replace(student, seed=0), 'model', dim=24), workdir)
    return workdir


@pytest.fixture(scope='module')
def online(student, taught, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('online') / 'run'
    experiment = replace(student, objective=Distillation(str(taught), TASK, temperature=2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'peak_flops', lambda device: (1e12, 'of a test'))
        patch.setattr(run.meshes, 'make', one_device)
        loop.train(experiment, workdir)
    return experiment, workdir


@pytest.mark.slow
def test_a_student_comes_nearer_and_its_teacher_is_in_no_checkpoint(online, taught):
    experiment, workdir = online
    steps = lines(workdir, 'train')
    assert 0 < steps[-1]['kl'] < steps[0]['kl'] - 0.01
    assert lines(workdir, 'validation')[-1]['kl'] > 0
    preferring.assert_golden('distillation', workdir)
    forward = TASK.flops(replace(experiment.model, dim=24), 64) / 3
    whole = experiment.objective.flops(experiment.model, 64) + forward
    assert json.loads((workdir / 'run.json').read_text())['flops_per_token'] == pytest.approx(whole)
    said_before = replace(experiment, objective=replace(experiment.objective, top_k=2))
    assert teacher.flops(said_before) == 0
    kept = {path.name for path in (workdir / 'checkpoints' / '20').rglob('*') if path.is_dir()}
    assert not any('teacher' in name for name in kept)


@pytest.mark.slow
def test_the_teacher_stands_on_the_mesh_of_the_student(online, tmp_path, monkeypatch):
    experiment, _ = online
    made = []

    def make(config, devices=None):
        made.append(make_mesh(config, jax.devices()[:4]))
        return made[-1]

    monkeypatch.setattr(run.meshes, 'make', make)
    loop.train(replace(experiment, mesh=MeshConfig(fsdp=4)), tmp_path / 'run')
    assert all(mesh.size == 4 for mesh in made)
    preferring.assert_golden('distillation', tmp_path / 'run')


def test_a_run_that_goes_on_has_the_same_teacher(online, taught, tmp_path):
    """Also where the teacher has been trained further since."""
    experiment, workdir = online
    resumed = shutil.copytree(workdir, tmp_path / 'run')
    shutil.rmtree(resumed / 'checkpoints' / '20')
    loop.train(experiment, resumed)
    assert lines(resumed, 'train') == lines(workdir, 'train')


@pytest.mark.slow
def test_what_the_teacher_said_of_all_tokens_is_the_teacher(online, student, tmp_path):
    """k = V: the same losses; computed once and read again."""
    experiment, workdir = online
    whole = replace(experiment.objective, top_k=VOCAB)
    first = loop.train(replace(experiment, objective=whole), tmp_path / 'run')
    for one, other in zip(lines(tmp_path / 'run', 'train'), lines(workdir, 'train'), strict=True):
        np.testing.assert_allclose(one['loss'], other['loss'], rtol=2e-5)
        np.testing.assert_allclose(one['kl'], other['kl'], rtol=2e-4, atol=1e-6)
    held_out, wanted = (lines(path, 'validation')[-1] for path in (tmp_path / 'run', workdir))
    np.testing.assert_allclose(held_out['kl'], wanted['kl'], rtol=2e-4)
    gc.collect()
    held = [x for x in gc.get_objects() if isinstance(x, teacher.Taught)]
    assert not held, 'its parameters have no place beside those that are trained'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher.Taught, '_ask', None)  # nobody asks again
        again = loop.train(replace(experiment, objective=whole), tmp_path / 'again')
    jax.tree.map(
        np.testing.assert_array_equal, *(numpy_tree(state.params) for state in (first, again))
    )
    # A disk without room is told before the teacher reads anything.
    full = mock.patch('os.posix_fallocate', side_effect=OSError(errno.ENOSPC, 'No space left'))
    other = replace(whole, temperature=3.0)
    with full, pytest.raises(UserError, match=r'No space left; [\d.]+ [kM]B\): make room there'):
        loop.train(replace(experiment, objective=other), tmp_path / 'full')


@pytest.mark.slow
def test_of_itself_a_model_learns_nothing(student, taught, tmp_path):
    itself = replace(
        student,
        start=str(taught),
        model=replace(student.model, dim=24),
        data=replace(student.data, tokenizer=TokenizerConfig(path=str(taught))),
        objective=Distillation(str(taught), TASK, alpha=1.0),
    )
    loop.train(changed(itself, 'train', steps=1), tmp_path / 'run')
    (step,) = lines(tmp_path / 'run', 'train')
    # A compiler may round the two apart, in their last bit.
    assert max(step['kl'], step['loss'], step['grad_norm']) < 1e-7 and step['nll'] > 1


@pytest.mark.slow
def test_texts_are_read_by_the_teacher_in_pieces_as_long_as_a_row(
    short, short_run, tmp_path, monkeypatch
):
    """A student of other width, data of texts, the teacher's tokenizer."""
    experiment = replace(
        changed(changed(short, 'train', steps=3), 'model', dim=16, heads=2),
        objective=Distillation(str(short_run), CausalLM(), top_k=8),
        data=replace(short.data, tokenizer=TokenizerConfig(path=str(short_run))),
    )
    asked = []
    ask = teacher.Taught._ask
    monkeypatch.setattr(
        teacher.Taught, '_ask', lambda self, *args: asked.append(args[4]) or ask(self, *args)
    )
    loop.train(changed(experiment, 'evaluation', every=0), tmp_path / 'run')
    (partial,) = asked
    assert not partial.exists()
    path = partial.with_name(partial.name.replace('.partial', ''))
    said = np.load(path)
    ids, log_p, rest = said[:, :8], said[:, 8:16], said[:, 16]
    assert ((ids >= 0) & (ids < 512) & (ids == np.round(ids))).all()
    np.testing.assert_allclose(np.exp(log_p).sum(1) + np.exp(rest), 1, rtol=1e-4)
    assert (np.diff(log_p) <= 0).all()
    first, *_ = lines(tmp_path / 'run', 'train')
    assert first['kl'] > 0.1


def test_teachers_that_cannot_teach_are_told(student, taught, short_run, tmp_path):
    taught = str(taught)
    for experiment, match in (
        (replace(student, objective=Distillation(str(short_run), TASK)), 'another vocabulary'),
        (
            replace(student, objective=Distillation(str(tmp_path / 'none'), TASK)),
            'give --objective.teacher',
        ),
        (
            changed(
                replace(student, objective=Distillation(taught, TASK)),
                'model',
                context=128,
            ),
            None,
        ),
    ):
        if match is None:
            experiment, match = changed(experiment, 'train', seq_len=128), 'context of 64'
        with pytest.raises(UserError, match=match) as error:
            loop.train(experiment, tmp_path / 'run')
        assert '\n' not in str(error.value)
    for refused, match in (
        (lambda: Distillation(''), 'names nothing'),
        (lambda: Distillation('a', temperature=0.0), 'temperature'),
        *(
            (
                lambda task=task: Distillation('a', task=task),
                f'says nothing of {type(task).__name__}',
            )
            for task in (MultiToken(), LatentPrediction(), MaskedInputs(), MaskedLM(), InfoNCE())
        ),
        (lambda: Distillation('a', alpha=0.0), 'alpha'),
        (lambda: Distillation('a', top_k=-1), 'top-k'),
        (lambda: Distillation('a', top_k=VOCAB + 1).check(student.model), 'more than the 399'),
    ):
        with pytest.raises(UserError, match=match):
            refused()
