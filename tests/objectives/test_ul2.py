"""UL2: seven denoisers, each with its mode token, over every piece of a document."""

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.objectives.flops import encoder_decoder_flops
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.spans import SpanCorruption, reconstruct
from llama_jax.objectives.ul2 import MIXTURE, UL2, Denoiser
from tests.objectives import reading, texts
from tests.objectives.reading import BOTH, DECODER

TOKENIZER = texts.tokenizer()
TOKENS = TOKENIZER.encode(texts.CODE[1])
SEQUENTIAL = (Denoiser('[S]', 0.25),)


def examples(objective, tokens, *, seq_len=256, seed=0, tokenizer=TOKENIZER):
    return pieces.examples(
        objective, tokens, tokenizer=tokenizer, seq_len=seq_len, rng=np.random.default_rng(seed)
    )


def mode_of(example):
    """Name of the mode token, which stands first."""
    first = example.get('encoder/inputs', example['inputs'])[0]
    return next(name for name in ('[R]', '[S]', '[X]') if TOKENIZER.control[name] == first)


def text_of(example, tokenizer=TOKENIZER):
    """The tokens of the document that an example was made of, the end token included."""
    if 'encoder/inputs' in example:
        inputs, targets = example['encoder/inputs'][1:], example['targets']
        sequential = mode_of(example) == '[S]'
    else:
        sequential = mode_of(example) == '[S]'
        inputs = example['inputs'][example['prefix'] > 0][1:]
        targets = example['targets'][example['weights'] > 0]
    if sequential:
        return np.concatenate([inputs, targets])
    return reconstruct(inputs, targets, tokenizer=tokenizer)


@pytest.mark.parametrize('encoder', [False, True])
@pytest.mark.parametrize('seq_len', [24, 100, 512, 4096])
def test_the_examples_of_a_document_give_it_back_and_fit(encoder, seq_len):
    objective = UL2(encoder=encoder)
    lengths = objective.lengths(seq_len)
    assert sum(lengths.values()) == seq_len
    for seed in range(5):
        found = examples(objective, TOKENS, seq_len=seq_len, seed=seed)
        text = []
        for example in found:
            for key, values in example.items():
                assert len(values) <= lengths[key.rpartition('/')[0]]
                assert values.dtype == (np.float32 if key == 'weights' else np.int32)
            part = text_of(example)
            if mode_of(example) == '[S]' and text:
                part = part[1:]  # begins with the last token of the piece before
            elif mode_of(example) == '[S]':
                assert part[0] == TOKENIZER.bos_id
                part = part[1:]
            text.append(part)
        whole = np.concatenate(text)
        np.testing.assert_array_equal(whole[: len(TOKENS)], TOKENS)
        # The end of the document, where the last piece is a prefix language model's.
        assert len(whole) - len(TOKENS) == (mode_of(found[-1]) == '[S]')


def test_the_seven_of_the_paper_uniformly():
    assert [(d.mode, d.density, d.mean_span) for d in MIXTURE] == [
        ('[R]', 0.15, 3.0),
        ('[R]', 0.15, 8.0),
        ('[X]', 0.5, 3.0),
        ('[X]', 0.5, 8.0),
        ('[X]', 0.15, 64.0),
        ('[X]', 0.5, 64.0),
        ('[S]', 0.25, None),
    ]
    counts = {'[R]': 0, '[S]': 0, '[X]': 0}
    for seed in range(2100):
        (example,) = examples(UL2(), TOKENS[:20], seed=seed)
        counts[mode_of(example)] += 1
    expected = {'[R]': 600, '[S]': 300, '[X]': 1200}
    chi_square = sum((counts[mode] - n) ** 2 / n for mode, n in expected.items())
    assert chi_square < 13.8  # 99.9%, 2 degrees of freedom


