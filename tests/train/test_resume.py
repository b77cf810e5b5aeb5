"""A run that is stopped, killed and started again is the run that never was. Real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import mesh
from llama_jax.mesh import MeshConfig
from llama_jax.train.checkpoint import Checkpoints
from llama_jax.train.records import read_metrics
from llama_jax.train.restore import load
from tests.flags import FAST_COMPILATION

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / 'tests/train/driver.py'


def options(text):
    """The tiny experiment on the command line, with dropout and accumulation."""
    values = {
        'data.sources.0.name': 'text_files',
        'data.sources.0.files': text,
        'data.tokenizer.vocab': 512,
        'model.vocab': 512,
        'model.dim': 32,
        'model.layers': 2,
        'model.head-dim': 8,
        'model.ffn': 64,
        'model.context': 64,
        'model.dropout': 0.1,
        'train.steps': 40,
        'train.batch': 8,
        'train.accumulate': 2,
        'train.seq-len': 32,
        'train.log-every': 1,
        'optimizer': 'adamw',  # compiles sooner
        'optimizer.schedule.warmup-steps': 4,
        'checkpoint.every': 6,
        'evaluation.every': 20,
        'evaluation.batches': 2,
    }
    flags = [part for name, value in values.items() for part in (f'--{name}', str(value))]
    return [*flags, '--evaluation.prompts']


def start(workdir, text, when='never:SIGTERM', *more):
    """A process with one device which sends itself a signal."""
    return subprocess.Popen(
        [
            *(sys.executable, str(DRIVER), when, 'quickstart', *options(text)),
            *('--workdir', str(workdir), *more),
        ],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': FAST_COMPILATION},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, code):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output.splitlines()


@pytest.fixture(scope='module')
def runs(text, tmp_path_factory):
    """The directories of a run in one go, and of one that was stopped, killed and went on; the
    last lines of the latter's processes."""
    whole, broken = (tmp_path_factory.mktemp('runs') / name for name in ('whole', 'broken'))
    first = start(broken, text, '3:SIGTERM')
    stopped = end(first, 128 + signal.SIGTERM)
    in_one_go = start(whole, text)
    killed = end(start(broken, text, '15:SIGKILL'), -signal.SIGKILL)
    resumed = end(start(broken, text), 0)
    end(in_one_go, 0)
    return whole, broken, (stopped, killed, resumed)


def test_sigterm_saves_and_says_so_in_one_line(runs):
    _, broken, (stopped, _, _) = runs
    assert stopped[-1].startswith('stopped by SIGTERM after step 5, which is saved in ')
    assert stopped[-1].endswith('the same command goes on from there')
    assert (
        'SIGTERM: stopping as soon as the last step is saved (a second one ends at once)' in stopped
    )
    assert not any('Traceback' in line for line in stopped)


def test_losses_are_identical(runs):
    whole, broken, _ = runs

    def told(workdir, kind):
        same = ('step', 'loss', 'nll', 'grad_norm', 'weight', 'bits_per_byte', 'tokens')
        return [
            {name: line[name] for name in same if name in line}
            for line in read_metrics(workdir)
            if line['kind'] == kind
        ]

    train = told(whole, 'train')
    assert [line['step'] for line in train] == list(range(1, 41))
    assert train[-1]['loss'] < train[0]['loss'] - 1
    assert told(broken, 'train') == train
    assert told(broken, 'validation') == told(whole, 'validation')


def test_it_went_on_from_the_newest_finished_checkpoint(runs):
    _, broken, (_, killed, resumed) = runs
    assert 'resumed from the checkpoint of step 5' in killed
    # That of step 12 may have been half-written still when the kill came after step 15.
    texts = [line['text'] for line in read_metrics(broken) if line['kind'] == 'event']
    assert len(texts) == 2 and texts[1] in [
        f'resumed from the checkpoint of step {step}' for step in (6, 12)
    ]
    assert texts[1] in resumed


def test_parameters_and_all_else_are_identical(runs):
    whole, broken, _ = runs
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    params = [load(workdir, devices).params for workdir in (whole, broken)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    # Optimizer, key, counts and place in the data: by the checksum of their bits.
    sums = []
    for workdir in (whole, broken):
        checkpoints = Checkpoints(workdir / 'checkpoints', keep=1, read_only=True)
        assert checkpoints.steps()[-1] == 40
        sums.append(checkpoints.metadata(40)['checksums'])
        checkpoints.close()
    assert sums[0].keys() == {'params', 'rest'} and sums[0] == sums[1]


def test_the_report_is_there(runs):
    whole, broken, _ = runs
    for workdir in (whole, broken):
        assert '</html>' in (workdir / 'report.html').read_text()
