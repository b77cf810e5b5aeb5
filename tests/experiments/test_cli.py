"""The command line: help that reads well, overrides that reach the experiment."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types

import pytest

import configs
from experiments import cli, evaluate, pretrain
from llama_jax.data.config import DataConfig, Source, labels
from llama_jax.errors import Stopped
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.suite import Evaluation
from llama_jax.model.config import LongRope
from llama_jax.train.experiment import Experiment, digest, from_dict, to_dict


@pytest.fixture
def read(monkeypatch):
    """The experiment that pretrain reads from a command line, and its working directory."""

    def read(*arguments):
        found = []
        monkeypatch.setattr(pretrain, 'train', lambda *args, **_: found.append(args))
        monkeypatch.setattr(pretrain, 'write_report', lambda workdir: workdir)
        monkeypatch.setattr(pretrain, 'write_baselines', lambda data, path: None)
        monkeypatch.setattr('sys.argv', ['pretrain', *arguments])
        pretrain.main()
        return found[0]

    return read


def test_overrides_reach_the_experiment(read):
    base = configs.get('quickstart')
    experiment, workdir = read('quickstart')
    assert experiment == base and str(workdir) == 'runs/quickstart'
    experiment, workdir = read(
        *('quickstart', '--train.steps', '50', '--workdir', 'runs/x', '--model.tied', 'False'),
        *('--optimizer.schedule.kind', 'wsd', '--data.sources.0.name', 'text_files'),
        *('--data.sources.0.files', 'a.txt', 'b/*.txt', '--compute.precision', 'bfloat16'),
        *('--evaluation.prompts', 'one', 'two words', '--objective.z-loss', '0.5'),
    )
    assert str(workdir) == 'runs/x'
    assert experiment.train == dataclasses.replace(base.train, steps=50)
    assert experiment.model == dataclasses.replace(base.model, tied=False)
    assert experiment.optimizer.schedule.kind == 'wsd'
    assert experiment.data.sources[0].files == ('a.txt', 'b/*.txt')
    assert experiment.compute.precision == 'bfloat16'
    assert experiment.evaluation.prompts == ('one', 'two words')
    assert experiment.objective.z_loss == 0.5
    assert experiment.checkpoint == base.checkpoint and experiment.mesh == base.mesh


def test_help_names_every_setting_with_its_default(run_script, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    code, out, error = run_script(pretrain.main, 'quickstart', '--help')
    assert code == 0 and not error
    assert out.startswith('usage: python -m experiments.pretrain quickstart')
    for words in (
        *(
            '--workdir',
            '--train.steps INT',
            f'(default: {configs.get("quickstart").train.steps})',
            '--data.sources.0.name STR',
        ),
        *('Microbatches per step', '--optimizer.schedule.kind {cosine,wsd,inverse_sqrt,constant}'),
        *('--mesh.tensor INT', '--compute.precision {float32,bfloat16}', '--seed INT'),
    ):
        assert words in out, words
    # Sections are named as the options are, and nothing of Python shows through.
    for section in ('model', 'data', 'train', 'optimizer', 'optimizer.schedule', 'mesh'):
        assert f' {section} options ' in out
    for noise in ('experiment.', 'Annotated', 'dataclass', '<class', 'MISSING'):
        assert noise not in out


def leaves(value, path=()):
    """Every setting that is a plain value, with its path."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, (*path, field.name))
        else:
            yield (*path, field.name), inner


def with_leaf(value, path, new):
    name, *rest = path
    inner = with_leaf(getattr(value, name), rest, new) if rest else new
    return dataclasses.replace(value, **{name: inner})


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 or type(value)(0.5) or 1
    if isinstance(value, tuple):
        return value[:-1] if value else ('x',)
    return f'{value}x'


def test_digest_changes_with_every_setting():
    base = configs.get('quickstart')
    # With a base of its width, without which the heads of one are refused.
    experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, base_dim=64))
    paths = dict(leaves(experiment))
    assert len(paths) > 45
    digests = {digest(experiment)}
    for path, value in paths.items():
        digests.add(digest(with_leaf(experiment, path, other(value))))
    assert len(digests) == 1 + len(paths)
    assert digest(configs.get('quickstart')) == digest(base) != digest(experiment)


def test_digest_tells_objectives_apart():
    @dataclasses.dataclass(frozen=True)
    class Twin:
        z_loss: float = 1e-4

    experiment = configs.get('quickstart')
    twin = dataclasses.replace(experiment, objective=Twin())
    assert digest(twin) != digest(experiment)


