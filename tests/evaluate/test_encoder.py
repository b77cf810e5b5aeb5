"""The encoder that mteb asks; a real task of mteb where it is installed."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluate.encoder import Encoder
from tests.evaluate.test_ask import subject  # noqa: F401

TEXTS = ['a red thing', '红色', 'word ' * 300, 'def f(x):']


@pytest.mark.slow
def test_batches_in_their_order_with_prompts(subject):  # noqa: F811
    encode = Encoder(subject, prompts={'query': 'Q: '})
    batches = [{'text': TEXTS[:3]}, {'text': TEXTS[3:]}]
    about = {'task_metadata': None, 'hf_split': 'test', 'hf_subset': 'default', 'batch_size': 2}
    found_ND = encode.encode(batches, **about)
    assert found_ND.dtype == np.float32 and found_ND.shape == (4, subject.programs.config.dim)
    assert encode.truncated == 1
    for text, row in zip(TEXTS, found_ND, strict=True):
        (alone_D,) = Encoder(subject).encode([text])
        np.testing.assert_allclose(row, alone_D, atol=1e-5)
    query = SimpleNamespace(value='query')
    (asked_D,) = encode.encode([{'text': TEXTS[:1]}], prompt_type=query, **about)
    np.testing.assert_allclose(asked_D, Encoder(subject).encode(['Q: ' + TEXTS[0]])[0], atol=1e-5)
    trained = dataclasses.replace(subject, prompts={'query': 'Q: '})
    (own_D,) = Encoder(trained).encode([{'text': TEXTS[:1]}], prompt_type=query, **about)
    np.testing.assert_array_equal(own_D, asked_D)
    assert encode.encode([]).shape == (0, subject.programs.config.dim)


def test_similarities(subject):  # noqa: F811
    encode, rng = Encoder(subject), np.random.default_rng(0)
    a_ND, b_MD = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in b_MD] for a in a_ND]
    np.testing.assert_allclose(encode.similarity(a_ND, b_MD), expected, rtol=1e-5)
    pairs = encode.similarity_pairwise(a_ND, b_MD)
    np.testing.assert_allclose(pairs, np.diagonal(expected), rtol=1e-5)


def test_what_cannot_be_encoded(subject):  # noqa: F811
    with pytest.raises(UserError, match="no kind 'passage': give query, document"):
        Encoder(subject, prompts={'passage': ''})
    with pytest.raises(UserError, match='a batch holds image: only text'):
        Encoder(subject).encode([{'image': [1]}])
    if not importlib.util.find_spec('mteb'):
        with pytest.raises(UserError, match='takes mteb'):
            Encoder(subject).mteb_model_meta  # noqa: B018


@pytest.mark.parity
@pytest.mark.filterwarnings('default')
def test_a_task_of_mteb(subject, tmp_path, monkeypatch):  # noqa: F811
    """Only where somebody has installed it: it brings polars and sentence-transformers."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    mteb = pytest.importorskip('mteb')
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask

    encode = Encoder(subject)
    assert isinstance(encode, mteb.EncoderProtocol)
    found = mteb.evaluate(encode, [MockSTSTask(), MockRetrievalTask()], cache=None)
    assert len(found.task_results) == 2
    assert all(np.isfinite(one.get_score()) for one in found.task_results)