@pytest.mark.parametrize('denoiser', [d for d in MIXTURE if d.mean_span is not None])
def test_the_density_of_each(denoiser):
    """Spans as long as the noise of a text are one span of it."""
    objective = UL2(denoisers=(denoiser,))
    for n in (50, 100, 150):
        (example,) = examples(objective, TOKENS[:n])
        targets = example['targets'][example['weights'] > 0]
        sentinels = np.isin(targets, TOKENIZER.sentinel_ids).sum()
        noise = round(denoiser.density * n)
        assert len(targets) - sentinels - 1 == noise
        assert sentinels == max(round(noise / denoiser.mean_span), 1)
        assert mode_of(example) == denoiser.mode


def test_sequential_alone_is_prefix_language_modelling():
    seq_len = 64
    mixture = examples(UL2(denoisers=SEQUENTIAL), TOKENS, seq_len=seq_len)
    plain = examples(PrefixLM(ratio=0.75), TOKENS, seq_len=seq_len - 1)
    assert len(mixture) == len(plain) > 10
    for one, two in zip(mixture, plain, strict=True):
        assert mode_of(one) == '[S]'
        assert (one['weights'][0], one['prefix'][0]) == (0, 1)
        assert one.keys() == two.keys()
        for key in two:
            np.testing.assert_array_equal(one[key][1:], two[key])
            assert one[key].dtype == two[key].dtype


@pytest.mark.parametrize('encoder', [False, True])
def test_one_denoiser_alone_is_span_corruption_after_a_mode_token(encoder):
    mixture = UL2(denoisers=(Denoiser('[R]', 0.15, 3.0),), encoder=encoder)
    plain = SpanCorruption(encoder=encoder)
    (one,) = examples(mixture, TOKENS[:100])
    rng = np.random.default_rng(0)
    (two,) = pieces.examples(plain, TOKENS[:100], tokenizer=TOKENIZER, seq_len=256, rng=rng)
    key = 'encoder/inputs' if encoder else 'inputs'
    assert one[key][0] == TOKENIZER.control['[R]']
    np.testing.assert_array_equal(one[key][1:], two[key])
    if encoder:
        np.testing.assert_array_equal(one['targets'], two['targets'])


def test_the_decoder_predicts_the_suffix_of_what_the_encoder_reads():
    objective = UL2(denoisers=SEQUENTIAL, encoder=True)
    (example,) = examples(objective, TOKENS[:39])
    ids = [TOKENIZER.bos_id, *TOKENS[:39], TOKENIZER.eos_id]
    assert example['encoder/inputs'].tolist() == [TOKENIZER.control['[S]'], *ids[:30]]
    assert example['targets'].tolist() == ids[30:]
    assert example['inputs'].tolist() == [TOKENIZER.bos_id, *ids[30:-1]]
    assert example['weights'].all()


@pytest.mark.parametrize('encoder', [False, True])
@pytest.mark.parametrize('n', [0, 1, 2, 3])
def test_short_documents(encoder, n):
    for seed in range(20):
        for example in examples(UL2(encoder=encoder), TOKENS[:n], seq_len=24, seed=seed):
            text = text_of(example)
            if mode_of(example) == '[S]':
                whole = [TOKENIZER.bos_id, *TOKENS[:n], TOKENIZER.eos_id]
                assert text.tolist() == (whole if n else whole[1:])  # a prefix, or none
            else:
                assert n > 1 and text.tolist() == TOKENS[:n].tolist()


