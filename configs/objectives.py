"""Comparisons of objectives: every public function here returns a Grid.

An arm is the base with another objective and, where rates were chosen, its own learning rate. How
to read, run and extend them: docs/objectives.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs import llama
from llama_jax.compare.grid import Arm, Grid, with_rate
from llama_jax.data.config import DataConfig, Source
from llama_jax.evaluate.suite import Suite
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.masked_inputs import MaskedInputs
from llama_jax.objectives.moco import MomentumContrast
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.retromae import RetroMAE
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.token_order import TokenOrder
from llama_jax.objectives.ul2 import UL2
from llama_jax.objectives.weighted import Weighted
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.muon import Muon
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)

_CAUSAL_AND_CONTRASTIVE = Weighted((CausalLM(), InfoNCE(views='shared')), weights=(1.0, 0.1))
"""The contrastive part reads what the causal pass made of two crops of a text."""


def _base() -> Experiment:
    """10 million parameters on the source of Python's standard library, 8 million tokens."""
    return Experiment(
        name='base',
        model=ModelConfig(
            vocab=4096,
            dim=320,
            layers=6,
            heads=5,
            kv_heads=5,
            head_dim=64,
            ffn=1024,
            context=512,
            tied=True,
        ),
        data=DataConfig(
            sources=(Source('python_corpus/stdlib_code'),), tokenizer=TokenizerConfig(vocab=4096)
        ),
        train=TrainConfig(steps=2000, batch=16, seq_len=256),
        optimizer=AdamW(schedule=ScheduleConfig(peak=2e-3, warmup_steps=100)),
        evaluation=EvaluationConfig(every=200, batches=16),
        checkpoint=CheckpointConfig(every=200, keep=1),
    )


def _small() -> Experiment:
    """1 million parameters, 0.8 million tokens: about 100 s of training on two CPU cores. Few
    parameters, so that there is more text in the same time, and Muon are what helps so early: with
    AdamW a causal arm is far below a model of three tokens, and with Muon near it."""
    base = _base()
    schedule = replace(base.optimizer.schedule, peak=1e-2, warmup_steps=16)
    return replace(
        base,
        name='small',
        model=replace(
            base.model, vocab=2048, dim=128, layers=4, heads=4, kv_heads=2, head_dim=32, ffn=320
        ),
        data=replace(base.data, tokenizer=TokenizerConfig(vocab=2048)),
        train=replace(base.train, steps=200, log_every=4),
        optimizer=Muon(schedule=schedule),
        # Of many documents, for rates are chosen by it.
        evaluation=replace(base.evaluation, every=100, batches=16),
        checkpoint=replace(base.checkpoint, every=100),
    )


_LIKELIHOOD = Suite(topics=0, order=0, pairs='', pool=0, windows=128)
"""Likelihoods alone."""
_ONE_FINE_TUNING = Suite(rates=(1e-3,), tuned_seeds=1, steps=240, batch=16, order=1600)
"""Once a run, at one rate: three rates and three seeds would take longer than to train."""


def _arm(name: str, base: Experiment, **changes: Any) -> Arm:
    return Arm(name, replace(base, name=name, **changes))


def _at_rate(rate: float, name: str, base: Experiment, **changes: Any) -> Arm:
    return _arm(name, with_rate(base, rate), **changes)


def _all(base: Experiment) -> tuple[Arm, ...]:
    """Every objective; encoder-decoders have as many layers in each half as the decoder has: twice
    the parameters, and about the same FLOPs, for a position passes through one of them (T5)."""
    both = replace(base.model, encoder_layers=base.model.layers)
    return (
        _arm('causal', base, objective=CausalLM()),
        _arm('fim', base, objective=FillInMiddle()),
        _arm('prefix', base, objective=PrefixLM()),
        _arm('spans', base, objective=SpanCorruption()),
        _arm('ul2', base, objective=UL2()),
        _arm('masked', base, objective=MaskedLM()),
        _arm('mntp', base, objective=MaskedLM(read_previous=True)),
        _arm('replaced', base, objective=ReplacedTokens()),
        _arm('contrastive', base, objective=InfoNCE()),
        _arm('causal_contrastive', base, objective=_CAUSAL_AND_CONTRASTIVE),
        _arm('encdec_spans', base, objective=SpanCorruption(encoder=True), model=both),
        _arm('encdec_bart', base, objective=Bart(), model=both),
    )


