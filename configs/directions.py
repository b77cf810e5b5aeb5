"""Published findings about objectives, as comparisons that two cores make: every public function
here returns a Grid.

One million parameters, three seeds, rates that are tuned, the A/A arm beside. What came out, and in
how many minutes: docs/directions.md.
"""

from __future__ import annotations

from dataclasses import replace

from configs.objectives import _LIKELIHOOD, _ONE_FINE_TUNING, _arm, _at_rate, _small
from llama_jax.compare.grid import Grid
from llama_jax.data.config import DataConfig, Source
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked_inputs import MaskedInputs
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.token_order import TokenOrder
from llama_jax.objectives.weighted import Weighted
from llama_jax.optim.adafactor import Adafactor
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.lion import Lion
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import Experiment

_CODE = 'python_corpus/stdlib_code'


def _base(*, steps: int) -> Experiment:
    """1 million parameters on the source of Python's standard library, 4096 tokens a step."""
    base = _small()
    return replace(
        base,
        name='base',
        train=replace(base.train, steps=steps),
        evaluation=replace(base.evaluation, every=steps // 2),
        checkpoint=replace(base.checkpoint, every=steps // 2),
    )


def _on(base: Experiment, *sources: str, tokenizer: TokenizerConfig) -> Experiment:
    """On a mixture of other data sets, in equal shares."""
    data = DataConfig(sources=tuple(map(Source, sources)), tokenizer=tokenizer)
    # The tokenizer says how many ids there are: a text of few words has fewer.
    return replace(base, data=data, model=replace(base.model, vocab=0))


# --- causal and diffusion on repeated data --------------------------------------------------------


def _mix(name: str, split: str, often: str) -> Grid:
    base = _base(steps=104)
    base = replace(base, data=replace(base.data, train_split=split))
    return Grid(
        name=name,
        title=f'Causal, masked diffusion, and both in one model: text that is read {often}',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('dual', base, objective=Dual()),
            _arm('diffusion', base, objective=MaskedDiffusion()),
        ),
        seeds=3,
        suite=_LIKELIHOOD,
    )


def mix_1() -> Grid:
    """A mix of causal and diffusion against both alone, on text that is read once.

    Launch: python -m experiments.compare mix_1 --tune-rates 0.1 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/mix_1
    Expected: the dual model has fewer bits per byte than the causal one, and in the middle span
    fewer than diffusion (2512.14549: the mix is best at every number of repetitions; its gain at
    one is small, and its best share of causal texts up to 16 is 63/64, where ours is a half); the
    bound of diffusion is above causal (2507.15857: causal is ahead in few epochs).
    """
    return _mix('mix_1', 'train[:81]', 'once')


def mix_4() -> Grid:
    """The same with a fourth of the text, which is read 4 times.

    Launch: python -m experiments.compare mix_4 --tune-rates 0.1 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/mix_4
    Expected: as `mix_1`, with causal less ahead of diffusion.
    """
    return _mix('mix_4', 'train[:12]', 'about 4 times')


def mix_16() -> Grid:
    """The same with a sixteenth of the text, which is read 16 times.

    Launch: python -m experiments.compare mix_16 --tune-rates 0.03 0.1 0.3 1 --jobs 2 \\
                --workdir runs/directions/mix_16
    Expected: causal has lost its lead. The papers see it overfit beyond 16 readings (2512.14549)
    and diffusion pass it later still (2507.15857, 2511.03276), with more parameters and text: a
    crossing at 16 is our guess.
    """
    return _mix('mix_16', 'train[:10]', 'about 16 times')


def repeated() -> Grid:
    """Do masked inputs, dropout or weight decay help a causal model on text that is read 15 times?

    Launch: python -m experiments.compare repeated --tune-rates 0.03 0.1 0.3 --jobs 2 \\
                --workdir runs/directions/repeated
    Expected: all three have fewer bits per byte than plain causal (2510.04071: by as much as
    diffusion or more; 2511.03276: by less).
    """
    base = _base(steps=96)
    base = replace(base, data=replace(base.data, train_split='train[:10]'))
    decay = replace(base.optimizer, weight_decay=1.0)
    return Grid(
        name='repeated',
        title='Causal on repeated data: masked inputs, dropout, weight decay',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('masked_inputs', base, objective=MaskedInputs()),
            _arm('dropout', base, objective=CausalLM(), model=replace(base.model, dropout=0.1)),
            _arm('decay', base, objective=CausalLM(), optimizer=decay),
        ),
        seeds=3,
        suite=_LIKELIHOOD,
        may_differ=('name', 'objective', 'model.dropout', 'optimizer.weight_decay'),
    )


