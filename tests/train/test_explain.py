"""What is said before a run, against what the run then does."""

import re
import types

import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.train import loop
from llama_jax.train.explain import _training, explain, rate_in_words
from llama_jax.train.records import read_metrics, read_run
from llama_jax.train.workdir import held
from tests.train.conftest import changed, events, one_device

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob('*')}


def start(text):
    """The last section."""
    return re.split(r'^start +', text, flags=re.MULTILINE)[1]


@pytest.mark.slow
def test_a_fresh_run_does_what_was_said(short, short_run, tmp_path):
    """`short_run` is that run, taken."""
    text = explain(short, tmp_path / 'run')
    assert list(tmp_path.iterdir()) == []
    assert len(text.splitlines()) <= 24
    facts = read_run(short_run)
    last = [line for line in read_metrics(short_run) if line['kind'] == 'train'][-1]
    assert f'{facts["parameters"]:,} parameters' in text
    tokens = f'{last["tokens"]:,} tokens, {last["flops"]:.3g} FLOPs'
    assert f'8 steps of 8 x 32 = 256 tokens: {tokens}' in text
    assert f'{last["epochs"]:.3g} epochs are read, {last["documents"]} documents' in text
    checkpoints = list((short_run / 'checkpoints').iterdir())
    saved, kept, each = re.search(r'(\d+) are saved, (\d+) of ([\d.]+ \wB) stay', text).groups()
    assert (int(saved), int(kept)) == (2, len(checkpoints))
    n_bytes = float(each.split()[0]) * {'kB': 1e3, 'MB': 1e6}[each.split()[1]]
    on_disk = sum(p.stat().st_size for p in checkpoints[0].rglob('*') if p.is_file())
    assert 0.5 < on_disk / n_bytes < 1.5  # Orbax compresses, and adds metadata
    assert 'validation in all: 2 times about 1 batches' in text
    assert 'rises over 2 steps to 0.01, then falls as a cosine to 0.001 after step 8' in text
    assert re.search(r'[\d.]+ s of training in all: [\d.e-]+ s a step, [\d,]+ tokens/s, MFU', text)
    assert re.search(r'[\d.]+ MB a device: [\d.]+ \wB state and batch', text)
    assert start(text) == f'begins in {tmp_path / "run"}'


@pytest.mark.slow
def test_where_a_run_goes_on(short, copied_run):
    before = contents(copied_run)
    longer = changed(short, 'train', steps=0, epochs=0.1)
    text = start(explain(longer, copied_run))
    loop_says = re.search(r'train.steps: 8 -> (\d+)', text)
    assert f'goes on from step 8: {int(loop_says[1]) - 8} are left' in text
    assert 'the learning rate goes from 0.001' in text
    assert start(explain(short, copied_run)) == f'the run in {copied_run} is finished'
    assert contents(copied_run) == before
    loop.train(longer, copied_run)
    for line in text.splitlines()[1:]:
        assert line.strip() in events(copied_run)


@pytest.mark.slow
def test_what_a_run_would_be_refused_for(short, copied_run):
    other = changed(short, 'model', ffn=128)
    text = start(explain(other, copied_run))
    with pytest.raises(UserError) as raised:
        loop.train(other, copied_run)
    assert text == f'refused: {raised.value}'
    with held(copied_run):
        text = start(explain(short, copied_run))
    assert text.startswith(f'refused: {copied_run} is in use by process')
    with pytest.raises(UserError, match='longer than the model context'):
        explain(changed(short, 'train', seq_len=999), copied_run)


def test_microbatches_are_told(experiment):
    for n, words in ((1, '256 tokens: 5,120'), (2, '256 tokens in 2 microbatches: 5,120')):
        run = types.SimpleNamespace(experiment=changed(experiment, 'train', accumulate=n))
        (line,) = _training(run)
        assert f'20 steps of 8 x 32 = {words} tokens, ' in line


@pytest.mark.parametrize(
    'config, words',
    [
        (ScheduleConfig(1e-3, 'constant', 0), 'begins at 0.001, then stays there'),
        (
            ScheduleConfig(1e-3, 'wsd', 20, decay_share=0.25),
            'rises over 20 steps to 0.001, stays there until step 80, then falls in a straight '
            'line to 0.0001 after step 100',
        ),
    ],
)
def test_the_learning_rate_in_words(config, words):
    assert rate_in_words(config, 100) == words
