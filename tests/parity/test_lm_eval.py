"""Our backend of lm-eval beside its own `hf`, on one directory of weights and tokenizer."""

import json

import jax
import numpy as np
import pytest

from experiments import evaluate as script
from experiments.tasks import subject_of
from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from tests.convert import written

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('default')]

CONTEXT = 48
MODEL = ModelConfig(
    vocab=520, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=32, context=CONTEXT
)
PAIRS = [
    ('The capital of France is', ' Paris'),
    ('The capital of France is', ' a large city'),
    ('Ends with a space ', 'word'),
    ('Two lines\n\n', 'Answer: yes'),
    ('', 'from the beginning'),
    ('中国的首都是', '，北京'),
    ('问题：谁？\n答案：', ' 曹操'),
    ('Tab\t', '\tindented'),
    ('long ' * 60, 'end of it'),  # cut at the left
    ('x', ' a longer text than what it follows, and it ends here'),
    ('<|endoftext|>spelled', ' control <|im_start|>user'),
]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    rng = np.random.default_rng(5)
    params = trees.map_named(
        lambda _, x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), layers.abstract(MODEL)
    )
    path = written.directory(tmp_path_factory.mktemp('model') / 'theirs', MODEL, params)
    tokenizer = json.loads((path / 'tokenizer.json').read_text())
    tokenizer['decoder'] = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    (path / 'tokenizer.json').write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope='module')
def both(directory):
    """(ours, theirs)."""
    pytest.importorskip('lm_eval')
    from lm_eval.models.huggingface import HFLM

    from llama_jax.evaluate.harness import HarnessLM

    mesh = make(MeshConfig(), jax.devices()[:1])
    theirs = HFLM(
        pretrained=str(directory), dtype='float32', device='cpu', batch_size=4, max_length=CONTEXT
    )
    return HarnessLM(subject_of(str(directory), mesh, Compute(), '--from')), theirs


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def test_log_likelihoods_equal_hf(both):
    ours, theirs = (model.loglikelihood(requests('loglikelihood', PAIRS)) for model in both)
    for pair, a, b in zip(PAIRS, ours, theirs, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3), pair
        assert a[1] == b[1], pair
    # Nothing but white space in front: theirs stops at an assertion.
    ((total, _),) = both[0].loglikelihood(requests('loglikelihood', [('  ', 'a text')]))
    assert total < 0


def test_cuts_equal_hf_but_where_it_loses_text(both):
    for context, continuation in PAIRS:
        if context.strip():
            pairs = [model._encode_pair(context, continuation) for model in both]
            assert pairs[0] == pairs[1]
    # A token spans the cut (EleutherAI/lm-evaluation-harness #1297, #4055): theirs scores nothing.
    tokens = written.trained()
    word = next(
        t
        for t in sorted(tokens.get_vocab())
        if t.isascii() and t.isalpha() and len(t) > 3 and len(tokens.encode(t).ids) == 1
    )
    assert both[1]._encode_pair(word[:2], word[2:])[1] == []
    context, continuation = both[0]._encode_pair(word[:2], word[2:])
    assert both[0].subject.vocabulary.decode(continuation) == word[2:]


def test_rolling_equals_hf(both):
    texts = [('word ' * 70,), ('短文',), ('def f(x):\n    return x\n' * 9,)]
    ours, theirs = (
        model.loglikelihood_rolling(requests('loglikelihood_rolling', texts)) for model in both
    )
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_written_text_equals_hf(both):
    """Stop strings, ends, drawn lengths and a prompt that is cut at the left."""
    settings = {'until': ['e'], 'max_gen_toks': 9, 'do_sample': False}
    asked = [(text, settings) for text in ('The capital', '中国', 'long ' * 60)]
    asked.append(('The capital', {**settings, 'until': 'never', 'max_gen_toks': 4}))
    ours, theirs = (model.generate_until(requests('generate_until', asked)) for model in both)
    # Theirs shows the beginning of a character that never became whole.
    assert [x.rstrip('\ufffd') for x in ours] == [x.rstrip('\ufffd') for x in theirs]
    for wrong in ({'num_beams': 3}, {'max_gen_toks': CONTEXT}):
        with pytest.raises(UserError, match='num_beams is not known|no room left'):
            both[0].generate_until(requests('generate_until', [('x', wrong)]))


def test_chats_equal_hf(both):
    chat = [{'role': 'user', 'content': 'Who?'}]
    ours, theirs = (model.apply_chat_template(chat) for model in both)
    assert ours == theirs
    assert both[0].tok_encode(ours) == both[1].tok_encode(theirs)


def test_a_directory_of_tasks_from_the_command_line(both, directory, tmp_path, monkeypatch, capsys):
    lines = [{'q': f'number {i}', 'c': ['odd', 'even'], 'gold': (i + 1) % 2} for i in range(9)]
    for name in ('train', 'test'):
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / f'{name}.jsonl').write_text(text)
    task = {
        'task': 'parity_of_numbers',
        'dataset_path': 'json',
        'dataset_kwargs': {
            'data_files': {name: str(tmp_path / f'{name}.jsonl') for name in ('train', 'test')}
        },
        'test_split': 'test',
        'fewshot_split': 'train',
        'output_type': 'multiple_choice',
        'doc_to_text': '{{q}} is',
        'doc_to_choice': '{{c}}',
        'doc_to_target': 'gold',
        'metric_list': [{'metric': 'acc'}],
    }
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'one.yaml').write_text(json.dumps(task))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    output = tmp_path / 'found.json'
    arguments = ['--from', directory, '--lm-eval', tmp_path / 'tasks', '--shots', 1]
    arguments += ['--limit', 6, '--output', output, '--mesh.fsdp', 1, '--mesh.data', 8]
    monkeypatch.setattr('sys.argv', ['evaluate', *map(str, arguments)])
    script.main()
    assert 'parity_of_numbers' in capsys.readouterr().out
    from llama_jax.evaluate import harness

    theirs = harness.evaluate(both[1], tmp_path / 'tasks', shots=1, limit=6)
    found = json.loads(output.read_text())['results']['parity_of_numbers']
    assert found['acc,none'] == theirs['results']['parity_of_numbers']['acc,none']
    samples = (tmp_path / 'found-parity_of_numbers.jsonl').read_text().splitlines()
    assert len(samples) == 6
