"""The parts of evaluation that run a model, against the objectives' own losses and plain loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.data import pieces
from llama_jax.evaluate import finetune, likelihood
from llama_jax.evaluate.represent import layer_step, vector_step, vectors
from llama_jax.evaluate.scores import Scorer
from llama_jax.generate.finite import NotFiniteError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.objectives.asked import Middle, as_it_stands
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.train.run import place
from llama_jax.train.validate import figures, loss_step, loss_sums
from tests.evaluate.conftest import COMPUTE, MODEL
from tests.objectives.texts import packed as in_rows

SEQ_LEN = 48
ENCODER_DECODER = replace(MODEL, encoder_layers=1, layers=1)


@pytest.fixture(scope='module')
def tokens():
    return np.random.default_rng(0).integers(3, 259, 150).astype(np.int32)


@pytest.fixture(scope='module')
def encoder_decoder(mesh):
    return layers.create(ENCODER_DECODER, jax.random.key(1), mesh)


def packed(examples, objective, tokenizer, *, rows):
    """The rows that training would make of these examples."""
    batch = in_rows(examples, objective, seq_len=SEQ_LEN, rows=rows, pad_id=tokenizer.pad_id)
    assert batch['segments'].max(axis=1).sum() == len(examples)
    return batch


@pytest.mark.slow
@pytest.mark.parametrize(
    'objective',
    [CausalLM(), PrefixLM(), SpanCorruption(), MaskedLM(), Bart()],
    ids=lambda objective: type(objective).__name__,
)
def test_scores_equal_the_loss_of_training(objective, tokens, tokenizer, mesh, params, request):
    """Examples apart and padded score what the objective's loss gives them packed together."""
    config, weights = MODEL, params
    if isinstance(objective, Bart):
        config, weights = ENCODER_DECODER, request.getfixturevalue('encoder_decoder')
    rng = np.random.default_rng(1)
    examples = [
        example
        for document in np.split(tokens, [40, 70, 110])
        for example in pieces.examples(
            objective, document, tokenizer=tokenizer, seq_len=SEQ_LEN, rng=rng
        )
    ]
    score = Scorer(
        config,
        weights,
        sees_all=objective.sees_all,
        compute=COMPUTE,
        mesh=mesh,
        byte_lengths=tokenizer.byte_lengths,
    )
    scores = score(examples)
    batch = packed(examples, objective, tokenizer, rows=8)
    with jax.set_mesh(mesh):
        loss = loss_step(config, objective, COMPUTE)(weights, place(batch, mesh))
    # Sums of float32 in another order.
    assert -scores.log_p.sum() == pytest.approx(float(loss.metrics['nll']), rel=1e-4)
    right = [
        (chosen[: int(e['weights'].sum())] == e['targets'][e['weights'] > 0]).sum()
        for chosen, e in zip(scores.chosen, examples, strict=True)
    ]
    assert sum(right) == float(loss.metrics['accuracy'])
    assert (scores.log_p <= scores.confidence + 1e-6).all()
    if isinstance(objective, CausalLM):  # of whom the whole distribution is at hand
        (alone,) = examples[:1]
        tokens_T = alone['inputs'][None]
        with jax.set_mesh(meshes.make(MeshConfig(), jax.devices()[:1])):
            model = layers.bind(config, jax.device_get(weights))
            x_BTD, _ = model.features(tokens_T, compute=COMPUTE)
            p_TV = np.exp(np.asarray(jax.nn.log_softmax(model.logits(x_BTD)[0])), dtype=np.float64)
        ordinary = np.flatnonzero(tokenizer.byte_lengths > 0)
        T = len(alone['targets'])
        expected = p_TV[np.arange(T), alone['targets']] / p_TV[:, ordinary].sum(axis=1)
        np.testing.assert_allclose(scores.ordinary[0, :T], np.log(expected), rtol=1e-3)


def plain(window):
    return as_it_stands(Middle(window[:1], window[1:], window[:0]), None)


def scorer(params, mesh, tokenizer):
    return Scorer(
        MODEL,
        params,
        sees_all=False,
        compute=COMPUTE,
        mesh=mesh,
        byte_lengths=tokenizer.byte_lengths,
    )


def test_bits_per_byte_equal_those_of_validation(tokenizer, mesh, params):
    """On the same windows of text, cut in the same places."""
    text = tokenizer.encode('The quick brown fox jumps over the lazy dog, 12 times a day.\n' * 9)
    ids = np.concatenate([[tokenizer.bos_id], text, [tokenizer.eos_id]]).astype(np.int32)
    windows = [ids[i : i + SEQ_LEN + 1] for i in range(0, len(ids) - 1, SEQ_LEN)]
    batch = packed([plain(window) for window in windows], CausalLM(), tokenizer, rows=16)
    with jax.set_mesh(mesh):
        sums = loss_sums(
            loss_step(MODEL, CausalLM(), COMPUTE),
            params,
            [batch],
            place=lambda batch: place(batch, mesh),
            byte_lengths=tokenizer.byte_lengths,
        )
        expected = figures(sums)
    score = scorer(params, mesh, tokenizer)
    texts = likelihood.wholes(windows)
    answer = likelihood.ask(score, CausalLM().reading.whole, texts, tokenizer, seed=0)
    found = likelihood.bits(answer, texts, tokenizer)
    assert expected['bytes'] == found.bytes.sum() == 61 * 9
    assert found.bits.sum() / found.bytes.sum() == pytest.approx(
        expected['bits_per_byte'], rel=1e-5
    )
    assert len(found.bits) == len(windows) and (found.ordinary < found.bits).all()


