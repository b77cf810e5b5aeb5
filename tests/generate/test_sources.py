"""Encoder-decoders generate as their plain forward pass says, by the generator and the engine."""

import functools
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Finish, Piece, Request
from llama_jax.errors import UserError
from llama_jax.generate.beam import beam_search
from llama_jax.generate.controls import Controls
from llama_jax.generate.generator import Generator
from llama_jax.model import layers
from llama_jax.model.patterns import Window
from tests.generate.test_cached_architectures import weights
from tests.generate.tiny import COMPUTE, CONFIG, generator, mesh_of, prompt_of, tokens_of

LLAMA = replace(CONFIG, layers=1, encoder_layers=2)
CLASSIC = replace(
    LLAMA,
    **dict(norm='layer', norm_place='post', mlp='gelu', bias=True, positions='learned', tied=True),
)
CONFIGS = {'llama': LLAMA, 'classic': CLASSIC, 'window': replace(LLAMA, pattern=Window(5))}
N, LENGTH = 16, 64
"""Tokens generated, and the length of the plain forward pass."""
PROMPTS = [prompt_of(n) for n in (1, 47, 3, 1)]
SOURCES = [prompt_of(n, seed=1) for n in (30, 4, 16, 1)]
SAMPLED = {'temperature': [0.0, 1.0, 0.7, 2.0], 'top_k': [0, 0, 9, 5], 'seed': range(4)}


@functools.cache
def ours(name='llama', n_devices=1, prefill_chunk=16, axes=()):
    return Generator(
        CONFIGS[name],
        weights(CONFIGS[name]),
        mesh=mesh_of(n_devices, **dict(axes)),
        compute=COMPUTE,
        eos_ids=(),
        pad_id=0,
        prefill_chunk=prefill_chunk,
    )


