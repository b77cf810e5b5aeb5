"""What each objective is asked for: the form of its training, weight on the tokens asked for."""

import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.evaluate import likelihood
from llama_jax.evaluate.scores import Scores
from llama_jax.objectives.asked import LEFT_TO_RIGHT, NOTHING, Middle, Question
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2, Denoiser
from llama_jax.objectives.weighted import Weighted

TEXT = Middle(*(np.array(part, np.int32) for part in ([1, 2, 3], [4, 5], [6, 7])))


class Ids:
    """Ordinary ids are 0 to 89, one byte each."""

    bos_id, eos_id, pad_id, mask_id = 90, 91, 92, 93
    sentinel_ids = (99, 98, 97)
    control = {  # noqa: RUF012
        **{'<prefix>': 80, '<suffix>': 81, '<middle>': 82, '<eom>': 83},
        **{'[R]': 84, '[S]': 85, '[X]': 86},
    }
    byte_lengths = np.array([1] * 80 + [0] * 20)
    dummy_prefix = False

    def decode(self, ids):
        return bytes(int(i) for i in ids if self.byte_lengths[i]).decode()


IDS = Ids()


def shown(example):
    """Inputs and what is asked for after each, as (input, target or None)."""
    pairs = zip(example['inputs'], example['targets'], example['weights'], strict=True)
    return [(int(i), int(t) if w else None) for i, t, w in pairs]


def asked(objective, name):
    """The example by which a question is asked; of a pseudo-likelihood that of infilling."""
    found = objective.reading
    if getattr(found, name).kind == 'pseudo':
        return found.infill.example(TEXT, IDS)
    (example,) = getattr(found, name).examples(TEXT, IDS, np.random.default_rng(0))
    return example


N = None


@pytest.mark.parametrize(
    ('objective', 'expected'),
    [
        (CausalLM(), [(90, N), (1, N), (2, N), (3, 4), (4, 5)]),
        (PrefixLM(), [(90, N), (1, N), (2, N), (3, 4), (4, 5)]),
        (
            FillInMiddle(),
            [*((i, N) for i in (90, 80, 1, 2, 3, 81, 6, 7)), (82, 4), (4, 5)],
        ),
        (
            FillInMiddle(spm=1.0),
            [*((i, N) for i in (90, 80, 81, 6, 7, 82, 1, 2)), (3, 4), (4, 5)],
        ),
        (
            SpanCorruption(),
            [*((i, N) for i in (1, 2, 3, 99, 6, 7, 90)), (99, 4), (4, 5), (5, N)],
        ),
        (SpanCorruption(encoder=True), [(90, N), (99, 4), (4, 5), (5, N)]),
        (
            UL2(),
            [*((i, N) for i in (84, 1, 2, 3, 99, 6, 7, 90)), (99, 4), (4, 5), (5, N)],
        ),
        (Bart(), [(90, N), (1, N), (2, N), (3, 4), (4, 5)]),
        (
            MaskedLM(),
            [*((i, N) for i in (90, 1, 2, 3)), (93, 4), (93, 5), (6, N), (7, N)],
        ),
        (
            MaskedLM(read_previous=True),
            [*((i, N) for i in (90, 1, 2)), (3, 4), (93, 5), (93, N), (6, N), (7, N)],
        ),
    ],
)
def test_middle_by_hand(objective, expected):
    example = asked(objective, 'middle')
    assert shown(example) == expected
    assert all(len(x) == len(expected) for k, x in example.items() if not k.startswith('encoder'))


def test_encoders_read_the_rest_of_the_text():
    assert asked(SpanCorruption(encoder=True), 'middle')['encoder/inputs'].tolist() == [
        *(1, 2, 3, 99, 6, 7)
    ]
    assert asked(UL2(encoder=True), 'middle')['encoder/inputs'].tolist() == [84, 1, 2, 3, 99, 6, 7]
    assert asked(Bart(), 'middle')['encoder/inputs'].tolist() == [1, 2, 3, 93, 6, 7]
    assert asked(UL2(encoder=True), 'rest')['encoder/inputs'].tolist() == [85, 90, 1, 2, 3]


def test_only_the_input_part_is_in_full_view():
    for objective, name, prefix in (
        (PrefixLM(), 'rest', 4),
        (SpanCorruption(), 'middle', 6),
        (UL2(), 'middle', 7),
        (UL2(), 'rest', 5),
    ):
        seen = asked(objective, name)['prefix']
        assert seen.tolist() == [1] * prefix + [0] * (len(seen) - prefix)
    assert shown(asked(UL2(), 'rest')) == [(85, N), (90, N), (1, N), (2, N), (3, 4), (4, 5)]


