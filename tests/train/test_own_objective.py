"""An objective that is written in one new file trains, goes on, is read back and is asked."""

import json
import sys

import jax
import numpy as np
import pytest

import configs
from experiments import cli, pretrain
from llama_jax import mesh as meshes
from llama_jax.compare import record
from llama_jax.compare.fair import Proof
from llama_jax.errors import UserError
from llama_jax.evaluate import likelihood
from llama_jax.evaluate.scores import Scorer
from llama_jax.train import config_file, plain, restore
from llama_jax.train.experiment import from_dict, to_dict
from llama_jax.train.loop import train
from llama_jax.train.records import read_metrics, read_run
from tests.train.conftest import changed, one_device

FILE = '''
"""Predict a text backwards."""
from __future__ import annotations
from dataclasses import dataclass, replace
import json, pathlib
import numpy as np
from llama_jax.compare.grid import Arm, Grid
from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.evaluate.suite import Suite
from llama_jax.objectives.asked import Middle, Reading, asking, as_it_stands
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, predicted
from llama_jax.objectives.weighted import Weighted
from llama_jax.train.experiment import from_dict


@dataclass(frozen=True)
class Backwards(TokenPrediction):
    """The last token first."""

    mirror: bool = True

    @property
    def reading(self) -> Reading:
        return Reading(whole=asking('order', self._backwards))

    def _backwards(self, text, tokenizer) -> Example:
        ends = text.prefix[:0]
        return as_it_stands(Middle(text.middle[::-1][:1], text.middle[::-1][1:], ends), tokenizer)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + 1,)

    def example(self, piece: Piece, *, tokenizer, seq_len: int, rng) -> Example | None:
        text = piece.text[::-1] if self.mirror else piece.text
        return predicted(np.append(tokenizer.bos_id, text), np.append(text, tokenizer.eos_id))

    def flops(self, model, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)


def run():
    settings = json.loads((pathlib.Path(__file__).parent / 'settings.json').read_text())
    return replace(from_dict(settings), objective=Backwards())


def grid():
    return Grid('g', 'G', tuple(Arm(n, o()) for n, o in (('a', run), ('b', part))), 2, Suite())


def part():
    return replace(run(), objective=Weighted((Backwards(),)))
'''


@pytest.fixture
def mine(tmp_path, short):
    """The name of the configuration in such a file, of the run `short`."""
    (tmp_path / 'settings.json').write_text(json.dumps(to_dict(short)))
    (tmp_path / 'mine.py').write_text(FILE)
    return f'{tmp_path / "mine.py"}:run'


@pytest.mark.slow
def test_it_trains_goes_on_and_is_read_back_and_asked(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)
    workdir = tmp_path / 'run'
    line = f'pretrain {mine} --objective.mirror True --evaluation.every 0'

    def start(steps):
        monkeypatch.setattr('sys.argv', [*line.split(), '--train.steps', str(steps)])
        experiment, options = cli.read('pretrain', 'Trains.', **pretrain.OPTIONS)
        return train(experiment, workdir, config_file=options.config_file)

    start(4)
    state = start(8)
    told = [line['text'] for line in read_metrics(workdir) if line['kind'] == 'event']
    assert 'resumed from the checkpoint of step 4' in told
    assert read_run(workdir)['experiment']['objective'] == {
        **{'class': 'Backwards', 'z_loss': 1e-4, 'mirror': True}
    }

    # Another process, which has not seen the file, and where it is no more.
    monkeypatch.setattr(plain, '_OWN', {})
    monkeypatch.delitem(sys.modules, plain.OWN_MODULE)
    (tmp_path / 'mine.py').unlink()
    mesh = one_device(meshes.MeshConfig())
    found = restore.load(workdir, mesh)
    objective = found.experiment.objective
    assert type(objective).__name__ == 'Backwards' and objective.mirror
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    score = Scorer(
        *(found.config, found.params),
        sees_all=False,
        compute=found.experiment.compute,
        mesh=mesh,
        byte_lengths=found.tokenizer.byte_lengths,
    )
    texts = likelihood.wholes([found.tokenizer.encode('def f(x):\n    return x\n')])
    asked = objective.reading.whole
    answer = likelihood.ask(score, asked, texts, found.tokenizer, seed=0)
    said = likelihood.bits(answer, texts, found.tokenizer)
    assert asked.kind == 'order' and 0 < said.bits.sum() / said.bytes.sum() < 20

    kept = workdir / config_file.NAME
    kept.write_text(kept.read_text() + '#')
    with pytest.raises(UserError, match='defines the objective Backwards and is not what the run'):
        restore.experiment_of(workdir)
    kept.unlink()
    with pytest.raises(UserError, match='Backwards and cannot be read.*put back the copy of') as e:
        restore.experiment_of(workdir)
    assert '\n' not in str(e.value)


