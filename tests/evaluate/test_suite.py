"""The whole evaluation on three packages, with a model that was never trained."""

import json
import math
import re
import types
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.evaluate import choosing, held, likelihood, per_text, retrieval, texts
from llama_jax.evaluate.examples import Middle
from llama_jax.evaluate.light import light
from llama_jax.evaluate.metrics import CURVES, METRICS, TASK
from llama_jax.evaluate.scores import Scorer
from llama_jax.evaluate.suite import Suite, _Measuring, check, check_tasks, evaluate_trained
from llama_jax.evaluate.texts import MARKS
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.objectives.base import EXTRA
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.switch import Switch
from llama_jax.objectives.weighted import Weighted
from llama_jax.train.restore import Trained
from tests.evaluate.conftest import COMPUTE, MODEL, experiment

SMALL = Suite(
    topics=3,
    per_topic=20,
    order=60,
    span=16,
    pool=24,
    window=48,
    windows=8,
    middle=3,
    infill=8,
    steps=2,
    rates=(1e-3,),
    tuned_seeds=2,
    tasks=('minimal_pairs_en',),
    task_items=6,
)
HEADLINE = {name for name, metric in METRICS.items() if metric.headline}
TOPICS = {'topics_accuracy', 'topics_embedding_accuracy'}
WITHOUT_PARTS = {'uniformity', 'effective_rank', 'calibration_error'}


@pytest.fixture(scope='module')
def mesh():
    """One device: that many give the same is proved program by program, in test_model.py."""
    return meshes.make(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def params(mesh):
    return layers.create(MODEL, jax.random.key(0), mesh)


@pytest.fixture(scope='module')
def evaluations(params, tokenizer, mesh):
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


@pytest.fixture(scope='module')
def measured(evaluations):
    return {name: one.result for name, one in evaluations.items()}


def present(result):
    return {name for name, found in result['metrics'].items() if found['value'] is not None}


@pytest.mark.slow
def test_what_is_measured_of_whom(measured):
    for result in measured.values():
        of_suite = {f'{TASK}{name}' for name in SMALL.tasks}
        named = [name for name in METRICS if not name.startswith(TASK) or name in of_suite]
        assert list(result['metrics']) == named
    common = HEADLINE | TOPICS
    assert present(measured['contrastive']) == common
    likelihoods = {
        *('bits_per_byte', 'suffix_bits_per_byte', 'suffix_ordinary_bits_per_byte'),
        *('middle_bits_per_byte', 'middle_ordinary_bits_per_byte', 'calibration_error'),
    }
    chosen = {'task_minimal_pairs_en'}
    assert present(measured['causal']) == common | likelihoods | chosen
    pseudo = {'middle_pseudo_bits_per_byte', 'middle_pseudo_ordinary_bits_per_byte'}
    assert present(measured['masked']) == common | pseudo | chosen | {'infill_exact'}


def test_values_are_sound(measured):
    for result in measured.values():
        assert json.loads(json.dumps(result)) == result
        for name, found in result['metrics'].items():
            if found['value'] is None:
                assert found.pop('why')
                assert found == {'value': None, 'low': None, 'high': None, 'n': 0}
                continue
            assert found['low'] <= found['value'] <= found['high'], name
            assert found['n'] > 1
            if METRICS[name].unit == 'share':
                assert 0 <= found['value'] <= 1
            if METRICS[name].unit == 'bits per byte':
                # As wide as the vocabulary, over 1 to 4 bytes a token: it was never trained.
                assert math.log2(MODEL.vocab) / 5 < found['value'] < 2 * math.log2(MODEL.vocab)
        for name in ('probe', 'topics'):
            assert len(result['layers'][name]) == MODEL.layers + 1
            assert 1 <= result['chosen_layers'][name]['contextual'] <= MODEL.layers
        # Order cannot be told from the mean of embeddings, and is not by chance.
        assert result['layers']['probe'][0] == 0.5
        assert len(result['finetuning']['accuracy_of_seeds']) == 2
        assert result['step'] == 7 and result['seconds'] > 0
        assert result['topics'] == ['email', 'idlelib']
        assert result['suite']['pool'] == 24


def test_whole_texts_are_charged_for_every_token(evaluations, params, tokenizer, mesh):
    """For the end of a text too, of all that the model can say; only parts are told among ordinary
    tokens as well."""
    found = texts.of_run(SMALL, experiment(CausalLM()), tokenizer)
    score = Scorer(
        *(MODEL, params),
        sees_all=False,
        compute=COMPUTE,
        mesh=mesh,
        byte_lengths=tokenizer.byte_lengths,
    )
    asked, wholes = CausalLM().reading.whole, likelihood.wholes(found.begun)
    answer = likelihood.ask(score, asked, wholes, tokenizer, seed=SMALL.seed)
    bits = likelihood.bits(answer, wholes, tokenizer)
    of = evaluations['causal'].texts['bits_per_byte']
    np.testing.assert_allclose(of.over, bits.bits, rtol=1e-6)
    assert (bits.ordinary < bits.bits).all()
    value = evaluations['causal'].result['metrics']['bits_per_byte']['value']
    assert value == pytest.approx(bits.bits.sum() / bits.bytes.sum(), rel=1e-6)


@pytest.mark.slow
def test_a_bound_of_whole_texts_has_its_standard_error(params, tokenizer, mesh):
    setting = experiment(MaskedDiffusion())
    found = texts.of_run(SMALL, setting, tokenizer)
    trained = Trained(setting, params, {}, tokenizer, step=7)
    measuring = _Measuring(trained, setting, SMALL, found, mesh)
    measuring.likelihoods()
    for name in ('bits_per_byte', 'suffix_bits_per_byte'):
        assert measuring.metrics[name]['kind'] == 'bound'
        assert 0 < measuring.metrics[name]['standard_error'] < 0.5
    measuring.tasks()
    assert measuring.metrics['task_minimal_pairs_en']['by'] == 'bound'


def test_every_mean_is_that_of_its_texts(evaluations, tmp_path):
    for evaluation in evaluations.values():
        found = evaluation.result['metrics']
        assert set(evaluation.texts) == present(evaluation.result) - WITHOUT_PARTS
        for name, of in evaluation.texts.items():
            value = found[name]['value']
            assert of.over.sum() / of.under.sum() == pytest.approx(value), name
            assert len(of.ids) == len(of.documents) == len(of.over) == found[name]['n']
    one, other = evaluations['causal'].texts, evaluations['contrastive'].texts
    assert one['recall_span_1'].ids.tolist() == other['recall_span_1'].ids.tolist()
    path = tmp_path / 'evaluation.npz'
    per_text.save(path, one)
    again = per_text.load(path)
    assert list(again) == list(one)
    for name, of in again.items():
        for array, before in zip(of, one[name], strict=True):
            np.testing.assert_array_equal(array, before)
    assert per_text.load(tmp_path / 'other.npz') == {}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match='evaluation.npz cannot be read .* delete it'):
        per_text.load(path)


