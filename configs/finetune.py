"""Recipes of fine-tuning: every public function here returns an Experiment without data, whose
model is what --from names.

    python -m experiments.finetune instruct_lora --from smollm2 --data.files my.jsonl

A recipe differs from another by what its function says, and by nothing else. Rates are those of the
papers named, where models have billions of parameters; smaller models take larger ones. Batches are
ours: 8 rows of 1,024 tokens, into which records are packed. docs/finetuning.md tells which to take.
"""

from __future__ import annotations

from dataclasses import replace

from llama_jax.data.config import DataConfig
from llama_jax.model.config import ModelConfig
from llama_jax.model.tune import Frozen, LoRA
from llama_jax.objectives.base import Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.dense_retrieval import DenseRetrieval
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.grpo import GRPO
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.preference import DPO
from llama_jax.objectives.reward import RewardModel
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    TrainConfig,
)

ANY = ModelConfig(
    vocab=0, dim=64, layers=2, heads=1, kv_heads=1, head_dim=64, ffn=192, context=1024, tied=True
)
"""Stands where the model of --from will be."""


def _full(
    name: str,
    objective: Objective,
    *,
    peak: float,
    epochs: float,
    weight_decay: float = AdamW().weight_decay,
    examples: int = 6,
) -> Experiment:
    """Every parameter is trained."""
    return Experiment(
        name=name,
        model=ANY,
        data=DataConfig(sources=()),
        train=TrainConfig(steps=0, epochs=epochs, batch=8, seq_len=1024, log_every=1),
        objective=objective,
        optimizer=AdamW(
            schedule=ScheduleConfig(peak=peak, warmup_steps=0, warmup_share=0.03),
            weight_decay=weight_decay,
        ),
        evaluation=EvaluationConfig(every=100, examples=examples, sample_tokens=64),
        checkpoint=CheckpointConfig(every=100, keep=1),
    )


def text() -> Experiment:
    """Pre-training goes on, on documents of one's own.

    Rate: ours, a third of the peak of Llama 2 7B, for re-warming (Ibrahim et al. 2024).
    """
    return _full('text', CausalLM(), peak=1e-4, epochs=1, examples=0)


def instruct() -> Experiment:
    """Chats: the assistant's turns are learnt, in the model's own template.

    Rate, epochs, decay: Llama 2 (Touvron et al. 2023b, section 3.1), which takes 64 rows of 4,096.
    """
    return _full('instruct', InstructionTuning(), peak=2e-5, epochs=2)


def instruct_lora() -> Experiment:
    """`instruct` with adapters beside the weights of every layer.

    Rate: QLoRA's (Dettmers et al. 2023, table 9: 2e-4 up to 13B), as for all adapters here.
    """
    return _lora(instruct(), 'instruct_lora')


def topics() -> Experiment:
    """The topic of a headline as an answer of SmolLM2, in minutes on two CPU cores.

    Launch: make finetune. Rate: ours, for a model of 135 million parameters and 24 steps.
    """
    recipe = _lora(instruct(), 'topics', peak=1e-3)
    return replace(
        recipe,
        train=TrainConfig(steps=24, batch=4, seq_len=256, log_every=1),
        evaluation=EvaluationConfig(every=24, batches=2, examples=6, sample_tokens=8),
        checkpoint=CheckpointConfig(every=8, keep=1),
    )


def instruct_qlora() -> Experiment:
    """`instruct_lora` with the weights below the adapters in 4 bits.

    Rate, dropout: QLoRA's, same table.
    """
    return _lora(instruct(), 'instruct_qlora', LoRA(dropout=0.1, base='int4'))


def seq2seq() -> Experiment:
    """Pairs of texts (`prompt` and `completion`, `source` and `target`) by a decoder, in plain
    text; `--objective.chat True` puts them into the model's chat format.

    Rate: that of instruction tuning.
    """
    return _full('seq2seq', SequenceToSequence(between='\n'), peak=2e-5, epochs=3)


def seq2seq_lora() -> Experiment:
    """The same with adapters."""
    return _lora(seq2seq(), 'seq2seq_lora')


def encoder_decoder() -> Experiment:
    """The same pairs by an encoder-decoder: --from a run of pre-training that has one.

    Rate: BART's (Lewis et al. 2020, fine-tuning: 3e-5).
    """
    return _full('encoder_decoder', SequenceToSequence(encoder=True), peak=3e-5, epochs=3)


