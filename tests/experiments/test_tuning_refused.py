"""Bad input of a fine-tuning through the command line: one line, before anything is compiled."""

import json
import re

import pytest

from experiments import finetune
from llama_jax import mesh as meshes
from llama_jax.train import run
from tests.train.conftest import (  # noqa: F401  fixtures
    MAKE_MESH,
    experiment,
    one_device,
    short,
    short_run,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


def chat(*turns):
    return {'messages': [{'role': role, 'content': content} for role, content in turns]}


GOOD = chat(('user', 'hi'), ('assistant', 'ho'))
PAIR = {'prompt': 'a', 'completion': 'b'}
CHOICE = {'prompt': 'Say:', 'chosen': 'yes', 'rejected': 'no'}
LABELS = [{'text': 'one', 'label': 'a'}, {'text': 'two', 'label': 'b'}]
LONG = 'word ' * 200
LLAMA2 = ('--data.chat', 'llama2')

# recipe, rows of training, rows of validation, options, what is said
BAD = {
    'unknown label': (
        *('classify', LABELS, [{'text': 'x', 'label': 'c'}], ()),
        r"test.jsonl:1: the label 'c' is none of 'a', 'b'",
    ),
    'labels given': (
        *('classify', LABELS, LABELS, ('--objective.labels', 'a', 'x')),
        r"train.jsonl:2: the label 'b' is none of 'a', 'x'",
    ),
    'one class': ('classify', LABELS[:1] * 3, LABELS, (), 'nothing to tell apart'),
    'no label': ('classify', [{'text': 'x'}] * 2, LABELS, (), 'label is missing'),
    'user last': (
        *('instruct', [GOOD, chat(('user', 'hi'), ('assistant', 'ho'), ('user', 'and?'))], [GOOD]),
        *(LLAMA2, r'train.jsonl:2: messages ends with the user'),
    ),
    'no assistant': (
        *('instruct', [chat(('system', 'x'), ('user', 'hi'))], [GOOD], LLAMA2),
        r'train.jsonl:1: messages',
    ),
    'order of roles': (
        *('instruct', [chat(('assistant', 'ho'), ('user', 'hi'), ('assistant', 'ho'))], [GOOD]),
        *(LLAMA2, r'train.jsonl:1: messages.* assistant'),
    ),
    'all is cut away': (
        *('instruct', [chat(('user', LONG), ('assistant', 'ho'))], [GOOD]),
        *((*LLAMA2, '--data.too-long', 'truncate'), 'no record left to learn from'),
    ),
    'longer than a row': (
        *('instruct', [GOOD, chat(('user', LONG), ('assistant', 'ho'))], [GOOD], LLAMA2),
        r'1 of 2 records need more than 32 positions, the longest \d+: train.jsonl:2: raise',
    ),
    'longer source': (
        *('seq2seq', [{**PAIR, 'prompt': LONG}], [PAIR], ()),
        '1 of 1 records need more than 32 positions',
    ),
    'no control tokens': (
        *('instruct', [GOOD], [GOOD], ('--data.chat', 'chatml')),
        r'the vocabulary has no <\|im_start\|>',
    ),
    'no chat format': ('instruct', [GOOD], [GOOD], (), 'chat template.*--data.chat'),
    'equal answers': (
        *('dpo', [CHOICE, {**CHOICE, 'rejected': 'yes'}], [CHOICE], ()),
        'train.jsonl:2: chosen and rejected are equal',
    ),
    'chats for labels': ('classify', [GOOD], [GOOD], (), 'no text with a label|label'),
    'labels for pairs': ('seq2seq', LABELS, LABELS, (), 'nothing asked and answered'),
    'pairs for preferences': ('dpo', [PAIR], [PAIR], (), 'no chosen'),
    'broken JSON': ('seq2seq', [PAIR, '{"prompt": '], [PAIR], (), r'train.jsonl.*line 2'),
    'an encoder that is not': ('encoder_decoder', [PAIR], [PAIR], (), 'encoder'),
    'a model longer than its context': (
        *('text', [{'text': 'a'}], [{'text': 'b'}], ('--train.seq-len', '128')),
        'train.seq_len 128 is longer than the model context 64',
    ),
    'adapters off without adapters': (
        *('dpo', [CHOICE], [CHOICE], ('--objective.reference', 'adapters_off')),
        'without adapters',
    ),
    'rank without adapters': (
        *('instruct', [GOOD], [GOOD], (*LLAMA2, '--tune.rank', '8')),
        '--tune.rank is a setting of LoRA',
    ),
    'targets that are none': (
        *('instruct_lora', [GOOD], [GOOD], (*LLAMA2, '--tune.targets', 'query')),
        "--tune.targets 'query' names no weight",
    ),
    'a head alone that is none': (
        *('instruct', [GOOD], [GOOD], (*LLAMA2, '--tune', 'Frozen')),
        '--tune Frozen trains the parameters of the objective alone',
    ),
    'layers that are not trained': (
        *('probe', LABELS, LABELS, ('--optimizer.layer-decay', '0.9')),
        '--optimizer.layer-decay 0.9 has no effect',
    ),
    'embeddings that are not trained': (
        *('classify', LABELS, LABELS, ('--tune', 'LoRA', '--optimizer.decay-embeddings', 'True')),
        'has no effect where embeddings are not trained',
    ),
    'decay of a head alone': (
        *('probe', LABELS, LABELS, ('--optimizer.weight-decay', '0.5')),
        '--optimizer.weight-decay 0.5 has no effect on a head',
    ),
    'no finite decay': (
        *('dpo', [CHOICE], [CHOICE], ('--optimizer.weight-decay', 'inf')),
        '--optimizer.weight-decay is inf: it must be 0 or more, and finite',
    ),
    'decay of nothing': (
        *('dpo', [CHOICE], [CHOICE], ('--optimizer.decay-embeddings', 'True')),
        'has no effect where there is no weight decay',
    ),
    'a share of another schedule': (
        *('dpo', [CHOICE], [CHOICE], ('--optimizer.schedule.decay-share', '0.5')),
        'decay-share 0.5 has no effect on the kind cosine',
    ),
    'a chat format for texts': (
        *('text', [{'text': 'a'}], [{'text': 'b'}], LLAMA2),
        '--data.chat has no effect where',
    ),
    'examples of texts': (
        *('text', [{'text': 'a b c'}] * 9, [{'text': 'b c d'}], ('--evaluation.examples', '2')),
        '--evaluation.examples 2 has no effect with CausalLM',
    ),
    'smoothing that is ignored': (
        *('dpo', [CHOICE], [CHOICE]),
        *(('--objective.loss-type', 'ipo', '--objective.smoothing', '0.1'), 'smoothing 0.1 has no'),
    ),
    'patience without validations': (
        *('dpo', [CHOICE], [CHOICE], ('--evaluation.every', '0', '--evaluation.patience', '2')),
        '--evaluation.patience 2 has no effect',
    ),
    'a reward that is not there': (
        *('grpo', [{'prompt': '1+1=', 'answer': '2'}], [{'prompt': '1+1=', 'answer': '2'}]),
        *(('--objective.rollout.rewards', 'right'), 'right'),
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)
    monkeypatch.setattr(run, 'train_step', lambda *_, **__: pytest.fail('it compiles'))


@pytest.mark.slow
@pytest.mark.parametrize('name', BAD)
def test_one_line(run_script, short_run, tmp_path, name):  # noqa: F811
    recipe, train, test, options, said = BAD[name]
    paths = []
    for part, rows in (('train', train), ('test', test)):
        path = tmp_path / f'{part}.jsonl'
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text('\n'.join(lines), 'utf-8')
        paths.append(str(path))
    given = [option for option in options if option.startswith('--')]
    length = [] if '--train.seq-len' in given else ['--train.seq-len', '32']
    code, _, error = run_script(
        *(finetune.main, recipe, '--from', short_run, '--data.files', paths[0]),
        *('--data.sources.0.split', 'all', '--data.validate', paths[1]),
        *('--workdir', tmp_path / 'run', '--train.batch', '8', *length, *options),
    )
    assert code == 2, error
    assert error[-1].startswith('error: ') and re.search(said, error[-1]), error[-1]
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_a_directory_that_is_no_model(run_script, tmp_path):
    (tmp_path / 'd').mkdir()
    code, _, error = run_script(
        *(finetune.main, 'instruct', '--from', tmp_path / 'd', '--data.files', 'x.jsonl')
    )
    assert code == 2 and 'holds no run, and is no model' in error[-1]


def test_data_shorter_than_a_batch_is_told(run_script, short_run, tmp_path):  # noqa: F811
    path = tmp_path / 'pairs.jsonl'
    path.write_text(json.dumps(PAIR), 'utf-8')
    code, out, error = run_script(
        *(finetune.main, 'seq2seq', '--from', short_run, '--data.files', path),
        *('--show-batch', '1', '--data.sources.0.split', 'all', '--data.validate', path),
        *('--train.seq-len', '32'),
    )
    assert code == 0 and 'batch 1, row 1 of 8' in out
    assert 'the 1 records of training fill less than a batch' in '\n'.join(error)