def test_intervals_resample_documents():
    """Texts of one document are no independent draws: 4 documents of 100 equal texts say as much
    as 4 texts."""
    over = np.repeat([0.0, 1, 1, 0], 100)
    found, _ = per_text.measured(
        over, ids=list(map(str, range(400))), documents=list(np.repeat(list('abcd'), 100)), seed=0
    )
    assert found['value'] == 0.5 and found['n'] == 400
    assert found['low'] == 0 and found['high'] == 1


def test_arms_are_measured_on_the_same_texts(measured, tokenizer):
    assert len({result['examples'] for result in measured.values()}) == 1
    # Two arms that look alike at the same weights, under other objectives, agree in what is common.
    causal, contrastive = measured['causal'], measured['contrastive']
    for name in HEADLINE | TOPICS:
        assert causal['metrics'][name] == contrastive['metrics'][name]
    assert causal['layers'] == contrastive['layers']
    assert measured['masked']['metrics']['alignment'] != causal['metrics']['alignment']
    digests = [
        texts.digest(texts.of_run(replace(SMALL, seed=seed), setting, tokenizer))
        for seed, setting in ((0, experiment(MaskedLM())), (1, experiment(CausalLM())))
    ]
    assert digests[0] == causal['examples'] != digests[1]


def test_texts_are_of_held_out_modules(tokenizer):
    found = texts.of_run(SMALL, experiment(CausalLM()), tokenizer)
    sets = held.of_name('python_corpus/stdlib_code')
    train, validation, test = (
        {record.group for record in held.records(part, group='module')}
        for part in (sets.train, sets.validation, sets.test)
    )
    assert not (train & validation or train & test or validation & test)
    for parts in (found.topics, found.order):
        groups = [{chunk.group for chunk in part} for part in parts[1:]]
        assert all(groups) and set.union(*groups) <= validation | test
        assert sum(map(len, groups)) == len(set.union(*groups))
        assert groups[-1] <= test
    # Figures are of the split that no choice has seen.
    text = '\0'.join(record.text for record in held.records(sets.test, group='module'))
    windows = [tokenizer.decode(window) for window in found.windows]
    assert windows and all(window in text for window in windows)
    docs = held.of_name('python_corpus/stdlib_docs')
    docstrings = [
        {r.pair[0] for r in held.records(part, group='', pair=SMALL.pairs_fields)}
        for part in (docs.train, docs.test)
    ]
    starts = [tokenizer.decode(a) for a in found.pairs.a]
    assert all(any(full.startswith(a) for full in docstrings[1]) for a in starts)
    assert found.about['pairs'] == 'python_corpus/stdlib_docs' and not found.absent