def from_nothing() -> Experiment:
    """The same by a Transformer (Vaswani et al. 2017) that begins with nothing, without --from: 8
    million parameters and a vocabulary of its own, for tens of thousands of pairs.

    Rate, batch: ours, those of the quickstart.
    """
    model = replace(
        ANY, dim=256, heads=4, kv_heads=4, ffn=768, layers=4, encoder_layers=4, context=256
    )
    recipe = _full('from_nothing', SequenceToSequence(encoder=True), peak=2e-3, epochs=10)
    return replace(
        recipe,
        model=model,
        data=replace(recipe.data, tokenizer=TokenizerConfig(vocab=4096)),
        train=replace(recipe.train, batch=16, seq_len=256),
    )


def classify() -> Experiment:
    """Texts with labels: a head on the last token, and every parameter of the model.

    Rate, epochs, decay: BERT's (Devlin et al. 2019, appendix A.3: 2e-5 to 5e-5, 3 epochs).
    """
    return _full('classify', Classification(dropout=0.1), peak=2e-5, epochs=3, weight_decay=0.01)


def classify_lora() -> Experiment:
    """The same with adapters and the head."""
    return _lora(classify(), 'classify_lora')


def probe() -> Experiment:
    """The head alone, on the mean of the last layer: what a model knows already. Rate: ours."""
    objective = Classification(pool='mean')
    recipe = _full('probe', objective, peak=1e-3, epochs=10, weight_decay=0.0)
    return replace(recipe, tune=Frozen())


def retrieval() -> Experiment:
    """Queries with the passages that answer them (`query`, `positive`, and perhaps hard
    `negative`s): vectors by which a query finds its passage.

    Rate, epochs: E5's (Wang et al. 2022, section 4.3: 2e-5 for its base model, 3 epochs).
    """
    objective = DenseRetrieval()
    recipe = _full('retrieval', objective, peak=2e-5, epochs=3, weight_decay=0.01, examples=0)
    return replace(recipe, train=replace(recipe.train, batch=32))


def retrieval_lora() -> Experiment:
    """The same with adapters."""
    return _lora(retrieval(), 'retrieval_lora')


def dpo() -> Experiment:
    """Preferences (`prompt`, `chosen`, `rejected`), of a model that is tuned to answer.

    Rate, epochs: Zephyr's (Tunstall et al. 2023, section 4.3: 5e-7); beta: DPO's.
    """
    return _full('dpo', DPO(), peak=5e-7, epochs=1, weight_decay=0.0)


def dpo_lora() -> Experiment:
    """The same with adapters; the reference is the model without them. Rate: ours, ten times that
    of all parameters."""
    recipe = replace(dpo(), objective=DPO(reference='adapters_off'))
    return _lora(recipe, 'dpo_lora', peak=5e-6)


def dpo_llama3() -> Experiment:
    """As Llama 3 (Grattafiori et al. 2024, section 4.1.4): control tokens masked, the likelihood of
    the better answer added."""
    objective = DPO(nll=0.2, mask_format=True)
    return _rated(replace(dpo(), name='dpo_llama3', objective=objective), 1e-5)


def reward() -> Experiment:
    """A number for an answer, learnt from preferences, with their margins where they have any.

    Rate, epochs: Llama 2's (Touvron et al. 2023b, section 3.2.2: 1e-5, one epoch).
    """
    return _full('reward', RewardModel(), peak=1e-5, epochs=1)


def grpo() -> Experiment:
    """Problems (`prompt` or `question`, and `answer`): 8 completions of each prompt, rewarded by
    functions, `--objective.rollout.rewards`.

    Normaliser, no KL: DAPO's (Yu et al. 2025). Rate: that of trl, 1e-6.
    """
    recipe = _full('grpo', GRPO(), peak=1e-6, epochs=1, weight_decay=0.0)
    return replace(recipe, train=replace(recipe.train, batch=64, seq_len=512))


def grpo_lora() -> Experiment:
    """The same with adapters. Rate: ours, ten times that of all parameters."""
    return _lora(grpo(), 'grpo_lora', peak=1e-5)


def distill() -> Experiment:
    """Documents, from what a larger model of the same vocabulary says of them:
    `--objective.teacher`. Rate: ours."""
    return _full('distill', Distillation(teacher='smollm2'), peak=1e-4, epochs=1, examples=0)


def _rated(recipe: Experiment, peak: float) -> Experiment:
    """At another rate and without decay, which is for what is trained for long."""
    schedule = replace(recipe.optimizer.schedule, peak=peak)
    return replace(recipe, optimizer=replace(recipe.optimizer, schedule=schedule, weight_decay=0.0))


def _lora(
    recipe: Experiment, name: str, tune: LoRA | None = None, *, peak: float = 2e-4
) -> Experiment:
    return replace(_rated(recipe, peak), name=name, tune=tune or LoRA())