_ENCODER = ('name', 'objective', 'model.encoder_layers')


def objectives() -> Grid:
    """Every objective on one backbone of 10 million parameters.

    Launch: python -m experiments.compare objectives --seeds 3 --workdir runs/objectives \\
                --tune-rates
    Expected: causal and FIM lead in likelihood, objectives that see both sides in infilling, the
    contrastive arms in retrieval. About an hour per run on two CPU cores, 36 runs: a machine with
    many cores takes several at once (--jobs), several machines an arm each (--only).
    """
    return Grid(
        name='objectives',
        title='One backbone of 10M parameters under twelve objectives',
        arms=_all(_base()),
        seeds=3,
        suite=Suite(),
        may_differ=_ENCODER,
    )


def objectives_small() -> Grid:
    """Three objectives on a backbone of 1 million parameters, three seeds each.

    Launch: make compare, that is
            python -m experiments.compare objectives_small --workdir runs/compare
            python -m experiments.compare objectives_small --tune-rates --workdir runs/tuned
    Expected: 20 minutes on two idle CPU cores, two runs at a time. The headline table has the
    metrics whose best arm is above TF-IDF, chance and its own backbone before the first step;
    docs/objectives.md has the figures.
    """
    base = _small()
    return Grid(
        name='objectives_small',
        title='One backbone of 1M parameters under three objectives',
        arms=(
            _at_rate(3e-2, 'causal', base, objective=CausalLM()),
            _at_rate(1e-2, 'masked', base, objective=MaskedLM()),
            _at_rate(1e-3, 'contrastive', base, objective=InfoNCE()),
        ),
        seeds=3,
        suite=_ONE_FINE_TUNING,
        may_differ=('name', 'objective', 'optimizer.schedule.peak'),
        tuned='of these times 0.1, 0.3, 1 and 3, by --tune-rates in the same comparison; none is '
        'at the edge of those tried',
    )


def frontier() -> Grid:
    """What else predicts tokens: diffusion, both at once, several tokens, their order, masked
    inputs.

    Launch: python -m experiments.compare frontier --tune-rates --workdir runs/frontier
    Expected: likelihoods of the diffusion arms are bounds and stand beside the exact ones without
    being ranked; latent prediction is the negative control, level with causal. 27 runs and 40
    that choose rates, two or three minutes each on two CPU cores.
    """
    base = _small()
    return Grid(
        name='frontier',
        title='One backbone of 1M parameters under causal prediction, diffusion and auxiliaries',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('diffusion', base, objective=MaskedDiffusion()),
            _arm('block_diffusion', base, objective=BlockDiffusion()),
            _arm('dual', base, objective=Dual()),
            _arm('multi_token', base, objective=MultiToken()),
            _arm('token_order', base, objective=TokenOrder()),
            _arm('masked_inputs', base, objective=MaskedInputs()),
            _arm('latent', base, objective=LatentPrediction()),
        ),
        seeds=3,
        suite=_ONE_FINE_TUNING,
    )