@pytest.mark.parametrize('encoder', [False, True])
def test_a_piece_of_one_token_is_under_the_sequential_denoiser(encoder):
    objective = UL2(encoder=encoder)
    rng = np.random.default_rng(0)
    for start, n in ((3, 1), (len(TOKENS) - 1, 2), (len(TOKENS), 1)):
        sizes = objective.sizes(n, seq_len=64, draw=0.0)  # of spans, if there were a place for one
        piece = pieces.Piece(TOKENS, start, start + n, 0.0, sizes, identity=0)
        example = objective.example(piece, tokenizer=TOKENIZER, seq_len=64, rng=rng)
        units = [TOKENS[start - 1], *TOKENS[start : start + n]]
        if start + n > len(TOKENS):
            units.append(TOKENIZER.eos_id)
        assert mode_of(example) == '[S]' and text_of(example).tolist() in (units, units[1:])
        found = [len(x) for key, x in example.items() if key.endswith('inputs')]
        assert all(n <= size for n, size in zip(found, sizes, strict=True))
    spans_alone = UL2(encoder=encoder, denoisers=MIXTURE[:2])
    assert UL2().ends and not spans_alone.ends
    assert spans_alone.sizes(1, seq_len=64, draw=0.0) is None
    piece = pieces.Piece(TOKENS, 3, 4, 0.0, (9, 9), identity=0)
    assert spans_alone.example(piece, tokenizer=TOKENIZER, seq_len=64, rng=rng) is None


def test_the_draw_of_a_piece_gives_its_denoiser():
    for k, denoiser in enumerate(MIXTURE):
        for draw in ((k + 0.01) / 7, (k + 0.99) / 7):
            sizes = UL2().sizes(150, seq_len=1024, draw=draw)
            assert sizes == UL2(denoisers=(denoiser,)).sizes(150, seq_len=1024, draw=0.5)
            piece = pieces.Piece(TOKENS, 0, 150, draw, sizes, identity=0)
            example = UL2().example(
                piece, tokenizer=TOKENIZER, seq_len=1024, rng=np.random.default_rng(0)
            )
            assert mode_of(example) == denoiser.mode and len(example['inputs']) == sizes[0]


@pytest.mark.parametrize('encoder', [False, True])
def test_chance_is_that_of_rng_alone(encoder):
    one, two, three = (
        [e['inputs'].tolist() for e in examples(UL2(encoder=encoder), TOKENS, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert one == two != three


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match='no denoisers'):
        UL2(denoisers=())
    with pytest.raises(UserError, match='a row of 4 positions has no room'):
        examples(UL2(), TOKENS, seq_len=4)


@pytest.mark.parametrize('denoiser', [MIXTURE[2], SEQUENTIAL[0]])
def test_who_sees_whom_on_a_decoder(denoiser):
    objective = UL2(denoisers=(denoiser,))
    batch = reading.make_batch(objective, seq_len=56, sizes=[12, 17])
    segment, prefix = batch['segments'][0], batch['prefix'][0] > 0
    place = np.arange(56)
    seen = reading.same(segment, segment) & ((place[:, None] >= place) | prefix)
    found = reading.reach(objective, DECODER, batch)
    np.testing.assert_array_equal(found[segment > 0], seen[segment > 0])


@pytest.mark.slow
def test_who_sees_whom_with_an_encoder():
    objective = UL2(encoder=True)
    batch = reading.make_batch(objective, seq_len=64, sizes=[10, 15])
    segment, read = batch['segments'][0], batch['encoder/segments'][0]
    found = reading.reach(objective, BOTH, batch, stream='encoder')
    np.testing.assert_array_equal(found[segment > 0], reading.same(segment, read)[segment > 0])
    assert reading.loss(objective, BOTH, batch).weight == objective.loss_tokens(batch)


def test_architectures():
    UL2().check(DECODER)
    UL2(encoder=True).check(BOTH)
    with pytest.raises(UserError, match='set --model.encoder-layers 0'):
        UL2().check(BOTH)
    with pytest.raises(UserError, match='set --model.encoder-layers above 0'):
        UL2(encoder=True).check(DECODER)


def test_flops_are_the_mean_over_the_mixture():
    alone = [UL2(denoisers=(d,)).flops(DECODER, 256) for d in MIXTURE]
    assert UL2().flops(DECODER, 256) == pytest.approx(np.mean(alone))
    assert len(set(alone)) > 3
    lengths = UL2(encoder=True).lengths(256)
    wanted = encoder_decoder_flops(BOTH, lengths['encoder'], lengths[''])
    assert UL2(encoder=True).flops(BOTH, 256) == wanted
