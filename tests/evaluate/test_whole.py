"""The likelihood of whole texts under weights of others, against the plain forward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from llama_jax import mesh as meshes
from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.evaluate import whole
from llama_jax.generate.finite import NotFiniteError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives.masked import MaskedLM
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.convert import written
from tests.data.corpus import CHINESE
from tests.objectives import texts

MODEL = ModelConfig(
    vocab=520, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32, context=48
)
TEXTS = [CHINESE[0][:200], 'def f(x):\n    return x', '', 'a']


@pytest.fixture(scope='module')
def trained(tmp_path_factory, mesh):
    rng = np.random.default_rng(5)
    draw = lambda path, x: rng.normal(size=x.shape).astype(np.float32) * 0.3 + ('scale' in path)  # noqa: E731
    params = trees.map_named(draw, layers.abstract(MODEL))
    path = written.directory(tmp_path_factory.mktemp('others') / 'theirs', MODEL, params)
    return whole.of_others(str(path), mesh, '--from')


def plain(params):
    """Negative log-likelihood of ids from the second on, on one device."""
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(jax.device_get(params), jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(lambda token_BT: layers.bind(MODEL, params)(token_BT, compute=Compute())[0])

    def nll(ids):
        token_BT = np.zeros((1, 48), np.int32)
        token_BT[0, : len(ids) - 1] = ids[:-1]
        with jax.set_mesh(mesh):
            log_TV = np.asarray(jax.nn.log_softmax(step(token_BT)[0]), np.float64)
        return -log_TV[np.arange(len(ids) - 1), ids[1:]].sum()

    return nll


@pytest.mark.slow
@pytest.mark.parametrize('begin', [(), (1,)])
def test_it_is_that_of_each_document_in_parts_of_the_context(trained, mesh, begin):
    trained, own = trained
    assert own == () and trained.config == MODEL and trained.tokenizer.vocab_size == MODEL.vocab
    found = whole.likelihood_of_text(trained, TEXTS, mesh, begin=begin)
    nll = plain(trained.params)
    expected, n_tokens, n_bytes = 0.0, 0, 0
    for text in TEXTS:
        ids = np.array([*begin, *trained.tokenizer.encode(text)])
        for i in range(0, len(ids) - 1, 48):
            part = ids[i : i + 49]
            expected += nll(part)
            n_tokens += len(part) - 1
        n_bytes += len(text.encode())
        if not begin and len(ids):
            n_bytes -= len(trained.tokenizer.token_bytes(ids[0]))
    assert n_tokens > 48, 'the first is longer than the context'
    assert (found['tokens'], found['bytes'], found['documents']) == (n_tokens, n_bytes, 4)
    assert found['nats_per_token'] == pytest.approx(expected / n_tokens, rel=1e-5)
    assert found['bits_per_byte'] == pytest.approx(expected / math.log(2) / n_bytes, rel=1e-5)


def test_the_space_that_a_tokenizer_puts_before_a_text_is_no_byte_of_it(trained, mesh):
    asked = trained[0]._replace(tokenizer=texts.tokenizer('spaced bytes'))
    for begin, n_bytes in (
        ((1,), sum(len(text.encode()) for text in TEXTS)),
        (
            (),  # the first token is given: the space
            sum(len(text.encode()) for text in TEXTS),
        ),
    ):
        found = whole.likelihood_of_text(asked, TEXTS, mesh, begin=begin)
        assert found['bytes'] == n_bytes


def test_no_more_is_read_than_said(trained, mesh, monkeypatch):
    monkeypatch.setattr(whole, 'TOKENS', 30)
    found = whole.likelihood_of_text(trained[0], TEXTS[1:2] * 40, mesh, begin=(1,))
    assert found['tokens'] == 30 and found['documents'] < 40
    for n in (1, 2, 7, 40):
        assert sorted(whole._spread(i, n) for i in range(n)) == list(range(n))


@pytest.mark.slow
def test_what_has_no_likelihood(trained, mesh):
    trained, _ = trained
    masked = trained.experiment.__class__(**{**vars(trained.experiment), 'objective': MaskedLM()})
    asked = trained._replace(experiment=masked)
    assert whole.likelihood_of_text(asked, TEXTS, mesh, begin=()) is None
    with pytest.raises(UserError, match='no token whose likelihood'):
        whole.likelihood_of_text(trained, ['', 'a'], mesh, begin=())
    broken = {**trained.params, 'norm': {'scale_D': jnp.full(16, jnp.nan)}}
    with pytest.raises(NotFiniteError, match='norm.scale_D'):
        whole.likelihood_of_text(trained._replace(params=broken), TEXTS, mesh, begin=())


def test_a_tokenizer_that_loses_text_is_told(tmp_path, mesh, caplog):
    """Of bytes without a piece for a space."""
    params = trees.map_named(lambda _, x: np.zeros(x.shape, np.float32), layers.abstract(MODEL))
    path = written.directory(tmp_path / 'theirs', MODEL, params)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(bytes_tokenizer()._content)
    model.pieces.remove(next(piece for piece in model.pieces if piece.piece == '▁'))
    for other in path.glob('tokenizer*.json'):
        other.unlink()
    (path / 'tokenizer.model').write_bytes(model.SerializeToString())
    whole.of_others(str(path), mesh, '--from')
    assert 'theirs loses text: spaces become U+2581' in caplog.text
