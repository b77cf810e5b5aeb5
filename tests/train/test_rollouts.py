"""Runs that learn from what they write themselves."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import ModelConfig
from llama_jax.model.tune import LoRA
from llama_jax.objectives.grpo import GRPO, advantages
from llama_jax.objectives.rollout import Rollout
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train import rollouts
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
    check,
    rows_read,
)
from llama_jax.train.loop import train
from llama_jax.train.records import read_metrics
from tests.train.conftest import changed, one_device

TOKENIZER = bytes_tokenizer()
VOCAB = 399
G, MOST = 4, 8
REWARD = """
def lower(completion, problem):
    if completion in problem.fields['bad']:
        raise ValueError('it is bad')
    return sum(map(str.islower, completion)) / 8 + len(completion) / 1000
"""
TIMES = ('seconds', 'seconds_sync', 'seconds_rollout', 'seconds_rewards', 'seconds_waiting')
SPEEDS = ('tokens_per_second', 'mfu')


@pytest.fixture(scope='module', autouse=True)
def on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, 'make', one_device)
        yield


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
    """12 steps of 4 rows of 2 prompts, with 4 completions each, for many lower-case letters."""
    path = tmp_path_factory.mktemp('problems')
    prompts = [f'{a}{b}=' for a in 'ABCDEFGH' for b in '12345']
    lines = [json.dumps({'prompt': prompt, 'answer': '', 'bad': []}) for prompt in prompts]
    (path / 'train.jsonl').write_text('\n'.join(lines))
    held = [line.replace('prompt": "', 'prompt": "Z') for line in lines[:12]]  # of two batches
    (path / 'held.jsonl').write_text('\n'.join(held))
    (path / 'reward.py').write_text(REWARD)
    return Experiment(
        name='lower',
        model=ModelConfig(
            vocab=VOCAB, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64
        ),
        data=DataConfig(
            sources=(Source('text_files', files=(str(path / 'train.jsonl'),)),),
            validation=(Source('text_files', files=(str(path / 'held.jsonl'),)),),
            tokenizer=TokenizerConfig(kind='bytes'),
        ),
        objective=GRPO(
            Rollout(completions=G, max_tokens=MOST, rewards=(f'{path / "reward.py"}:lower',)),
            updates=2,
            beta=1e-3,
        ),
        train=TrainConfig(steps=12, batch=16, seq_len=26, log_every=1),
        optimizer=AdamW(schedule=ScheduleConfig(peak=2e-2, warmup_steps=1), weight_decay=0.0),
        evaluation=EvaluationConfig(every=6),
        checkpoint=CheckpointConfig(every=4, keep=4),
    )


class Killed(BaseException):  # like a kill, nothing catches it
    pass


def run(experiment, workdir, *, kill=None):
    """(lines of the records by step, batches that were learnt from)."""
    batches, make = [], rollouts.Rollouts.of_training

    def recording(self, *args, **keywords):
        rollout = make(self, *args, **keywords)

        def recorded(prompts, state):
            if len(batches) == kill:
                raise Killed
            batches.append(rollout(prompts, state))
            return batches[-1]

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.Rollouts, 'of_training', recording)
        if kill is None:
            train(experiment, workdir)
        else:
            with pytest.raises(Killed):
                train(experiment, workdir)
    return batches


@pytest.fixture(scope='module')
def finished(experiment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('rollouts') / 'run'
    return workdir, run(experiment, workdir)


def lines(workdir, kind='train'):
    """By step; what a step took is left out."""
    return {
        line['step']: {name: x for name, x in line.items() if name not in TIMES + SPEEDS}
        for line in read_metrics(workdir)
        if line['kind'] == kind
    }


def completions(batch):
    """(prompt, tokens, slice, row, segment) of each completion."""
    for row, segments in enumerate(batch['segments']):
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            written = here[batch['weights'][row, here] > 0]
            ids = batch['inputs'][row, here[0] : written[0] + 1]
            yield ids, batch['targets'][row, written], written, row, segment


@pytest.mark.slow
def test_reward_rises(finished):
    reward = [line['reward'] for line in lines(finished[0]).values()]
    assert np.mean(reward[-3:]) > 2 * np.mean(reward[:3])
    first, last = lines(finished[0], 'validation').values()
    assert 0 < first['reward'] < last['reward'] < 1
    for line in (first, last):
        assert line['loss'] == -line['reward'] and MOST / 2 < line['completion_length'] <= MOST


def test_completions_are_of_the_parameters_before_the_step(finished):
    """Whose trainer gives them the generator's probabilities, and those of a step earlier do not:
    they move by more than that in every step."""
    for step, line in lines(finished[0]).items():
        assert line['logp_diff'] < 2e-5, step
        assert line['clipped_high'] > 0 or step > 6, step


def test_a_batch_is_what_was_written_and_judged(finished):
    workdir, batches = finished
    ended = 0
    for batch, line in zip(batches, lines(workdir).values(), strict=True):
        by_prompt = {}
        for prompt, tokens, written, row, _ in completions(batch):
            assert prompt[0] == TOKENIZER.bos_id and len(prompt) == 4
            end = tokens[-1] == TOKENIZER.eos_id
            assert TOKENIZER.eos_id not in tokens[:-1] and (end or len(tokens) == MOST)
            text = TOKENIZER.decode(tokens[:-1] if end else tokens)
            ended += end and len(text) > 1
            reward = sum(map(str.islower, text)) / 8 + len(text) / 1000
            (advantage,) = set(batch['advantages'][row, written].tolist())
            by_prompt.setdefault(prompt.tobytes(), []).append((reward, advantage, len(tokens)))
        each = np.array([one for group in by_prompt.values() for one in group])
        reward, advantage, length = each.T
        assert line['reward'] == pytest.approx(reward.mean())
        assert line['reward_std'] == pytest.approx(reward.std())
        assert line['completion_length'] == pytest.approx(length.mean())
        if all(len(group) == G for group in by_prompt.values()):  # none twice, at an epoch's end
            wanted = advantages(reward.reshape(-1, G), 'group').reshape(-1)
            np.testing.assert_allclose(advantage, wanted, rtol=1e-5)
    assert ended


def test_completions_of_a_prompt_differ_from_epoch_to_epoch(finished):
    """10 batches read the prompts twice; each time all of its completions are drawn anew."""
    seen = {}
    for batch in finished[1][:10]:
        for prompt, tokens, *_ in completions(batch):
            seen.setdefault(prompt.tobytes(), []).append(tokens.tobytes())
    often = [drawn for drawn in seen.values() if len(drawn) > G]
    assert len(often) > 20 and all(len(set(drawn)) > len(drawn) - G for drawn in often)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_prompts_completions_and_rewards(
    finished, experiment, tmp_path
):
    whole, batches = finished
    before = run(experiment, tmp_path / 'run', kill=6)
    after = run(experiment, tmp_path / 'run')  # from the checkpoint of step 4
    assert len(before) == 6 and len(after) == 8
    for one, other in zip(batches, before[:4] + after, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(TIMES):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert lines(tmp_path / 'run') == lines(whole)
    assert lines(tmp_path / 'run', 'validation') == lines(whole, 'validation')


@pytest.mark.slow
def test_a_reward_that_fails_is_named_and_nothing_is_lost(experiment, finished, tmp_path):
    """The second batch has it: the step before is saved, and the run goes on once it is mended."""
    _, batches = finished
    prompt, tokens, *_ = next(iter(completions(batches[2])))
    text = TOKENIZER.decode(tokens[tokens != TOKENIZER.eos_id])
    asked = TOKENIZER.decode(prompt)
    (source,) = experiment.data.sources
    records = [json.loads(line) for line in Path(source.files[0]).read_text().splitlines()]
    for record in records:
        record['bad'] = [text] if record['prompt'] == asked else []
    path = tmp_path / 'train.jsonl'
    path.write_text('\n'.join(map(json.dumps, records)))
    data = replace(experiment.data, sources=(replace(source, files=(str(path),)),))
    broken = replace(experiment, data=data)
    broken = changed(broken, 'evaluation', every=0)
    with pytest.raises(UserError, match='raised ValueError: it is bad') as failure:
        train(broken, tmp_path / 'run')
    number = next(i for i, record in enumerate(records) if record['bad']) + 1
    assert f'train.jsonl:{number}' in str(failure.value) and '\n' not in str(failure.value)
    assert [path.name for path in (tmp_path / 'run/checkpoints').iterdir()] == ['2']

    rollout = replace(experiment.objective.rollout, failed='skip')
    skipping = replace(broken, objective=replace(experiment.objective, rollout=rollout))
    skipping = changed(skipping, 'train', steps=3)
    (*_, batch) = run(skipping, tmp_path / 'skipping')
    assert lines(tmp_path / 'skipping')[3]['rewards_failed'] == 1 / 32
    left_out = [
        set(batch['advantages'][row, written].tolist())
        for ids, drawn, written, row, _ in completions(batch)
        if ids.tobytes() == prompt.tobytes() and drawn.tobytes() == tokens.tobytes()
    ]
    assert left_out and all(advantage == {0.0} for advantage in left_out)


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (lambda e: changed(e, 'train', batch=18), 'groups of 4'),
        (lambda e: replace(e, tune=LoRA(dropout=0.1), start='x'), '--tune.dropout 0'),
        (
            lambda e: replace(e, objective=GRPO(Rollout(rewards=('no',), completions=4))),
            'no reward',
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(experiment, change, match):
    with pytest.raises(UserError, match=match):
        check(change(experiment), one_device(MeshConfig()))


def test_a_file_of_rewards_is_run_to_check_it_and_not_for_every_loader(experiment, tmp_path):
    path, loads = tmp_path / 'reward.py', tmp_path / 'loads'
    path.write_text(f"{REWARD}\nwith open({str(loads)!r}, 'a') as file:\n    file.write('.')\n")
    rollout = replace(experiment.objective.rollout, rewards=(f'{path}:lower',))
    experiment = changed(experiment, 'objective', rollout=rollout)
    check(experiment, one_device(MeshConfig()))
    assert loads.read_text() == '.'
    assert rows_read(experiment) == 4
    assert loads.read_text() == '.'


def test_several_processes_are_refused(experiment, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(UserError, match='2 processes'):
        check(experiment, one_device(MeshConfig()))