def test_a_mixture_without_the_denoiser_is_asked_by_the_other():
    spans_only = UL2(denoisers=(Denoiser('[X]', 0.5, 3.0),))
    assert shown(asked(spans_only, 'rest'))[0] == (86, N)
    sequential = UL2(denoisers=(Denoiser('[S]', 0.25),))
    assert shown(asked(sequential, 'middle'))[0] == (85, N)
    assert sequential.reading.infill is None


def test_of_training_forms():
    """Examples of training by the same objective begin and end their parts with the same marks."""
    tokens = np.arange(1, 8, dtype=np.int32)
    rng = np.random.default_rng(0)
    masked = pieces.examples(MaskedLM(rate=0.3), tokens, tokenizer=IDS, seq_len=32, rng=rng)[0]
    assert masked['inputs'][0] == IDS.bos_id and masked['inputs'].shape == (8,)
    spans = pieces.examples(SpanCorruption(), tokens, tokenizer=IDS, seq_len=32, rng=rng)[0]
    n = int(spans['prefix'].sum())
    assert spans['inputs'][n - 1] == IDS.sentinel_ids[0]
    assert spans['inputs'][n] == IDS.bos_id and spans['targets'][n] == IDS.sentinel_ids[0]


def test_what_applies():
    def row(objective):
        found = objective.reading
        kinds = (q and q.kind for q in (found.whole, found.rest, found.middle))
        return *kinds, found.infill and found.infill.ends

    assert row(CausalLM()) == ('exact', 'exact', 'exact', None)
    assert row(FillInMiddle()) == ('exact', 'exact', 'exact', 'mark')
    assert FillInMiddle(rate=0.0).reading == CausalLM().reading
    assert row(PrefixLM()) == (None, 'exact', 'exact', None)
    assert row(SpanCorruption()) == row(UL2()) == (None, 'exact', 'exact', 'mark')
    assert row(Bart()) == (None, 'exact', 'exact', 'suffix')
    assert row(MaskedLM()) == (None, None, 'pseudo', 'length')
    assert ReplacedTokens().reading == NOTHING._replace(text=False)
    for objective in (InfoNCE(), Weighted((InfoNCE(),), (1.0,), (1.0,))):
        assert objective.reading == NOTHING._replace(text=False, begins=False)
    both = Weighted((InfoNCE(), CausalLM()), (1.0, 1.0), (0.5, 0.5))
    assert both.reading == LEFT_TO_RIGHT
    # Each question by the first part that can be asked it.
    both = Weighted((MaskedLM(), CausalLM()), (1.0, 1.0), (0.5, 0.5))
    assert row(both) == ('exact', 'exact', 'pseudo', 'length') and both.reading.text


def scripted(rule):
    """A scorer whose most likely token and its probability follow from `rule(inputs, place)`."""

    def score(examples):
        P = max(int((e['weights'] > 0).sum()) for e in examples)
        out = Scores(*(np.zeros((len(examples), P)) for _ in range(4)))
        for i, example in enumerate(examples):
            for j, place in enumerate(np.flatnonzero(example['weights'] > 0)):
                token, p = rule(example['inputs'], int(place))
                out.chosen[i, j], out.confidence[i, j] = token, np.log(p)
        return out._replace(chosen=out.chosen.astype(np.int32))

    return score


def infilled(objective, rule):
    (right,) = likelihood.infill(scripted(rule), objective.reading.infill, [TEXT], IDS, longest=2)
    return right


@pytest.mark.parametrize('objective', [FillInMiddle(), SpanCorruption(), UL2(), Bart()])
def test_infill_is_exact_where_it_ends_where_the_middle_does(objective):
    after = {82: 4, 99: 4, 3: 4, 4: 5, 5: 83}
    if isinstance(objective, Bart):
        after[5] = 6  # where the suffix begins
    assert infilled(objective, lambda x, at: (after.get(int(x[at]), 0), 1)) == 1
    assert infilled(objective, lambda x, at: ((after | {5: 7}).get(int(x[at]), 0), 1)) == 0
    assert infilled(objective, lambda x, at: ((after | {4: 83}).get(int(x[at]), 0), 1)) == 0
    assert infilled(objective, lambda x, at: ((after | {4: 8}).get(int(x[at]), 0), 1)) == 0


def test_an_infill_that_does_not_end_is_not_exact():
    found = FillInMiddle().reading.infill
    for tokens, expected in (([4, 5, 83], True), ([4, 5], False), ([4, 83, 5], False)):
        assert likelihood.exact(np.array(tokens), TEXT, found, IDS) is expected


@pytest.mark.parametrize('previous', [False, True])
def test_masked_infill_fills_the_most_certain_first(previous):
    def rule(inputs, at):
        place = at + previous  # of the token that is read at `at`
        if place == 5:
            return 5, 0.9
        return (4, 0.5) if inputs[5] == 5 else (8, 0.5)  # right once the other stands

    assert infilled(MaskedLM(read_previous=previous), rule) == 1
    assert infilled(MaskedLM(read_previous=previous), lambda x, at: (4, 0.5)) == 0


