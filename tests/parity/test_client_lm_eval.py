"""lm-eval through the server (`local-completions`, `local-chat-completions`) beside its own `hf`
backend on the same weights."""

import json

import numpy as np
import pytest

from configs import tasks
from tests.parity.conftest import LENGTH
from tests.parity.smollm2 import their_tokenizer, theirs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('default')]

ITEMS = 200
WRITTEN = 4
ASKS = ('{a} + {b} =', '{a} 加 {b} 等于')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Tasks of lm-eval: the sum of two numbers, of two choices, or written; a chat."""
    folder = tmp_path_factory.mktemp('tasks')
    _, sums, _ = tasks.sums()
    assert len(sums) >= ITEMS
    items = [
        {
            'ask': ASKS[i % 2].format(**one),
            'choices': [one['answer'], str(int(one['answer']) + 10)][:: 1 - 2 * (i % 3 == 0)],
            'gold': int(i % 3 == 0),
        }
        for i, one in enumerate(sums)
    ]
    (folder / 'items.jsonl').write_text(
        ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in items), encoding='utf-8'
    )
    shared = {
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': {'test': str(folder / 'items.jsonl')}},
        'test_split': 'test',
        'doc_to_text': '{{ask}}',
    }
    written = {
        **shared,
        'output_type': 'generate_until',
        'doc_to_target': '{{choices[gold]}}',
        'generation_kwargs': {'until': ['\n\n', '2'], 'max_gen_toks': 8, 'do_sample': False},
        'metric_list': [{'metric': 'exact_match'}],
    }
    chosen = {
        **shared,
        'output_type': 'multiple_choice',
        'doc_to_choice': '{{choices}}',
        'doc_to_target': 'gold',
        'metric_list': [{'metric': 'acc'}],
    }
    for name, settings in (('chosen', chosen), ('written', written)):
        text = json.dumps({'task': name, **settings}, ensure_ascii=False)  # JSON is YAML
        (folder / f'{name}.yaml').write_text(text, encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def evaluated(folder, smollm2_server):
    """What lm-eval finds of each item of a task, by `hf` and through the server."""
    pytest.importorskip('lm_eval')
    import lm_eval
    import lm_eval.tasks
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    hf = HFLM(pretrained=theirs(), tokenizer=their_tokenizer(), batch_size=16, max_length=LENGTH)

    def samples(model, task, limit, chat):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
        return sorted(found['samples'][task], key=lambda one: one['doc_id'])

    def both(task, limit, *, chat=False):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the server starts beside it
        expected = samples(hf, task, limit, chat)
        torch.set_num_threads(threads)
        url, settings = f'{smollm2_server.url}/v1', {'model': 'smollm2', 'max_length': LENGTH}
        settings |= {'num_concurrent': 8, 'max_retries': 1}
        if chat:
            client = LocalChatCompletion(base_url=f'{url}/chat/completions', **settings)
        else:  # it finds that the server has a tokenizer, and asks it
            client = LocalCompletionsAPI(base_url=f'{url}/completions', **settings)
            assert client.tokenizer_backend == 'remote'
        return expected, samples(client, task, limit, chat)

    return both


def test_log_likelihoods_and_accuracy_equal_hf(evaluated):
    expected, found = evaluated('chosen', ITEMS)
    assert len(found) == ITEMS
    pairs = [[choice[0] for one in run for choice in one['resps']] for run in (found, expected)]
    totals, marks = (np.array([[pair[i] for pair in run] for run in pairs]) for i in range(2))
    np.testing.assert_allclose(totals[0], totals[1], atol=1e-3)
    np.testing.assert_array_equal(marks[0], marks[1])
    assert 0 < marks[0].sum() < len(marks[0])
    accuracies = [np.mean([one['acc'] for one in run]) for run in (found, expected)]
    assert accuracies[0] == accuracies[1] > 0.5


def test_written_text_equals_hf(evaluated):
    expected, found = evaluated('written', WRITTEN)
    assert [one['resps'] for one in found] == [one['resps'] for one in expected]


def test_chats_equal_hf(evaluated):
    expected, found = evaluated('written', WRITTEN, chat=True)
    assert [one['resps'] for one in found] == [one['resps'] for one in expected]