@pytest.mark.slow
def test_a_model_that_computes_no_numbers_is_not_measured(tokens, tokenizer, mesh, params):
    broken = {**params, 'norm': jax.tree.map(lambda x: x * np.nan, params['norm'])}
    score = scorer(broken, mesh, tokenizer)
    with pytest.raises(NotFiniteError, match='the model gives NaN.*norm.scale_D'):
        score([plain(tokens[:SEQ_LEN])])
    step = vector_step(MODEL, causal=True, compute=COMPUTE)
    with pytest.raises(NotFiniteError, match='features are NaN.*norm.scale_D'):
        vectors(step, broken, [tokens[:9]], longest=MODEL.context, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize('causal', [True, False])
def test_vectors_are_means_over_tokens(causal, tokens, mesh, params):
    texts = np.split(tokens, [35, 55, 90, 110])[:4]  # two padded lengths, not in order
    step = vector_step(MODEL, causal=causal, compute=COMPUTE)
    by_layer = layer_step(MODEL, causal=causal, compute=COMPUTE)
    found = vectors(step, params, texts, longest=MODEL.context, mesh=mesh)
    found_layers = vectors(by_layer, params, texts, longest=MODEL.context, mesh=mesh)
    assert found_layers.shape == (MODEL.layers + 1, len(texts), MODEL.dim)

    @jax.jit
    def alone(token_T):
        """One text without padding: final features, and the residual stream of each layer."""
        model = layers.bind(MODEL, local)
        x_BTD, _ = model.features(token_T[None], causal=causal, compute=COMPUTE)
        return x_BTD[0], model.layer_features(token_T[None], causal=causal, compute=COMPUTE)[:, 0]

    local = jax.device_get(params)
    with jax.set_mesh(meshes.make(MeshConfig(), jax.devices()[:1])):
        for i, text in enumerate(texts):
            x_TD, x_LTD = jax.device_get(alone(text))
            np.testing.assert_allclose(found[i], x_TD.mean(axis=0), rtol=1e-4, atol=1e-5)
            means_LD = x_LTD.mean(axis=1)
            np.testing.assert_allclose(found_layers[:, i], means_LD, rtol=1e-4, atol=1e-5)
            embedded_TD = local['embed_VD'][text]
            np.testing.assert_allclose(means_LD[0], embedded_TD.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_vectors_of_an_encoder_decoder_are_the_encoders(tokens, mesh, encoder_decoder):
    texts = [tokens[:20], tokens[20:60]]
    step = vector_step(ENCODER_DECODER, causal=False, compute=COMPUTE)
    found = vectors(step, encoder_decoder, texts, longest=64, mesh=mesh)
    changed = {**encoder_decoder, 'blocks': jax.tree.map(jnp.zeros_like, encoder_decoder['blocks'])}
    np.testing.assert_array_equal(vectors(step, changed, texts, longest=64, mesh=mesh), found)
    by_layer = layer_step(ENCODER_DECODER, causal=False, compute=COMPUTE)
    assert vectors(by_layer, encoder_decoder, texts, longest=64, mesh=mesh).shape == (2, 2, 16)


def tuned(texts, labels, mesh, params, rates=(1e-2,), seeds=1):
    parts = (
        finetune.Texts(texts[part], labels[part])
        for part in (slice(0, 48), slice(48, 64), slice(64, None))
    )
    return finetune.finetune(
        MODEL,
        params,
        *parts,
        n_classes=2,
        budget=finetune.Budget(steps=40, batch=8, rates=rates, seeds=seeds, every=10),
        causal=True,
        compute=COMPUTE,
        seed=0,
        mesh=mesh,
    )


@pytest.mark.slow
def test_finetuning_learns_what_can_be_learnt_and_stops_by_validation(mesh, params):
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=114)
    # Which of two tokens stands among the others.
    texts = [rng.integers(10, 200, 12).astype(np.int32) for _ in labels]
    for text, label in zip(texts, labels, strict=True):
        text[3:6] = 7 + label
    before = jax.device_get(params)
    found = tuned(texts, labels, mesh, params, rates=(1e-6, 1e-2), seeds=2)
    assert found.right_SN.shape == (2, 50) and found.right_SN.all()
    # The rate that learns is chosen, by validation; it is the highest that was tried.
    assert found.rate == 1e-2 and found.validation[1e-2] < 0.1 < found.validation[1e-6]
    about = found.about()
    assert about['edge'] and about['accuracy_of_seeds'] == [1, 1]
    assert found.steps == [40, 40] and about['cut'] == 2  # the loss still falls at the last step
    alone = tuned(texts, labels, mesh, params)
    np.testing.assert_array_equal(alone.right_SN[0], found.right_SN[0])
    assert alone.steps == found.steps[:1] and not alone.about()['edge']
    # Nothing to learn: chance, 3 sigma of 50 draws, and the best step is an early one.
    noise = tuned(texts, rng.permutation(labels), mesh, params)
    assert 0.29 < noise.right_SN.mean() < 0.71
    assert noise.steps[0] < 40 and not noise.about()['cut']
    # A rate that leaves the numbers is not the best one.
    wild = tuned(texts, labels, mesh, params, rates=(1e30, 1e-2))
    assert wild.rate == 1e-2
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
