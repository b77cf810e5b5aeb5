"""Validation: several sets, a fixed sample of them, and no more memory than training takes."""

import itertools
import json
import math
import random
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.data import pieces
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.base import Loss
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import DOCUMENT, InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.train import validate
from llama_jax.train.experiment import with_tokenizer
from llama_jax.train.place import place
from llama_jax.train.progress import Progress
from llama_jax.train.records import Records
from llama_jax.train.step import abstract_state, train_step
from llama_jax.train.validate import Validation, loss_step, shared_out
from tests.data.corpus import CHINESE
from tests.objectives import texts
from tests.train.conftest import MODEL, changed

SIZES = {'few': 2, 'some': 90, 'many': 240}
COMPUTE = Compute()


@pytest.fixture(scope='module')
def mesh():
    return meshes.make(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def params(mesh):
    return layers.create(MODEL, jax.random.key(0), mesh)


@pytest.fixture(scope='module')
def sets(experiment, tmp_path_factory):
    """The tiny experiment with three sets, of 2, 90 and 240 documents that begin with a number."""
    path = tmp_path_factory.mktemp('sets')
    words = json.dumps(list(CHINESE), ensure_ascii=False).split('，')
    chance = random.Random(0)
    for name, n in SIZES.items():
        texts = (f'{i} {" ".join(chance.choices(words, k=3))}' for i in range(n))
        lines = (json.dumps({'text': text}) + '\n' for text in texts)
        (path / f'{name}.jsonl').write_text(''.join(lines), 'utf-8')
    sources = (Source('text_files', files=(f'{path}/{name}.jsonl',), label=name) for name in SIZES)
    return changed(experiment, 'data', validation=tuple(sources))


@pytest.fixture(scope='module')
def tokenizer(sets):
    return load_tokenizer(sets.data)


@pytest.fixture(scope='module')
def whole(sets, tokenizer, mesh, params):
    return measure(changed(sets, 'evaluation', batches=0), tokenizer, mesh, params)


def measure(experiment, tokenizer, mesh, params):
    with jax.set_mesh(mesh):
        return Validation(experiment, tokenizer, mesh)(params)


def test_sets_are_files_as_a_whole_and_all_together_are_one_pass(sets, whole, tokenizer):
    n_bytes = 0
    for source in sets.data.validation:
        with open(source.files[0], encoding='utf-8') as lines:
            texts = [json.loads(line)['text'] for line in lines]
        n_bytes += whole[f'bytes/{source.label}']
        assert whole[f'bytes/{source.label}'] == sum(len(text.encode()) for text in texts)
    assert whole['bytes'] == n_bytes
    bits = sum(whole[f'bits_per_byte/{x}'] * whole[f'bytes/{x}'] for x in SIZES)
    assert whole['bits_per_byte'] == pytest.approx(bits / n_bytes, rel=1e-9)
    figures = [whole[f'loss/{name}'] for name in SIZES]
    assert min(figures) < whole['loss'] < max(figures)


def test_the_figures_of_a_set_are_those_of_it_alone(sets, whole, tokenizer, mesh, params):
    for source in sets.data.validation[:2]:
        alone = changed(changed(sets, 'data', validation=(source,)), 'evaluation', batches=0)
        found = measure(alone, tokenizer, mesh, params)
        assert not [name for name in found if '/' in name]
        assert {f'{name}/{source.label}': value for name, value in found.items()} == {
            name: value for name, value in whole.items() if name.endswith(f'/{source.label}')
        }


def test_a_sample_is_the_same_at_every_call_and_for_every_seed(
    sets, whole, tokenizer, mesh, params
):
    sample = changed(sets, 'evaluation', batches=8)
    with jax.set_mesh(mesh):
        validation = Validation(sample, tokenizer, mesh)
        assert len(validation.batches) == 3 and sum(validation.batches) == 8
        few, some, many = validation.batches
        assert few == 1 < some < many
        first = validation(params)
        assert first == validation(params)
    assert first == measure(replace(sample, seed=9), tokenizer, mesh, params)
    assert first['bytes/few'] == whole['bytes/few']
    assert first['bytes/many'] < whole['bytes/many']


def test_a_sample_comes_from_all_over_a_set(sets, tokenizer, mesh):
    with (
        jax.set_mesh(mesh),
        Validation(sets, tokenizer, mesh).open(list(SIZES).index('many')) as loader,
    ):
        batches = list(itertools.islice(loader, 6))
    texts = [
        tokenizer.decode(batch['targets'][b, t : t + 6])
        for batch in batches
        for b, t in np.argwhere((batch['positions'] == 0) & (batch['segments'] > 0))
    ]
    numbers = sorted(int(text.split()[0]) for text in texts if text.split()[0].isdecimal())
    assert len(numbers) > 5
    assert numbers[0] < 80 and numbers[-1] > 160  # of 240
    assert numbers != list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize('batches', [1, 2, 7, 64])
@pytest.mark.parametrize('tokens', [[5], [1, 1], [900, 90, 10], [1, 1, 1, 97], [0, 7], [3, 3, 3]])
def test_batches_are_shared_out_by_tokens(batches, tokens):
    given = shared_out(batches, tokens)
    exact = [batches * n / sum(tokens) for n in tokens]
    assert min(given) >= 1
    assert sum(given) == batches or sum(given) > batches and min(exact) < 1
    for n, share in zip(given, exact, strict=True):
        assert abs(n - share) < 1 or (n == 1 and share < 1)
    assert shared_out(0, tokens) == [None] * len(tokens)


def test_microbatches_give_the_same_sums(sets, tokenizer, mesh, params):
    with (
        jax.set_mesh(mesh),
        Validation(sets, tokenizer, mesh).open(list(SIZES).index('some')) as loader,
    ):
        batch = place(next(loader), mesh)
        one, four = (
            loss_step(MODEL, CausalLM(), COMPUTE, accumulate=n)(params, batch) for n in (1, 4)
        )
    assert float(one.weight) == float(four.weight) > 100
    assert float(four.total) == pytest.approx(float(one.total), rel=1e-5)
    assert four.metrics.keys() == one.metrics.keys()
    for name, value in one.metrics.items():
        assert float(four.metrics[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_microbatches_save_the_memory_that_they_save_in_training(mesh):
    """Compiled only. The model is wide and its vocabulary small, so that activations outweigh the
    logits, of which the loss makes some at a time anyway."""
    config = ModelConfig(**{**vars(MODEL), 'ffn': 512, 'vocab': 64})
    tx = optax.identity()
    training = train_step(
        config, CausalLM(), tx, learning_rate=lambda step: 1e-3, accumulate=8, compute=COMPUTE
    )
    state = abstract_state(config, CausalLM(), tx)
    state = jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        state,
        layout.shardings(state, mesh),
    )
    shapes = {'inputs': 'int32', 'targets': 'int32', 'segments': 'int32', 'positions': 'int32'}
    shapes['weights'] = 'float32'
    batch = place({name: np.ones((128, 64), dtype) for name, dtype in shapes.items()}, mesh)

    def temporary(program, first):
        with jax.set_mesh(mesh):
            return program.lower(first, batch).compile().memory_analysis().temp_size_in_bytes

    in_training = temporary(training, state)
    whole, parts = (
        temporary(loss_step(config, CausalLM(), COMPUTE, accumulate=n), state.params)
        for n in (1, 8)
    )
    assert parts < whole / 4
    assert parts < in_training


@pytest.mark.slow
@pytest.mark.parametrize(('batches', 'pools', 'rows'), [(5, 3, 16), (1, 1, 8), (0, 0, 16)])
def test_a_contrastive_loss_is_measured_in_pools_of_a_fixed_size(
    sets, tokenizer, mesh, params, monkeypatch, batches, pools, rows
):
    """Two batches at once, all of them full; each text is told from all others of its pool."""
    monkeypatch.setattr(validate, 'POOL', 2 * 8 * sets.train.seq_len)
    sets = changed(sets, 'data', validation=sets.data.validation[2:])
    config = changed(replace(sets, objective=InfoNCE()), 'evaluation', batches=batches)
    with jax.set_mesh(mesh):
        validation = Validation(config, tokenizer, mesh)
        assert validation.rows == rows
        with validation.open(0) as loader:
            in_all = loader.filled()[0]
        (read,) = validation.batches
        assert read == (pools or in_all // 16) > 0
        if batches == 5:
            figures = validation(params)
            with validation.open(0) as loader:
                texts = [pairs(batch) for batch in itertools.islice(loader, pools)]
            told = [1 + sum(other != one for other in ids) for ids in texts for one in ids]
            assert figures['candidates'] == pytest.approx(np.mean(told))


def pairs(batch):
    """The document of each pair."""
    segment_BT = batch['a/segments']
    return [
        int(batch[f'a/{DOCUMENT}'][row][segment_BT[row] == m + 1][0])
        for row in range(len(segment_BT))
        for m in range(segment_BT[row].max())
    ]


@pytest.mark.slow
def test_contrastive_batches_hold_as_many_documents_as_in_training(
    experiment, tokenizer, mesh, tmp_path
):
    """Of a corpus of long documents: a batch of one document would have no wrong answers."""
    words = ''.join(CHINESE).split('，')
    for name, n in (('train', 40), ('held', 24)):
        chance = random.Random(name)
        lines = ('，'.join(chance.choices(words, k=300)) for _ in range(n))
        path = tmp_path / f'{name}.jsonl'
        path.write_text(''.join(json.dumps({'text': line}) + '\n' for line in lines), 'utf-8')
    data = DataConfig(
        sources=(Source('text_files', split='all', files=(f'{tmp_path}/train.jsonl',)),),
        validation=(Source('text_files', files=(f'{tmp_path}/held.jsonl',)),),
        tokenizer=experiment.data.tokenizer,
    )
    contrastive = replace(experiment, data=data, objective=InfoNCE(views='spans'))
    training = Loader(
        data,
        split='train',
        tokenizer=tokenizer,
        maker=contrastive.objective,
        batch=8,
        seq_len=32,
        seed=0,
    )
    with training, jax.set_mesh(mesh):
        wanted = np.mean([documents(next(training)) for _ in range(6)])
        with Validation(contrastive, tokenizer, mesh).open(0) as loader:
            found = np.mean([documents(next(loader)) for _ in range(6)])
    assert wanted > 6
    assert found > 0.8 * wanted


def documents(batch):
    """How many different documents the pairs of a batch are of."""
    return len(set(batch[f'a/{DOCUMENT}'][batch['a/segments'] > 0].tolist()))


def test_the_progress_tells_every_set(experiment, tmp_path, capsys):
    records = Records(tmp_path, experiment, {})
    records.begin(0)
    progress = Progress(
        experiment, records, first_step=0, seconds=0.0, flops_per_token=1.0, peak_flops=None
    )
    result = {'loss': 2.0, 'bits_per_byte': 1.5, 'loss/zh': 1.0, 'bits_per_byte/zh': 0.75}
    progress.validated(5, result | {'loss/a/b': 3.0, 'bits_per_byte/a/b': 2.25})
    progress.validated(6, {'loss': 2.0, 'loss/zh': 1.0, 'accuracy/zh': 0.5})
    bound = {'loss': 2.0, 'bits_per_byte': 1.5, 'likelihood': 'bound'}
    progress.validated(7, bound)
    progress.validated(8, bound | {'bits_per_byte_se': 0.0123})
    for step in (18, 19, 20):  # no line at 19: one has come just now
        progress.log(step, {'loss': 1.25}, seconds_waited=0.0)
    records.close()
    *said, first, last = capsys.readouterr().err.splitlines()
    for step, line in ((18, first), (20, last)):
        assert re.fullmatch(rf'step {step}/20  loss 1\.250  [\d,]+ tokens/s  0\.0 s left', line)
    assert said == [
        'step 5  validation: loss 2.000, bits per byte 1.500 (zh 0.750, a/b 2.250)',
        'step 6  validation: loss 2.000 (zh 1.000)',
        'step 7  validation: loss 2.000, bits per byte 1.500 (bound)',
        'step 8  validation: loss 2.000, bits per byte 1.500 (bound, s.e. 0.012)',
    ]


@pytest.mark.slow
def test_a_bound_says_so_and_is_of_the_bytes_of_a_causal_model(sets, whole, mesh, params):
    """Of the same documents and their ends; masks are the same at every validation."""
    experiment, tokenizer = with_tokenizer(replace(sets, objective=MaskedDiffusion(z_loss=0.0)))
    assert experiment.model == MODEL
    config = changed(experiment, 'evaluation', batches=0)
    found = measure(config, tokenizer, mesh, params)
    assert found['likelihood'] == 'bound' and 'likelihood' not in whole
    # The first set has one batch, whose error nobody knows.
    assert 'bits_per_byte_se' not in found and 'bits_per_byte_se' not in whole
    larger = changed(config, 'data', validation=config.data.validation[1:])
    assert 0 < measure(larger, tokenizer, mesh, params)['bits_per_byte_se'] < 0.1
    assert found['bytes'] == whole['bytes'] and found == measure(config, tokenizer, mesh, params)
    tokens = found['bits_per_byte'] * found['bytes'] * math.log(2) / found['nll']
    assert tokens == pytest.approx(round(tokens), abs=1e-2) and found['loss'] == found['nll']


@pytest.mark.parametrize(
    'objective',
    [CausalLM(), MaskedDiffusion(), MaskedDiffusion(read_previous=True), BlockDiffusion(block=4)],
)
@pytest.mark.parametrize('name', ['llama', 'bpe'])
def test_bytes_are_those_of_the_text(objective, name):
    """Without the space that LLaMA 1 and 2 put before it; in documents that are cut as well."""
    vocabulary = texts.tokenizer(name)
    documents = ['a', 'of two words', CHINESE[0][:60], '', 'x' * 90]
    made = [
        example
        for text in documents
        for example in pieces.examples(
            *(objective, vocabulary.encode(text)),
            tokenizer=vocabulary,
            seq_len=32,
            rng=np.random.default_rng(0),
        )
    ]
    batch = texts.packed(made, objective, seq_len=32, rows=16, pad_id=vocabulary.pad_id)
    sums = validate.loss_sums(
        lambda params, batch: Loss(jnp.zeros(()), jnp.ones(()), {'nll': jnp.zeros(())}),
        {},
        [batch],
        place=lambda batch: batch,
        byte_lengths=vocabulary.byte_lengths,
        dummy_prefix=vocabulary.bos_id if vocabulary.dummy_prefix else None,
    )
    assert vocabulary.dummy_prefix == (name == 'llama')
    assert sums['bytes'] == sum(len(text.encode()) for text in documents)


def test_the_digest_is_of_what_is_read(sets, tokenizer, mesh):
    def digest(experiment):
        return Validation(experiment, tokenizer, mesh).digest

    assert digest(sets) == digest(changed(sets, 'train', steps=99))
    fewer = changed(sets, 'data', validation=sets.data.validation[1:])
    others = [fewer, changed(sets, 'evaluation', batches=1), changed(sets, 'train', batch=4)]
    assert len({digest(sets), *map(digest, others)}) == 4


def test_what_is_carried_is_handed_to_the_loss(sets, tokenizer, mesh):
    validation, given = Validation(sets, tokenizer, mesh), []

    def step(params, batch, carried):
        given.append(carried)
        return Loss(jnp.zeros(()), jnp.ones(()), {'nll': jnp.zeros(())})

    validation._step = step
    validation({}, carried={'queue': 1})
    assert given and all(carried == {'queue': 1} for carried in given)
