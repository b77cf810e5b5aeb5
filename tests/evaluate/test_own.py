"""The evaluation on text of one's own: what needs text alone, in any language."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.evaluate import examples, own, texts, words
from llama_jax.evaluate.held import Held
from llama_jax.evaluate.metrics import METRICS, TASK
from llama_jax.evaluate.suite import Suite
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.masked import MaskedLM
from llama_jax.train.restore import Trained
from tests.data.corpus import CHINESE
from tests.evaluate.conftest import MODEL, experiment
from tests.evaluate.test_examples import Letters

SMALL = Suite(
    span=16,
    pool=24,
    window=48,
    windows=8,
    middle=3,
    infill=8,
    order=60,
    steps=2,
    rates=(1e-3,),
    tuned_seeds=1,
)
TEXT_ALONE = {
    *(f'recall_span_{k}' for k in (1, 5, 10)),
    *('alignment', 'uniformity', 'effective_rank', 'probe_accuracy', 'finetune_accuracy'),
}


def files(path, **settings):
    return Source('text_files', files=(str(path),), **settings)


def stored(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), 'utf-8')
    return path


def mixed(seed, characters):
    """Pieces of these sentences in an order of its own."""
    whole, rng = ''.join(CHINESE), np.random.default_rng(seed)
    found = ''
    while len(found) < characters:
        at = int(rng.integers(len(whole) - 3))
        found += whole[at : at + 3]
    return found[:characters]


@pytest.fixture(scope='module')
def mesh():
    """One device: that many give the same is proved program by program, in test_model.py."""
    return meshes.make(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def params(mesh):
    return layers.create(MODEL, jax.random.key(0), mesh)


@pytest.fixture(scope='module')
def chinese(tmp_path_factory):
    texts = (mixed(i, 150) for i in range(40))
    return stored(tmp_path_factory.mktemp('own') / 'chinese.jsonl', texts)


@pytest.fixture(scope='module')
def measured(chinese, params, tokenizer, mesh):
    def run(objective):
        setting = experiment(objective)
        data = DataConfig(validation=(files(chinese, label='zh'), files(chinese, label='again')))
        trained = Trained(setting, params, {}, tokenizer, step=7)
        return own.evaluate_own(trained, setting, data, SMALL, mesh)

    return {type(objective): run(objective) for objective in (CausalLM(), MaskedLM())}


@pytest.mark.slow
def test_what_needs_labels_or_pairs_is_absent_and_the_rest_is_there(measured):
    likelihoods = {
        *('bits_per_byte', 'suffix_bits_per_byte', 'suffix_ordinary_bits_per_byte'),
        *('middle_bits_per_byte', 'middle_ordinary_bits_per_byte', 'calibration_error'),
    }
    masked = {
        *('middle_pseudo_bits_per_byte', 'middle_pseudo_ordinary_bits_per_byte', 'infill_exact'),
    }
    for objective, more in ((CausalLM, likelihoods), (MaskedLM, masked)):
        for label in ('zh', 'again'):
            result = measured[objective][label].result
            assert json.loads(json.dumps(result)) == result
            assert list(result['metrics']) == [x for x in METRICS if not x.startswith(TASK)]
            present = {k for k, found in result['metrics'].items() if found['value'] is not None}
            assert present == TEXT_ALONE | more
            for name in result['metrics'].keys() - present:
                assert result['metrics'][name]['n'] == 0 and result['metrics'][name]['why']
            assert result['topics'] == [] and list(result['layers']) == ['probe']
            assert result['text']['documents'] == 40 and result['text']['split'] == 'all'
    causal, masked = measured[CausalLM]['zh'].result, measured[MaskedLM]['again'].result
    assert causal['examples'] == masked['examples'] and causal['text']['set'] == 'zh'
    why = {name: found.get('why', '') for name, found in causal['metrics'].items()}
    assert 'zh has no field package' in why['topics_accuracy']
    assert 'no fields docstring and body' in why['recall_doc_1']
    assert 'fitted on training texts' in why['recall_span_white_1']
    assert 'the objective cannot be asked' in why['infill_exact']


def opened(path):
    (documents,) = open_sources(DataConfig(validation=(files(path),)), 'validation').sources
    return documents


def of(path, suite, tokenizer):
    return texts.collect(suite, Held((opened(path),)), Held(()), tokenizer, strict=True)


def test_long_documents_are_cut_and_texts_come_from_all_over(tokenizer, tmp_path):
    long = ''.join(CHINESE) * 500
    path = stored(tmp_path / 'long.jsonl', [f'{i:03} {long}' for i in range(60)])
    seen = []

    class Spy:
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
        decode = tokenizer.decode

        def encode(self, text):
            seen.append(text)
            return tokenizer.encode(text)

    suite = replace(SMALL, pool=12, windows=4)
    found = of(path, suite, Spy())
    whole = [text for text in seen if len(text) == 8192]  # the others are chunks of the probe
    assert len(whole) == 12
    stored_order = [text[:3] for text in opened(path)]
    numbers = [stored_order.index(text[:3]) for text in whole]
    assert all(5 * i <= number < 5 * i + 5 for i, number in enumerate(numbers))  # 12 of 60
    assert {len(window) for window in found.windows} == {48}
    assert len(found.begun) == len(found.windows) == len(found.middles) == 4
    digests = [
        examples.digest(of(path, replace(suite, seed=seed), tokenizer)) for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_too_little_text_is_told_in_one_line(chinese, params, tokenizer, mesh, tmp_path):
    one = stored(tmp_path / 'one.jsonl', [''.join(CHINESE)])
    with pytest.raises(UserError, match='text_files has too little text: no two documents of 16'):
        of(one, SMALL, tokenizer)
    short = stored(tmp_path / 'short.jsonl', [f'{i} {mixed(i, 20)}' for i in range(9)])
    with pytest.raises(UserError, match=r'no two texts of 400 tokens \(the longest .* has \d+\)'):
        of(short, replace(SMALL, window=400), tokenizer)
    setting = experiment(CausalLM())
    trained = Trained(setting, params, {}, tokenizer, step=7)
    data = DataConfig(validation=(files(chinese),))
    with pytest.raises(UserError, match='--suite.per-topic has no effect on text of your own'):
        own.evaluate_own(trained, setting, data, replace(SMALL, per_topic=3), mesh)
    for change in ({'tasks': ('needle',)}, {'task_items': 7}):
        with pytest.raises(UserError, match='--suite.task.* has no effect on text of your own'):
            own.evaluate_own(trained, setting, data, replace(SMALL, **change), mesh)
    with pytest.raises(UserError, match='--suite.text has no effect on text of your own'):
        own.evaluate_own(trained, setting, data, replace(SMALL, text='other'), mesh)


def test_recall_at_k_of_k_texts_says_nothing(params, tokenizer, mesh, tmp_path):
    path = stored(tmp_path / 'six.jsonl', [f'{i}{mixed(i, 60)}' for i in range(6)])
    setting = experiment(CausalLM())
    trained = Trained(setting, params, {}, tokenizer, step=7)
    data = DataConfig(validation=(files(path),))
    suite = replace(SMALL, window=16, windows=2, span=64, pool=8)
    (found,) = own.evaluate_own(trained, setting, data, suite, mesh).values()
    values = {k: found.result['metrics'][f'recall_span_{k}']['value'] for k in (1, 5, 10)}
    assert values[1] is not None and values[5] is not None and values[10] is None


def cut(text, longest=4):
    """What may be infilled in a text of letters."""
    letters, found = Letters(), set()
    for seed in range(60):
        pieces = [letters.encode(text)]
        for part in words.infills(pieces, letters, n=1, longest=longest, seed=seed):
            assert ''.join(map(letters.decode, part)) == text
            assert len(text) // 4 <= len(part.prefix)
            found.add(letters.decode(part.middle))
    return found


def test_words_of_scripts_with_spaces_are_whole():
    assert cut('cats; a pig, the cat and the dog: category; cat') == {
        'cat',
        ' cat',
        'the',
        ' the',
    }
    assert cut('пёс; коты и пёс, кот и мой пёс: и кот, да', 5) == {'кот', ' кот', 'пёс', ' пёс'}
    # Vowel signs are part of a Hindi word.
    assert cut('यह हिन्दी है और वह हिन्दी है, मैं', 7) == {'हिन्दी', ' हिन्दी'}
    assert cut('one two and nothing of all this twice') == set()


def test_runs_of_scripts_without_spaces():
    found = cut('天下大勢，分久必合，合久必分。周末七國分爭，天下大勢，并入於秦，分久必合。')
    assert found == {'天下', '下大', '大勢', '天下大', '下大勢', '天下大勢', '久必'}
    # A single one where there is no longer one, and no letter without its vowel sign.
    assert cut('一二三四五六三七八九十') == {'三'}
    assert cut('กที่มาคนที่ไปที่นามา', 1) == {'า', 'น'}
    assert 'ที่' in cut('กที่มาคนที่ไปที่นามา', 3)
    assert cut('カタカナ文字カタカナ', 3) >= {'カナ'}


def test_a_piece_that_begins_within_a_character_is_no_obstacle(tokenizer):
    """Characters that the vocabulary lacks are several tokens each."""
    tokens = tokenizer.encode(CHINESE[2] * 5)
    pieces = [tokens[i : i + 128] for i in range(1, 40)]
    found = words.infills(pieces, tokenizer, n=30, longest=8, seed=0)
    assert len(found) == 30
    for part in found:
        middle = tokenizer.decode(part.middle)
        whole = tokenizer.decode(np.concatenate(part))
        assert middle and '\ufffd' not in middle and whole.count(middle) > 1
        assert len(part.middle) <= 8