def vectors() -> Grid:
    """Which objective makes vectors of texts that find each other, without labels.

    Launch: python -m experiments.compare vectors --tune-rates --workdir runs/vectors
    Expected: contrastive arms lead in retrieval and alignment, RetroMAE above masked. Not measured
    yet; 15 runs and 20 that choose rates, two or three minutes each on two CPU cores.
    """
    base = _small()
    return Grid(
        name='vectors',
        title='One backbone of 1M parameters under objectives for vectors of texts',
        arms=(
            _arm('masked', base, objective=MaskedLM()),
            _arm('contrastive', base, objective=InfoNCE()),
            _arm('moco', base, objective=MomentumContrast(queue=1024, momentum=0.99)),
            _arm('retromae', base, objective=RetroMAE(pool='mean')),
        ),
        seeds=3,
        suite=_ONE_FINE_TUNING,
    )


def objectives_1b() -> Grid:
    """Every objective on the shape of Llama 3.2 1B, for a TPU pod: 21 billion tokens each.

    Launch, on every host of a slice, an arm per slice and one directory for all of them:
        LLAMA_JAX_COORDINATOR=auto python -m experiments.compare objectives_1b \\
            --only causal --workdir /a/shared/file/system
    What it takes: python -m tpu.plan objectives_1b --topology v5e:4x8; 9.2 of 16 GB a chip at most
    (spans and UL2, whose prefix no fused kernel takes), 5.0 to 5.4 (replaced, causal_contrastive).
    Expected: as `objectives`, with differences that are larger than those of seeds. About 1.4e20
    FLOPs a run: 19 hours on 32 chips of v5e at a third of their peak. It is measured on its own
    held-out text.
    """
    origin = llama.llama3_2_1b()
    base = replace(
        origin,
        name='1b',
        model=replace(origin.model, vocab=32000, context=2048, rope_scaling=None),
        data=replace(origin.data, tokenizer=replace(origin.data.tokenizer, vocab=32000, path=None)),
        # With twice the rows spans do not fit (17.1 of 16 GB), and not every loss is one of
        # microbatches.
        train=replace(origin.train, steps=40_000, batch=256, seq_len=2048),
        evaluation=replace(origin.evaluation, every=2000),
    )
    return Grid(
        name='objectives_1b',
        title='One backbone of 1B parameters under twelve objectives',
        arms=_all(base),
        seeds=3,
        suite=Suite(per_topic=400, pool=1024, windows=512),
        may_differ=_ENCODER,
    )


def dropout_masks() -> Grid:
    """Does it matter that the two views of a text are under different dropout masks (SimCSE)?

    Launch: python -m experiments.compare dropout_masks --tune-rates 0.03 0.1 0.3 1 \\
                --workdir runs/dropout-masks
    Expected: different masks are best, the same mask is visibly worse (published: 82.5 against 43.6
    on STS-B, and 71.1 without dropout).
    """
    small = _small()
    # Short rows and many, for a batch has a pair a row.
    base = replace(
        small,
        model=replace(small.model, dropout=0.1),
        train=replace(small.train, batch=32, seq_len=128),
    )
    none = replace(base.model, dropout=0.0)
    views = InfoNCE(views='dropout')
    same = replace(views, same_dropout=True)
    return Grid(
        name='dropout_masks',
        title='Views by dropout: different masks, the same mask, no dropout',
        arms=(
            _arm('different', base, objective=views),
            _arm('same', base, objective=same),
            _arm('none', base, objective=same, model=none),
        ),
        seeds=3,
        suite=Suite(topics=0, order=0),
        may_differ=('name', 'objective.same_dropout', 'model.dropout'),
    )


def fim() -> Grid:
    """Does filling in the middle cost likelihood from left to right?

    Launch: python -m experiments.compare fim --tune-rates 0.3 1 3 --workdir runs/fim
    Expected: bits per byte of the two arms within their seeds, and infilling won by FIM (Bavarian
    et al. 2022: no loss up to a rate of .9).
    """
    base = _small()
    return Grid(
        name='fim',
        title='Causal language modelling against fill in the middle at rate 0.5',
        arms=(
            _arm('causal', base, objective=CausalLM()),
            _arm('fim', base, objective=FillInMiddle(rate=0.5)),
        ),
        seeds=3,
        suite=_LIKELIHOOD,
    )
