"""Batches as text: what stands in the rows, which tokens bear loss, where they come from."""

import json
import re

import numpy as np
import pytest

from llama_jax.data import show
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.loader import Loader
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.text.sentencepiece_model import bytes_tokenizer

BYTES = bytes_tokenizer()
TEXTS = ['春眠不觉晓，处处闻啼鸟。', 'def f(x):\n\treturn x[0]', 'naïve café 🙂 ' * 3, 'the end']


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    """The lines of a first batch, under an objective."""
    path = tmp_path_factory.mktemp('text') / 'poems.jsonl'
    path.write_text('\n'.join(json.dumps({'text': text}) for text in TEXTS), 'utf-8')

    def shown(maker, *, plain=True, n=1, **settings):
        settings = {'batch': 2, 'seq_len': 96, 'seed': 0} | settings
        data = DataConfig(sources=(Source('text_files', files=(str(path),)),), train_split='all')
        with Loader(data, split='train', tokenizer=BYTES, maker=maker, **settings) as loader:
            return list(show.batches(loader, BYTES, n, plain=plain))

    return shown


def test_every_document_is_there_with_its_origin(shown):
    lines = [line.plain for line in shown(CausalLM())]
    found = re.findall(
        r'poems, epoch (\d), document (\d) \((\d+) tokens\), whole', '\n'.join(lines)
    )
    assert len(found) >= 4
    documents = re.findall(r'epoch 0, document (\d)', '\n'.join(lines))
    assert set(documents) == {'0', '1', '2', '3'}
    for epoch, document, tokens in found:
        origin = f'poems, epoch {epoch}, document {document} ({tokens} tokens), whole'
        (at,) = (i for i, line in enumerate(lines) if line.endswith(origin))
        (text,) = (text for text in TEXTS if len(text.encode()) == int(tokens))
        text = text.replace('\n', '↵').replace('\t', '⇥')
        assert lines[at + 1].strip() == f'text <s>⟦{text}</s>⟧'


def test_the_head_of_a_row_counts_what_the_loader_gives(shown):
    heads = [line.plain for line in shown(CausalLM(), n=3) if line.plain.startswith('batch')]
    assert [head.split(':')[0] for head in heads] == [
        f'batch {batch}, row {row} of 2' for batch in (1, 2, 3) for row in (1, 2)
    ]
    assert all(re.search(r': \d segments?, \d+\.\d% padding$', head) for head in heads)


def test_masked_tokens_are_predicted(shown):
    lines = [line.plain.strip() for line in shown(MaskedLM())]
    reads = [line for line in lines if line.startswith('reads')]
    predicts = [line for line in lines if line.startswith('predicts')]
    assert reads and len(reads) == len(predicts)
    assert any('<mask>' in line for line in reads) and not any('⟦' in line for line in reads)
    assert all(re.fullmatch('predicts (⟦.+⟧)?', line) for line in predicts)


def test_streams_are_named(shown):
    lines = [line.plain.strip() for line in shown(SpanCorruption(encoder=True))]
    assert any(line.startswith('encoder reads ') and '<sentinel_0>' in line for line in lines)
    assert any(line.startswith('text <') and '⟦<sentinel_0>' in line for line in lines)
    assert any('% padding, encoder ' in line or 'encoder ' in line for line in lines)
    lines = [line.plain.strip() for line in shown(InfoNCE(), batch=4, seq_len=64)]
    assert any(line.startswith('a reads ') for line in lines)
    assert any(line.startswith('b reads ') for line in lines)


def test_colours_on_a_terminal(shown):
    lines = shown(CausalLM(), plain=False)
    assert not any('⟦' in line.plain for line in lines)
    line = next(line for line in lines if line.plain.endswith('text <s>the end</s>'))
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles['<s>'] == 'dim bold magenta' and styles['</s>'] == 'green bold magenta'
    assert styles['t'] == 'green'


def ids(text):
    return BYTES.encode(text).tolist()


def test_weights_in_brackets():
    line = show.marked(BYTES, ids('abcde'), [0, 1, 1, 0.5, 0], plain=True)
    assert line.plain == 'a⟦bc⟧⟦0.5:d⟧e'


@pytest.mark.parametrize(
    'tokens, text',
    [
        (ids('é中🙂'), 'é中🙂'),
        (ids('中')[:2], '\\xe4\\xb8'),
        (ids('中')[1:] + ids('a'), '\\xb8\\xada'),
        ([*ids('中')[:1], BYTES.mask_id, *ids('b')], '\\xe4<mask>b'),
        (ids('中')[:2] + ids('中'), '\\xe4\\xb8中'),
        (ids('\x1b[2J\u202e\r\0'), '\\x1b[2J\\u202e\\r\\x00'),
        (ids('\u3000می\u200cروم 👩\u200d🔬'), '\u3000می\u200cروم 👩\u200d🔬'),
        ([BYTES.bos_id, BYTES.pad_id, BYTES.sentinel_ids[3]], '<s><pad><sentinel_3>'),
        ([0], '<id 0>'),
        ([], ''),
    ],
)
def test_tokens_are_spelled(tokens, text):
    spelled = show.spelled(BYTES, tokens)
    assert len(spelled) == len(tokens) and ''.join(spelled) == text


def test_a_character_of_several_tokens_stands_at_the_last():
    assert show.spelled(BYTES, ids('a中')) == ['a', '', '', '中']
    assert show.spelled(BYTES, np.array(ids('中'), np.int32)) == ['', '', '中']


@pytest.mark.parametrize(
    'targets, weights, readings',
    [
        # The next token: one line, with the last target where it bears loss.
        ([6, 7, 9], [0, 1, 0.5], [('text', [5, 6, 7, 9], [0, 0, 1, 0.5])]),
        ([6, 7, 9], [1, 1, 0], [('text', [5, 6, 7], [0, 1, 1])]),
        ([0, 7, 0], [0, 1, 0], [('text', [5, 6, 7], [0, 0, 1])]),
        # Anything else: what is read, and what bears loss.
        ([4, 7, 9], [1, 0, 0.5], [('reads', [5, 6, 7], [0, 0, 0]), ('predicts', [4, 9], [1, 0.5])]),
    ],
)
def test_what_is_shown_of_a_segment(targets, weights, readings):
    """The second of two in a row, before padding."""
    batch = {
        'inputs': np.array([[1, 5, 6, 7, 0]]),
        'targets': np.array([[2, *targets, 0]]),
        'weights': np.array([[1, *weights, 0]]),
        'segments': np.array([[1, 2, 2, 2, 0]]),
    }
    assert list(show._readings(batch, 0, 2)) == readings


def test_a_segment_without_a_place_in_a_stream_is_empty_there():
    batch = {name: np.ones((1, 2), int) for name in ('inputs', 'targets', 'weights', 'segments')}
    assert list(show._readings(batch, 0, 2)) == [('text', [], [])]