@functools.cache
def forward(name):
    """Next-token logits at every place of a row, without a cache or padding that counts."""
    config, mesh = CONFIGS[name], mesh_of()
    params = jax.device_put(weights(config), jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    def step(source_BS, segment_BS, token_BT):
        model = layers.bind(config, params)
        memory = model.encode(source_BS, segment_BS=segment_BS, compute=COMPUTE)
        return model(token_BT, memory=memory, compute=COMPUTE)[0]

    def padded(tokens):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        return row

    def logits(source, tokens):
        with jax.set_mesh(mesh):
            seen = padded([1] * len(source))
            return np.asarray(step(padded(source), seen, padded(tokens)))[0]

    return logits


def assert_greedy(name, source, prompt, generated):
    """Every token is the likeliest after those before it."""
    tokens = [*prompt, *generated]
    after = slice(len(prompt) - 1, len(tokens) - 1)
    np.testing.assert_array_equal(forward(name)(source, tokens)[after].argmax(-1), generated)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_cached_equals_uncached(name):
    """Prompts and sources of several lengths together; prompts in three pieces, the longest of
    which goes round the ring of a window."""
    if name == 'window':
        assert ours(name).shape(4, 47, N, 30).slots == 32
    completions = ours(name)(PROMPTS, sources=SOURCES, max_tokens=N)
    for i, completion in enumerate(completions):
        assert_greedy(name, SOURCES[i], PROMPTS[i], completion.tokens)
    assert len({token for one in completions for token in one.tokens}) > 4


@pytest.mark.slow
def test_the_source_is_heard():
    others = [prompt_of(n, seed=2) for n in (30, 4, 16, 1)]
    one, other = (
        tokens_of(ours()(PROMPTS, sources=sources, max_tokens=N)) for sources in (SOURCES, others)
    )
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_alone_equals_together():
    together = ours()(PROMPTS, sources=SOURCES, max_tokens=N, **SAMPLED)
    for i in (0, 3):
        settings = {name: values[i] for name, values in SAMPLED.items()}
        [alone] = ours()([PROMPTS[i]], sources=[SOURCES[i]], max_tokens=N, **settings)
        assert alone == together[i]


@pytest.mark.slow
def test_stream_equals_loop():
    pieces = list(ours().stream(PROMPTS[1], source=SOURCES[1], max_tokens=N, chunk=6))
    [whole] = ours()(PROMPTS[1:2], sources=SOURCES[1:2], max_tokens=N)
    assert sum(pieces, []) == whole.tokens


@pytest.mark.slow
@pytest.mark.parametrize('axes', [(('data', 2), ('tensor', 2)), ()])
def test_eight_devices_equal_one(axes):
    settings = {'sources': SOURCES, 'max_tokens': N, **SAMPLED}
    assert ours(n_devices=8, axes=axes)(PROMPTS, **settings) == ours()(PROMPTS, **settings)


def test_the_decoder_projects_its_source_once():
    """A step multiplies nothing of the source's length by a weight, only by queries."""
    programs = ours().programs
    controls, shape = ours()._checked(PROMPTS, {'max_tokens': N}, SOURCES)
    assert shape.source == 32 and shape.slots == 64
    with jax.set_mesh(programs.mesh):
        state, _, rows, _ = ours()._read(PROMPTS, controls, shape, SOURCES)
        how = {'slots': 16, 'n_top': None}
        step = programs.decode.lower(programs.params, state, rows, 5, **how).as_text()
    token_BS, length = np.zeros((4, 64), np.int32), np.zeros(4, np.int32)
    with jax.set_mesh(programs.mesh):
        read = programs.encode.lower(programs.params, token_BS, length).as_text()

    def products(text):
        return [line for line in text.splitlines() if 'dot_general' in line]

    # Of the source's 32 places, D 32; as the step has one token, [4, 32, 32] is a whole memory.
    assert not [line for line in products(step) if 'tensor<4x32x32xf32>' in line]
    assert [line for line in products(read) if 'tensor<4x64x32xf32>' in line]


class Heard(list):
    def __init__(self):
        super().__init__()
        self.done = threading.Event()

    def __call__(self, event):
        self.append(event)
        if isinstance(event, Finish):
            self.done.set()

    def tokens(self):
        assert self.done.wait(60) and self[-1].reason == 'length', self
        return [token for event in self if isinstance(event, Piece) for token in event.tokens]


@pytest.fixture(scope='module')
def engine():
    engine = Engine(
        ours().programs,
        token_bytes=lambda token: chr(0x4E00 + token).encode(),
        **dict(rows=2, length=64, source_length=40, prefill_chunk=16, steps=4),
    )
    yield engine
    engine.close()


def ask(engine, i):
    heard = Heard()
    settings = {name: values[i % 4] for name, values in SAMPLED.items()}
    controls = Controls(max_tokens=N, **settings)
    engine.submit(Request(PROMPTS[i % 4], controls, source=SOURCES[i // 4]), heard)
    return heard


@pytest.mark.slow
def test_engine_equals_generator(engine):
    """More requests than rows, every prompt with every source: no row hears that of another, and
    none goes on from a prompt that was read beside another source."""
    heard = [ask(engine, i) for i in range(16)]
    for i, one in enumerate(heard):
        settings = {name: values[i % 4] for name, values in SAMPLED.items()}
        [alone] = ours()([PROMPTS[i % 4]], sources=[SOURCES[i // 4]], max_tokens=N, **settings)
        assert one.tokens() == alone.tokens
        assert one[-1].cached_tokens == 0


@pytest.mark.slow
def test_beams_follow_their_source():
    found = beam_search(ours().programs, PROMPTS, sources=SOURCES, beams=3, max_tokens=N)
    for i, [best] in enumerate(found):
        log_TV = jax.nn.log_softmax(forward('llama')(SOURCES[i], [*PROMPTS[i], *best.tokens]))
        at = np.arange(N) + len(PROMPTS[i]) - 1
        score = np.asarray(log_TV)[at, best.tokens].sum() / N
        np.testing.assert_allclose(best.score, score, rtol=0, atol=1e-4)
    greedy = beam_search(ours().programs, PROMPTS, sources=SOURCES, beams=1, max_tokens=N)
    completions = ours()(PROMPTS, sources=SOURCES, max_tokens=N)
    assert [row[0].tokens for row in greedy] == tokens_of(completions)
    better = [best[0].score - one[0].score for best, one in zip(found, greedy, strict=True)]
    assert max(better) > 1e-3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'sources is missing: an encoder-decoder reads one'),
        ({'sources': [[1], [2]]}, '2 sources for 1 prompts'),
        ({'sources': [[]]}, 'source 0 is empty'),
        ({'sources': [[96]]}, 'source 0 holds token id 96'),
        ({'sources': [[1] * 257]}, 'source 0 .257 tokens. exceeds'),
    ],
)
def test_bad_sources_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ours()([[1]], max_tokens=4, **arguments)
    with pytest.raises(UserError, match=message):
        beam_search(ours().programs, [[1]], beams=2, max_tokens=4, **arguments)


def test_a_decoder_alone_refuses_a_source():
    with pytest.raises(UserError, match='source 0 is given, but this model has no encoder'):
        generator()([[1]], sources=[[1]], max_tokens=4)
    with pytest.raises(UserError, match='source_length is given'):
        Engine(generator().programs, token_bytes=bytes, length=64, source_length=64)


def test_the_engine_names_bad_sources(engine):
    for source, message in (
        (None, 'the source is missing'),
        ([1] * 41, 'the source .41 tokens. exceeds the 40 of a row'),
        ([-1], 'the source holds token id -1'),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(Request([1], source=source), lambda event: None)