def test_pseudo_likelihood_masks_one_token_at_a_time():
    question = MaskedLM().reading.middle
    assert question.sees_all
    examples = question.examples(TEXT, IDS, np.random.default_rng(0))
    whole = [90, 1, 2, 3, 4, 5, 6, 7]
    for example, place in zip(examples, (4, 5), strict=True):
        assert example['inputs'].tolist() == [*whole[:place], 93, *whole[place + 1 :]]
        assert np.flatnonzero(example['weights']).tolist() == [place]
        assert example['targets'][place] == whole[place]


def by_halves(examples):
    """A score that gives every target the probability 1/2."""
    n = [int((e['weights'] > 0).sum()) for e in examples]
    log_p = np.array([[-np.log(2) * (j < k) for j in range(max(n))] for k in n])
    return Scores(log_p, log_p, log_p, log_p / 2)


class Sized(Ids):
    byte_lengths = np.arange(100)


def asked_about(score, question, texts):
    """Bits of each text, those among ordinary tokens, and bytes."""
    return likelihood.bits(likelihood.ask(score, question, texts, IDS, seed=0), texts, Sized())


def test_bits_per_byte_by_hand():
    texts = likelihood.wholes([np.array([9, 4, 1]), np.array([9, 7])])
    (example,) = LEFT_TO_RIGHT.whole.examples(texts[0], IDS, np.random.default_rng(0))
    assert shown(example) == [(9, 4), (4, 1)]
    found = asked_about(by_halves, LEFT_TO_RIGHT.whole, texts)
    assert [x.tolist() for x in found] == [[2, 1], [1, 0.5], [4 + 1, 7]]
    (half,) = likelihood.halves([np.arange(7)])
    assert [part.tolist() for part in half] == [[0, 1, 2], [3, 4, 5, 6], []]


def test_a_bound_is_the_weighted_sum_over_what_it_draws():
    drawn = []

    def draws(text, tokenizer, rng):
        """Each token of the middle with the weight 3 in one example, 0.5 in another."""
        drawn.append(rng.random())
        example = CausalLM().reading.rest.examples(text, tokenizer, rng)[0]
        return [{**example, 'weights': example['weights'] * w} for w in (3, 0.5)]

    texts = likelihood.halves([np.array([9, 4]), np.array([9, 9, 4, 1])])
    question = Question('bound', draws)
    found = asked_about(by_halves, question, texts)
    assert [x.tolist() for x in found] == [[3.5, 2 * 3.5], [1.75, 3.5], [4, 4 + 1]]
    asked_about(by_halves, question, texts[::-1])
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]
    # What is compared is hidden alike.
    likelihood.ask(by_halves, question, texts * 2, IDS, seed=0, groups=[0, 0, 1, 0])
    assert drawn[4] == drawn[5] == drawn[7] == drawn[0] and drawn[6] == drawn[1]


def test_calibration_error_is_the_gap_between_probability_and_accuracy():
    texts = likelihood.halves([np.arange(2 * n) + 1 for n in (30, 30, 60)])

    def score(examples):
        """Right in half of the places, sure of 0.9 in the first quarter of them and of 0.5 else."""
        n = [int(e['weights'].sum()) for e in examples]
        out = Scores(*(np.zeros((len(n), max(n))) for _ in range(4)))
        for i, (k, e) in enumerate(zip(n, examples, strict=True)):
            right = np.arange(k) % 2 == 0
            out.chosen[i, :k] = np.where(right, e['targets'][e['weights'] > 0], 0)
            out.confidence[i, :k] = np.log(np.where(np.arange(k) < k / 4, 0.9, 0.5))
        return out

    answer = likelihood.ask(score, LEFT_TO_RIGHT.rest, texts, IDS, seed=0)
    found = likelihood.calibration_error(answer, ['a', 'b', 'b'])
    assert found['value'] == pytest.approx(0.4 / 4, abs=0.02)
    assert found['low'] <= found['value'] <= found['high'] and found['n'] == 3


def test_the_space_before_a_text_is_no_byte_of_it():
    """Of what begins a text, and of that alone."""

    class Spaced(Sized):
        dummy_prefix = True

    nothing = np.zeros(0, np.int32)
    begins, empty = TEXT._replace(prefix=nothing), Middle(nothing, nothing, nothing)
    behind_bos = TEXT._replace(prefix=np.array([IDS.bos_id]))  # of a window at a document's begin
    every = [TEXT, begins, behind_bos, empty]
    assert likelihood.text_bytes(every, Spaced()).tolist() == [9, 8, 8, 0]
    assert likelihood.text_bytes(every, Sized()).tolist() == [9, 9, 9, 0]
