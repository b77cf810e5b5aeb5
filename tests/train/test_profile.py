"""Traces of some steps."""

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.train import loop, profile, run
from tests.train.conftest import changed, one_device

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
    # Of jaxlib's reader of traces on Python 3.13, which ends the process where this is an error.
    'ignore:builtin type event_stats has no __module__:DeprecationWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


def test_the_steps_asked_for_are_traced_and_no_others(short, tmp_path, capsys):
    loop.train(changed(short, 'evaluation', every=0), tmp_path, profile=profile.Steps(3, 4))
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(trace))
    traced = {
        dict(event.stats)['step_num']
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == 'train'
    }
    assert traced == {3, 4}
    assert f'xprof --port 8791 {tmp_path / "profile"}' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['', '5', '0:3', '7:5', '1:', 'a:b', '1:2:3', '-1:4', '1.5:3'])
def test_what_is_no_range(text):
    with pytest.raises(UserError, match='give the first and the last step'):
        profile.steps(text)


def test_a_range():
    assert profile.steps('10:15') == (10, 15) and profile.steps('1:1') == (1, 1)


@pytest.mark.parametrize('traced', [(4, 9), (9, 12)])
def test_steps_that_never_come_are_refused_before_compiling(short, tmp_path, monkeypatch, traced):
    monkeypatch.setattr(run, 'train_step', lambda *_, **__: pytest.fail('it compiles'))
    with pytest.raises(UserError, match=r'this run takes steps 1 to 8: name some of these'):
        loop.train(short, tmp_path, profile=profile.Steps(*traced))


def test_steps_that_were_taken_are_refused(copied_run, short):
    longer = changed(short, 'train', steps=10)
    with pytest.raises(UserError, match='--profile 8:9: this run takes steps 9 to 10'):
        loop.train(longer, copied_run, profile=profile.Steps(8, 9))
    with pytest.raises(UserError, match='this run is finished: leave it out'):
        loop.train(short, copied_run, profile=profile.Steps(8, 8))


def test_a_run_that_stops_within_the_range_writes_what_it_has(short, tmp_path, monkeypatch):
    def stops(prepared, pending):
        if pending is not None and pending.step == 3:
            raise RuntimeError('a device is gone')
        return finish(prepared, pending)

    finish = loop._finish
    monkeypatch.setattr(loop, '_finish', stops)
    with pytest.raises(UserError, match='a device is gone'):
        loop.train(short, tmp_path, profile=profile.Steps(2, 7))
    assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1