def block_size() -> Grid:
    """Likelihood of block diffusion with blocks of 1, 4, 16 tokens and of the whole text.

    Launch: python -m experiments.compare block_size --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/block_size
    Expected: bits per byte rise with the block (BD3-LM, 2503.09573: perplexity 22.83 of a
    causal model, 28.23 of blocks of 4, 31.78 of whole texts). Blocks of 1 have a likelihood, the
    others a bound of it; whole texts are the base, so that bounds are compared with a bound.
    """
    base = _base(steps=96)
    half = base.train.seq_len // 2  # a text stands in a row twice
    return Grid(
        name='block_size',
        title='Block diffusion: blocks of 1, 4, 16 tokens and whole texts',
        arms=(
            _arm('whole', base, objective=BlockDiffusion(block=half)),
            _arm('block_16', base, objective=BlockDiffusion(block=16)),
            _arm('block_4', base, objective=BlockDiffusion(block=4)),
            _arm('block_1', base, objective=BlockDiffusion(block=1)),
        ),
        seeds=3,
        suite=_LIKELIHOOD,
    )


# --- tasks ----------------------------------------------------------------------------------------


def multi_token() -> Grid:
    """Prediction of 2 and 4 tokens: text, induction, arithmetic of polynomials.

    Launch: python -m experiments.compare multi_token --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/multi_token
    Expected: bits per byte of code as of causal or more, the second token of a repeated name and
    polynomials better (Gloeckle et al. 2024, 2404.19737, sections 3.1, 4.1 and 4.2; programs there,
    and no bits per byte). The heads are one and three layers more.
    """
    base = _on(
        _base(steps=96),
        *(_CODE, 'synthetic/induction', 'synthetic/polynomial'),
        tokenizer=TokenizerConfig(vocab=2048),
    )
    return Grid(
        name='multi_token',
        title='Causal against the prediction of 2 and of 4 tokens',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('two', base, objective=MultiToken(heads=2)),
            _arm('four', base, objective=MultiToken(heads=4)),
        ),
        seeds=3,
        suite=replace(_LIKELIHOOD, text=_CODE, tasks=('induction', 'polynomial')),
    )


def star_graph() -> Grid:
    """The first step of the only path to a goal, which the next steps give away.

    Launch: python -m experiments.compare star_graph --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/star_graph
    Expected: next-token prediction guesses among the 3 paths (Bachmann & Nagarajan 2024,
    2403.06963), token-order prediction finds the path (2508.19228), and so does
    masked diffusion, which does not learn it from the steps before.
    """
    # A byte is a token, so that every node is spelled alike: 9,000 of the graphs in 176 steps.
    base = _on(
        _base(steps=176), 'synthetic/star_graph', tokenizer=TokenizerConfig(kind='bytes', vocab=384)
    )
    return Grid(
        name='star_graph',
        title='Star graphs: next-token prediction, token-order prediction, masked diffusion',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('token_order', base, objective=TokenOrder()),
            _arm('diffusion', base, objective=MaskedDiffusion()),
        ),
        seeds=3,
        suite=replace(_LIKELIHOOD, window=48, tasks=('star_graph',)),
    )


def reversal() -> Grid:
    """Who B is, of whom it was only told that A is B.

    Launch: python -m experiments.compare reversal --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/reversal
    Expected: all know what they were told (`reversal_told`), and causal who B is no better than
    chance, 1 in 4 (Berglund et al. 2023). That models which fill masks in are above it is our
    guess: LLaDA (2502.09992) is so with lines of poems, and 2601.07347 finds that such models fail
    at facts.
    """
    base = _on(_base(steps=160), 'synthetic/reversal', tokenizer=TokenizerConfig(vocab=512))
    return Grid(
        name='reversal',
        title='"A is B" in training, "B is" asked: causal, dual, masked diffusion',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('dual', base, objective=Dual()),
            _arm('diffusion', base, objective=MaskedDiffusion()),
        ),
        seeds=3,
        suite=replace(_LIKELIHOOD, window=16, middle=4, tasks=('reversal', 'reversal_told')),
    )


