"""The whole evaluation on three packages, with a model that was never trained."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluate import retrieval, suite
from llama_jax.evaluate.examples import PARTS
from llama_jax.evaluate.light import light
from llama_jax.evaluate.metrics import CURVES, METRICS
from llama_jax.evaluate.suite import Suite, evaluate_trained
from llama_jax.objectives.base import EXTRA
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.masked import MaskedLM
from llama_jax.train.restore import Trained
from tests.evaluate.conftest import MODEL, experiment

SMALL = Suite(
    topics=3, per_topic=20, span=16, pool=24, window=48, windows=8, middle=3, infill=8, steps=2
)
HEADLINE = {name for name, metric in METRICS.items() if metric.headline}


@pytest.fixture(scope='module')
def measured(params, tokenizer, mesh):
    def run(objective, seed=0):
        setting = replace(experiment(objective), seed=seed)
        trained = Trained(setting, params, {}, tokenizer, step=7)
        return evaluate_trained(trained, setting, SMALL, mesh)

    return {
        name: run(objective)
        for name, objective in (
            ('causal', CausalLM()),
            ('masked', MaskedLM()),
            ('contrastive', InfoNCE(bidirectional=False)),
        )
    }


def present(result):
    return {name for name, found in result['metrics'].items() if found['value'] is not None}


def test_what_is_measured_of_whom(measured):
    for result in measured.values():
        assert list(result['metrics']) == list(METRICS)
    assert present(measured['contrastive']) == HEADLINE
    likelihoods = {'bits_per_byte', 'suffix_bits_per_byte', 'middle_bits_per_byte'}
    assert present(measured['causal']) == HEADLINE | likelihoods
    assert present(measured['masked']) == HEADLINE | {'middle_pseudo_bits_per_byte', 'infill_exact'}


def test_values_are_sound(measured):
    for result in measured.values():
        assert json.loads(json.dumps(result)) == result
        for name, found in result['metrics'].items():
            if found['value'] is None:
                assert found == {'value': None, 'low': None, 'high': None, 'n': 0}
                continue
            assert found['low'] <= found['value'] <= found['high'], name
            assert found['n'] > 1
            if METRICS[name].unit == 'share':
                assert 0 <= found['value'] <= 1
            if METRICS[name].unit == 'bits per byte':
                # As wide as the vocabulary, over 1 to 4 bytes a token: it was never trained.
                assert math.log2(MODEL.vocab) / 5 < found['value'] < 2 * math.log2(MODEL.vocab)
        assert len(result['layers']['probe']) == MODEL.layers + 1
        assert result['step'] == 7 and result['seconds'] > 0
        assert result['topics'] == ['asyncio', 'email', 'xml']
        assert result['suite']['pool'] == 24


def test_arms_are_measured_on_the_same_texts(measured, tokenizer):
    assert len({result['examples'] for result in measured.values()}) == 1
    # Two arms that look alike at the same weights, under other objectives, agree in what is common.
    causal, contrastive = measured['causal'], measured['contrastive']
    for name in HEADLINE:
        assert causal['metrics'][name] == contrastive['metrics'][name]
    assert causal['layers'] == contrastive['layers']
    assert measured['masked']['metrics']['alignment'] != causal['metrics']['alignment']
    again = suite._texts(replace(SMALL), tokenizer)
    assert suite.examples.digest(again) == causal['examples']
    other = suite._texts(replace(SMALL, seed=1), tokenizer)
    assert suite.examples.digest(other) != causal['examples']


def test_held_out_texts_are_of_held_out_modules(tokenizer):
    found = suite.texts(SMALL, tokenizer)
    trained_on, held = (
        [r for split in splits for r in suite._records(SMALL.text, split)]
        for splits in (PARTS[:1], PARTS[1:])
    )
    assert not {r['module'] for r in held} & {r['module'] for r in trained_on}
    text = '\0'.join(r['text'] for r in held)
    windows = [tokenizer.decode(window) for window in found.windows]
    assert windows and all(window in text for window in windows)
    # Short windows of notices that many modules open with may stand in training modules too.
    seen = '\0'.join(r['text'] for r in trained_on)
    assert sum(window in seen for window in windows) < len(windows) / 4
    names = {chunk.module for chunk in found.topics.train}
    assert not names & {chunk.module for chunk in found.topics.test}
    trained_docs = {r['docstring'] for r in suite._records(SMALL.pairs, 'train')}
    assert not {tokenizer.decode(a) for a in found.functions.a} & trained_docs
    assert {len(pair) for pair in (found.functions.a, found.functions.b)} == {24}


def test_a_short_context_is_refused_in_one_line(params, tokenizer, mesh):
    setting = experiment(CausalLM())
    trained = Trained(setting, params, {}, tokenizer, step=7)
    with pytest.raises(UserError, match='the model context is 64: make suite.window'):
        evaluate_trained(trained, setting, replace(SMALL, window=64), mesh)


def test_light_is_the_same_as_by_hand(params, tokenizer, mesh):
    setting = experiment(CausalLM())
    with jax.set_mesh(mesh):  # as in the loop, with the objective's own parameters among them
        found = light(setting, {**params, EXTRA: {'temperature': np.float32(1)}}, tokenizer, mesh)
    assert set(found) == set(CURVES)
    assert found == light(setting, params, tokenizer, mesh)
    assert 0 <= found['recall_span_1'] <= 1 and found['uniformity'] < 0 < found['alignment']
    # Vectors that are all equal: aligned, not uniform, and nothing is found.
    flat = {**params, 'embed_VD': params['embed_VD'] * 0 + 1}
    equal = light(setting, flat, tokenizer, mesh)
    assert equal['alignment'] == pytest.approx(0, abs=1e-6)
    assert equal['uniformity'] == pytest.approx(0, abs=1e-6)
    assert retrieval.uniformity(np.eye(4)) == pytest.approx(-4)