def test_what_no_record_can_hold_is_refused(mine, tmp_path):
    experiment = configs.get(mine.replace(':run', ':part'))
    assert from_dict(json.loads(json.dumps(to_dict(experiment)))) == experiment
    with pytest.raises(UserError, match='worker processes do not have the file.*Backwards'):
        train(changed(experiment, 'data', workers=1), tmp_path / 'run')
    beside = tmp_path / 'neighbour_of_mine.py'
    beside.write_text(FILE)
    (tmp_path / 'mine.py').write_text(
        'import neighbour_of_mine\ndef run():\n    return neighbour_of_mine.part()\n'
    )
    with pytest.raises(UserError, match=r"cannot be written.*'Backwards'.*file of the config") as e:
        configs.get(mine)
    (tmp_path / 'mine.py').write_text(FILE.replace('Backwards', 'MaskedLM'))
    with pytest.raises(UserError, match='defines an objective MaskedLM, and there is one'):
        configs.get(mine)
    assert '\n' not in str(e.value)


def test_a_run_of_a_grid_takes_it_from_the_file_that_is_kept(mine, tmp_path, monkeypatch):
    name = mine.replace(':run', ':grid')
    grid, file = configs.grid(name), configs.own.config_file(name)
    record.write(tmp_path / 'grid', grid, Proof({}, []), 'x', config_file=file)
    monkeypatch.setattr(plain, '_OWN', {})
    for arm, place in (('a', 'a/seed-0'), ('b', 'b/seed-1')):
        planned, _ = record.planned(tmp_path / 'grid', place)
        wanted = next(one.experiment for one in grid.arms if one.name == arm)
        assert to_dict(planned.experiment)['objective'] == to_dict(wanted)['objective']


def test_one_of_the_project_is_not_taken_for_that_of_a_file(mine, tmp_path, monkeypatch):
    """That was a prototype in a file, and stands in the registry since."""
    name = mine.replace(':run', ':part')
    experiment = configs.get(name)
    file = configs.own.config_file(name)
    file.keep(tmp_path)
    facts = {'configuration': json.loads(json.dumps(file.facts()))}
    assert facts['configuration']['objectives'] == ['Backwards']
    written = to_dict(experiment)
    config_file.know_objectives(tmp_path, facts, written)
    ours = {**plain.REGISTRY, 'backwards': type(experiment.objective.parts[0])}
    monkeypatch.setattr(plain, 'REGISTRY', ours)
    monkeypatch.setattr(plain, '_OWN', {})
    with pytest.raises(
        UserError, match='an objective Backwards of .*mine.py, and this version has'
    ):
        config_file.know_objectives(tmp_path, facts, written)


def test_modules_beside_the_file_are_found_where_they_were(mine, tmp_path, monkeypatch):
    beside = tmp_path / 'beside'
    beside.mkdir()
    (beside / 'helper_of_mine.py').write_text('SHARE = 0.5')
    (beside / 'settings.json').write_text((tmp_path / 'settings.json').read_text())
    (beside / 'own.py').write_text(FILE.replace('import json', 'import helper_of_mine, json'))
    name = f'{beside / "own.py"}:run'
    experiment, file = configs.get(name), configs.own.config_file(name)
    (tmp_path / 'run').mkdir()
    file.keep(tmp_path / 'run')
    facts = {'configuration': file.facts()}
    # Another process.
    monkeypatch.delitem(sys.modules, 'helper_of_mine')
    monkeypatch.setattr(sys, 'path', [x for x in sys.path if x != str(beside)])
    monkeypatch.setattr(plain, '_OWN', {})
    config_file.know_objectives(tmp_path / 'run', facts, to_dict(experiment))
    assert plain.own_names() == {'Backwards'}
    (beside / 'helper_of_mine.py').unlink()
    monkeypatch.delitem(sys.modules, 'helper_of_mine')
    monkeypatch.setattr(plain, '_OWN', {})
    with pytest.raises(UserError, match="No module named 'helper_of_mine'.*beside .*own.py"):
        config_file.know_objectives(tmp_path / 'run', facts, to_dict(experiment))