def causal_share() -> Grid:
    """The share of causal texts beside masked ones that are read off the position before.

    Launch: python -m experiments.compare causal_share --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/causal_share
    Expected: on minimal pairs an optimum between the pure models (GPT-BERT, 2410.24159).
    """
    base = _on(
        _base(steps=64),
        *(_CODE, 'synthetic/minimal_pairs_en', 'synthetic/minimal_pairs_zh'),
        tokenizer=TokenizerConfig(vocab=2048),
    )
    return Grid(
        name='causal_share',
        title='Causal texts beside masked ones: none, 1/8, half, 7/8, all',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('most', base, objective=Dual(causal_share=7 / 8)),
            _arm('half', base, objective=Dual(causal_share=1 / 2)),
            _arm('few', base, objective=Dual(causal_share=1 / 8)),
            _arm('none', base, objective=MaskedDiffusion(read_previous=True)),
        ),
        seeds=3,
        suite=replace(
            _LIKELIHOOD,
            text=_CODE,
            tasks=('minimal_pairs_python', 'minimal_pairs_en', 'minimal_pairs_zh'),
        ),
    )


# --- representations, auxiliaries, noise ----------------------------------------------------------


def biphasic() -> Grid:
    """Causal, masked, and first causal and then masked, on probes.

    Launch: python -m experiments.compare biphasic --tune-rates 0.3 1 3 --match flops --jobs 2 \\
                --workdir runs/directions/biphasic
    Expected: the last is best (2507.00994: a causal phase first makes the better encoder at the
    same budget). Masks are those of masked diffusion, read off the position before, so that both
    phases share a head.
    """
    base = _base(steps=112)
    first = Dual(causal_share=1 / 2, curriculum_steps=base.train.steps)
    return Grid(
        name='biphasic',
        title='Probes of a causal model, of a masked one, and of one that was causal first',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('masked', base, objective=MaskedDiffusion(read_previous=True)),
            _arm('causal_first', base, objective=first),
        ),
        seeds=3,
        suite=replace(_ONE_FINE_TUNING, windows=32),
    )


def auxiliary() -> Grid:
    """A contrastive and a latent auxiliary beside causal prediction: the negative control.

    Launch: python -m experiments.compare auxiliary --tune-rates 0.3 1 3 --jobs 2 \\
                --workdir runs/directions/auxiliary
    Expected: no fewer bits per byte than causal beyond the noise floor (published of a latent one:
    0.0007 to 0.0009 more, against 0.0022 between seeds).
    """
    base = _base(steps=112)
    contrastive = Weighted(
        parts=(CausalLM(), InfoNCE(views='shared')),
        weights=(1.0, 0.1),
        shares=(1.0, 0.0),
    )
    return Grid(
        name='auxiliary',
        title='Causal alone, and with a latent or a contrastive auxiliary',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('latent', base, objective=LatentPrediction()),
            _arm('contrastive', base, objective=contrastive),
        ),
        seeds=3,
        suite=replace(_LIKELIHOOD, pool=256),
    )


def muon() -> Grid:
    """Muon, Lion and Adafactor against AdamW, each at its own rate.

    Launch: python -m experiments.compare muon --tune-rates 0.3 1 3 10 --jobs 2 \\
                --workdir runs/directions/muon
            python -m experiments.compare muon --tune-rates 0.3 1 3 10 --train.steps 84 --jobs 2 \\
                --workdir runs/directions/muon_84
    Expected: Muon has fewer bits per byte, and in 84 steps about as many as AdamW in 112
    (2509.02046: 1.4 times fewer steps at 0.1B parameters, 1.1 at 1.2B, all tuned); Lion and
    Adafactor cannot be told from AdamW (2407.07972). Lion moves every entry by the whole rate: a
    fifth of AdamW's, and five times its decay.
    """
    base = _base(steps=112)
    schedule = replace(base.optimizer.schedule, peak=5e-3)
    lion = Lion(schedule=replace(schedule, peak=1e-3), weight_decay=0.5)
    return Grid(
        name='muon',
        title='Muon, Lion and Adafactor against AdamW',
        arms=(
            _arm('adamw', base, optimizer=AdamW(schedule=schedule)),
            _arm('muon', base),
            _arm('lion', base, optimizer=lion),
            _arm('adafactor', base, optimizer=Adafactor(schedule=schedule)),
        ),
        seeds=3,
        suite=_LIKELIHOOD,
        may_differ=('name', 'optimizer'),
    )


def noise() -> Grid:
    """One arm under two sets of seeds: what seeds alone do to every metric.

    Launch: python -m experiments.compare noise --jobs 2 \\
                --workdir runs/directions/noise
    Expected: no difference is shown; the half-widths are what a comparison of this size can tell.
    """
    base = _base(steps=112)
    return Grid(
        name='noise',
        title='Causal against itself under other seeds',
        arms=(_at_rate(3e-2, 'causal', base, objective=CausalLM()),),
        seeds=5,
        suite=_ONE_FINE_TUNING,
        may_differ=(),
        tuned='as in objectives_small',
    )