def test_the_split_for_figures_can_be_cut_from_another(tmp_path):
    """Of a data set without splits for it: what no choice has seen stands apart."""
    lines = (json.dumps({'text': f'{i} ' * 40}) + '\n' for i in range(400))
    (tmp_path / 'all.jsonl').write_text(''.join(lines))
    source = Source('text_files', files=(str(tmp_path / 'all.jsonl'),))
    cut = DataConfig((source,), train_split='train[:90%]', validation_split='train[90%:95%]')

    def sets(data):
        return held.of_run(data, CausalLM().reads)

    found = sets(replace(cut, test_split='train[95%:]'))
    test, validation, train = (
        {documents[i] for documents in part for i in range(len(documents))}
        for part in (found.test, found.validation, found.train)
    )
    whole = sets(DataConfig((source,))).train[0]
    assert test | validation | train == {whole[i] for i in range(len(whole))}
    assert len(test) + len(validation) + len(train) == len(whole) and min(map(len, (test, train)))
    assert found.splits == ('train[95%:]',) and not found.selection
    # What validation reads as well is told, and the sets that a run names are what is measured.
    for split in ('train[90%:95%]', 'train[93%:97%]'):
        assert sets(replace(cut, test_split=split)).selection == ('text_files',)
    # Of two documents there is something to measure; one is measured beside what is validated on.
    few = {n: sets(replace(cut, test_split=f'train[-{n}:]')) for n in (1, 2)}
    assert few[2].validation and not few[2].selection and len(few[2].test) == 1
    assert not few[1].validation and few[1].selection == ('text_files',) and len(few[1].test) == 2
    own = replace(source, split='train[:50%]')
    assert sets(replace(cut, test_split='train[95%:]', sources=(own,))).splits == ('train[:50%]',)
    named = sets(replace(cut, test_split='train[95%:]', validation=(own,)))
    assert named.splits == ('train[:50%]',) and len(named.test[0]) == len(whole) // 2
    two = sets(replace(cut, validation_split='train[90%:92%]', test_split='test+train[95%:]'))
    assert not two.selection and len(two.test[0]) > len(found.test[0])
    no_validation = replace(cut, validation_split='valid', test_split='train[95%:]')
    with pytest.raises(UserError, match="'valid'"):
        sets(no_validation)
    twice = replace(cut, sources=(source, replace(source, split='test')), test_split='test')
    with pytest.raises(UserError, match='the split test of text_files.* .as test.'):
        sets(twice)
    with pytest.raises(UserError, match='trained on as well'):
        sets(replace(cut, train_split='train+test', validation_split='test', test_split='test'))
    for split, match in (
        ('all[:50%]', 'has no split'),
        ('tset', '--data.test-split tset: text_files has train, validation, test'),
        ('test[:1]+other[:1]', 'text_files has train, validation, test'),
        ('test[:150%]', 'has no split'),
        ('train[89%:]', 'trained on as well'),
        ('test+train[:1]', 'trained on as well'),
        ('all', 'trained on as well'),
    ):
        with pytest.raises(UserError, match=re.escape(match)) as error:
            sets(replace(cut, test_split=split))
        assert '\n' not in str(error.value)


def test_blocks_of_a_window_have_to_fit_into_the_context():
    model = replace(MODEL, context=128)
    check(replace(SMALL, window=60), experiment(BlockDiffusion(block=4), model))
    check(replace(SMALL, window=63), experiment(CausalLM(), model))
    for block, window in ((4, 63), (48, 60)):
        setting = experiment(BlockDiffusion(block=block), model)
        with pytest.raises(
            UserError, match=f'suite.window {window} tokens takes .* BlockDiffusion'
        ):
            check(replace(SMALL, window=window), setting)


@pytest.mark.parametrize(
    'objective, fits',
    [
        (CausalLM(), 48),
        (MaskedDiffusion(), 48),
        (BlockDiffusion(block=4), 31),
        (Switch((BlockDiffusion(block=4), CausalLM()), (0, 5)), 48),
        (Weighted((CausalLM(), InfoNCE())), 48),
    ],
    ids=lambda value: type(value).__name__,
)
def test_items_of_tasks_have_to_fit_as_an_objective_reads_them(
    objective, fits, tokenizer, monkeypatch
):
    """Of a context of 64 blocks have half, as each text stands there twice."""
    ids = np.full(100, tokenizer.encode('a')[-1], np.int32)

    def asked(name, tokenizer, *, n, longest):
        assert longest == 64 - MARKS
        return types.SimpleNamespace(texts=[Middle(ids[: length - 2], ids[:2], ids[:0])])

    monkeypatch.setattr(choosing, 'asked', asked)
    tasks, setting = replace(SMALL, tasks=('needle',)), experiment(objective)
    length = fits
    check_tasks(tasks, setting, tokenizer)
    if fits < 48:
        length = fits + 1
        with pytest.raises(UserError, match='the task needle takes 7[0-9] positions of this'):
            check_tasks(tasks, setting, tokenizer)


def test_a_suite_that_does_not_fit_is_refused_in_one_line():
    setting = experiment(CausalLM())
    with pytest.raises(UserError, match='the model context is 64: make suite.window'):
        check(replace(SMALL, window=64), setting)
    with pytest.raises(UserError, match="'star_grap': did you mean star_graph"):
        check(replace(SMALL, tasks=('star_grap',)), setting)
    with pytest.raises(UserError, match='suite.rates .* each once'):
        check(replace(SMALL, rates=(1e-3, 1e-3)), setting)


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