def test_settings_survive_json():
    plain = to_dict(configs.get('llama3_1_8b'))
    again = json.loads(json.dumps(plain))
    assert again['model']['rope_scaling']['factor'] == 8.0
    assert again['objective']['class'] == 'CausalLM'
    # A record of when there was one kind only.
    assert again['model']['rope_scaling'].pop('class') == 'RopeScaling'
    assert from_dict(again) == configs.get('llama3_1_8b')
    again['model']['rope_scaling'] = {
        **{'class': 'LongRope', 'short': [1.0] * 64, 'long': [2.0] * 64},
        **{'original_context': 8192, 'attention_factor': 1.1},
    }
    scaling = from_dict(again).model.rope_scaling
    assert scaling == LongRope((1.0,) * 64, (2.0,) * 64, 8192, 1.1)
    assert to_dict(from_dict(again)) == again
    assert {field.name for field in dataclasses.fields(Experiment)} == again.keys()


@pytest.mark.parametrize(
    'options, message',
    [
        (('--profile', '3'), '--profile 3: give the first and the last step to trace'),
        (('--show-batch', '0'), '--show-batch 0: give the number of batches to show, 1 or more'),
        (('--show-batch', '1', '--explain'), '--explain has no effect with --show-batch'),
        (('--show-batch', '1', '--workdir', 'x'), '--workdir has no effect with --show-batch'),
        (('--check', '--workdir', 'x'), '--workdir has no effect with --check'),
        (('--check', '--show-examples', '2'), '--show-examples has no effect with --check'),
        (('--explain', '--profile', '1:2'), '--profile has no effect with --explain'),
        (('--explain', '--wandb', 'x'), '--wandb has no effect with --explain'),
        (('--explian',), 'there is no option --explian: did you mean --explain?'),
        (
            ('--train.epochs', '2'),
            '--train.steps 480 and --train.epochs 2.0 are both set, and a run has one length: set '
            'all but one to 0',
        ),
    ],
)
def test_options_without_effect_or_sense_are_refused(run_script, options, message):
    code, out, lines = run_script(pretrain.main, 'quickstart', *options)
    assert (code, out) == (2, '') and lines[-1].startswith(f'error: {message}')


def test_a_dry_run_prints_and_trains_nothing(run_script, text, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, 'train', lambda *_, **__: pytest.fail('it trains'))
    code, out, _ = run_script(
        *(pretrain.main, 'quickstart', '--show-batch', '2', '--train.batch', '8'),
        *('--train.seq-len', '64', '--data.files', text, '--model.vocab', '0'),
    )
    heads = [line for line in out.splitlines() if line.startswith('batch')]
    assert code == 0 and len(heads) == 16 and list(tmp_path.iterdir()) == []
    assert '⟧' in out and 'functions, epoch 0, document ' in out


def test_options_reach_the_training_and_the_explanation(run_script, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrain, 'train', lambda e, w, **o: asked.append((e.name, str(w), o)))
    monkeypatch.setattr(pretrain, 'explain', lambda e, w: f'{e.name} in {w}')
    monkeypatch.setattr(pretrain, 'write_report', lambda workdir: workdir)
    monkeypatch.setattr(pretrain, 'write_baselines', lambda data, path: None)
    run_script(pretrain.main, 'quickstart', '--profile', '10:15', '--wandb', 'mine')
    options = {'profile': (10, 15), 'wandb': 'mine', 'config_file': None}
    assert asked == [('quickstart', 'runs/quickstart', options)]
    code, out, _ = run_script(pretrain.main, 'quickstart', '--explain', '--workdir', 'x')
    assert (code, out) == (0, 'quickstart in x\n') and len(asked) == 1


def test_each_dry_run_does_what_it_is_asked_and_trains_nothing(run_script, monkeypatch):
    asked = []
    for name in ('train', 'explain', 'check_data', 'show_batches', 'show_examples'):
        monkeypatch.setattr(
            pretrain, name, lambda e, *n, name=name: asked.append((name, e.train.batch, *n))
        )
    for options in (('--check',), ('--show-batch', 2), ('--show-examples', 3)):
        assert run_script(pretrain.main, 'quickstart', '--train.batch', 64, *options)[0] == 0
    assert asked == [('check_data', 64), ('show_batches', 64, 2), ('show_examples', 64, 3)]


def test_a_signal_ends_an_explanation_in_order(monkeypatch):
    """By an exception, so that what it wrote is removed."""
    monkeypatch.setattr(pretrain, 'explain', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr('sys.argv', ['pretrain', 'quickstart', '--explain'])
    with pytest.raises(Stopped, match='stopped by SIGTERM before anything was said'):
        pretrain.main()


def test_a_reader_that_left_ends_it_in_silence(run_script, tmp_path, monkeypatch):
    """As of `--help | head`; a pipe of another kind that breaks is an error like others."""

    def script():
        print('text', flush=True)
        raise BrokenPipeError

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as unread, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', unread)
        assert run_script(script) == (141, '', [])
        print('what a script prints at its end', flush=True)
    with (tmp_path / 'out').open('w') as read, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', read)
        with pytest.raises(BrokenPipeError):
            run_script(script)


def test_a_signal_leaves_with_its_own_code():
    """And by no exit handler, in which JAX may crash or wait."""
    script = """
import atexit
from experiments import cli
from llama_jax.errors import Stopped

def script():
    print('printed')
    atexit.register(print, 'late')
    raise Stopped('stopped by SIGTERM after step 7', exit_code=143)

cli.main(script)
"""
    ended = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    told = (ended.returncode, ended.stdout, ended.stderr)
    assert told == (143, 'printed\n', 'stopped by SIGTERM after step 7\n')


def test_overrides_reach_every_arm_of_a_grid(monkeypatch):
    command = ['compare', 'fim', '--evaluation.every', '5', '--train.steps', '7', '--jobs', '2']
    command += ['--suite.pool', '9', '--suite.rates', '0.1', '0.2']
    monkeypatch.setattr('sys.argv', command)
    grid, options = cli.read_grid('compare', 'Compares.', jobs=(int, 1))
    assert options.jobs == 2 and len(grid.arms) == 2
    suite = configs.grid('fim').suite
    assert grid.suite == dataclasses.replace(suite, pool=9, rates=(0.1, 0.2))
    for arm, before in zip(grid.arms, configs.grid('fim').arms, strict=True):
        changed = dataclasses.replace(
            before.experiment,
            evaluation=dataclasses.replace(before.experiment.evaluation, every=5),
            train=dataclasses.replace(before.experiment.train, steps=7),
        )
        assert arm.experiment == changed


ABSENT = {name: {'value': None, 'why': 'of a test'} for name in METRICS}


@pytest.mark.parametrize(
    'at, name',
    [('', 'evaluation.json'), ('@60', 'evaluation-60.json'), ('@best', 'evaluation-60.json')],
)
def test_an_evaluation_of_a_named_step_leaves_that_of_the_newest_alone(
    run_script, monkeypatch, tmp_path, at, name
):
    asked = []
    trained = types.SimpleNamespace(step=60, experiment=None)
    result = {'step': 60, 'seconds': 0.0, 'metrics': ABSENT}
    found = Evaluation(result, {})
    monkeypatch.setattr(evaluate, 'load', lambda run, mesh, **how: asked.append(run) or trained)
    monkeypatch.setattr(evaluate, 'evaluate_trained', lambda *given: found)
    (tmp_path / 'run').mkdir()
    code, out, _ = run_script(evaluate.main, f'{tmp_path}/run{at}')
    assert code == 0 and asked == [f'{tmp_path}/run{at}']
    assert [path.name for path in (tmp_path / 'run').iterdir()] == [name] and name in out


@pytest.mark.parametrize(
    'arguments, names',
    [
        (['', '--own'], ['evaluation-on-run.json']),
        (
            ['@60', '--text', 'zh={}/a.txt', '{}/b.txt'],
            ['evaluation-60-on-b.json', 'evaluation-60-on-zh.json'],
        ),
    ],
)
def test_own_text_has_results_of_its_own(run_script, monkeypatch, tmp_path, arguments, names):
    data = DataConfig(validation=(Source('python_corpus/stdlib_code', label='run'),))
    trained = types.SimpleNamespace(step=60, experiment=types.SimpleNamespace(data=data))
    result = {'step': 60, 'seconds': 0.0, 'metrics': ABSENT, 'text': {'documents': 1234}}
    found = Evaluation(result, {})
    monkeypatch.setattr(evaluate, 'load', lambda run, mesh, **how: trained)
    monkeypatch.setattr(
        evaluate,
        'evaluate_own',
        lambda trained, experiment, data, *others: dict.fromkeys(
            labels(data.of('validation')), found
        ),
    )
    (tmp_path / 'run').mkdir()
    at, *others = (argument.format(tmp_path) for argument in arguments)
    code, out, _ = run_script(evaluate.main, f'{tmp_path}/run{at}', *others)
    assert code == 0 and '1,234 documents' in out
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == names


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--own', '--text', 'a.txt'], '--text and --own are two choices'),
        (['--text', 'a.txt', 'b.txt', '--output', 'x.json'], '--text names several sets'),
        (['--text', 'zh=a.txt', 'zh=b.txt'], "--text has two sets called 'zh'"),
    ],
)
def test_choices_of_own_text_that_do_not_go_together(run_script, arguments, words):
    code, _, (line,) = run_script(evaluate.main, 'run', *arguments)
    assert code == 2 and words in line
