"""Every published size of the LLaMA family with its training recipe.

Launch: python -m experiments.pretrain llama3_2_1b --data.tokenizer.path PATH --model.vocab 0 \\
            --workdir runs/1b
Plan:   python -m tpu.plan llama1_65b --topology v4:8x16x16

Published are the shapes and what each family's comment names: peak learning rate, tokens per batch,
total tokens, warm-up. All families train with AdamW (0.9, 0.95), weight decay 0.1, gradients
clipped to norm 1, a cosine schedule: the defaults of `AdamW`. Ours everywhere:

- z-loss 1e-4, no weight decay on embeddings, and fresh parameters also where the release continued
  from another model (Code Llama, Llama 3.2).
- Data. The mixtures are not public: English Wikipedia stands in for them; replace it with
  `--data.sources.0.name` or in a function of your own. The tokenizer is learnt from that text with
  the published vocabulary size. `--data.tokenizer.path` takes a released one (docs/weights.md,
  Tokenizers); it gains control tokens behind its own, and with it goes `--model.vocab 0`, which
  pads the model to a multiple of 128.
- Mesh and compute: parameters over all chips (fsdp), bfloat16, layers recomputed from their input.
"""

from __future__ import annotations

from dataclasses import replace

from llama_jax.data.config import DataConfig, Source
from llama_jax.model.config import Compute, ModelConfig, RopeScaling
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import EvaluationConfig, Experiment, TrainConfig


def _pretrain(
    name: str,
    model: ModelConfig,
    *,
    tokens: float,
    peak: float,
    seq_len: int,
    batch_tokens: int = 4 * 2**20,
    warmup: int = 2000,
    final: float = 0.1,
    eps: float = 1e-8,
) -> Experiment:
    """`tokens` in all, `batch_tokens` a step; `final` is the last rate as a share of the peak."""
    return Experiment(
        name=name,
        model=model,
        data=DataConfig(
            sources=(Source('wikipedia/20231101.en'),),
            train_split='train[:98%]',
            validation_split='train[98%:99%]',
            test_split='train[99%:]',
            tokenizer=TokenizerConfig(vocab=model.vocab, sample_bytes=100_000_000),
            workers=8,
        ),
        train=TrainConfig(
            steps=round(tokens / batch_tokens), batch=batch_tokens // seq_len, seq_len=seq_len
        ),
        optimizer=AdamW(
            schedule=ScheduleConfig(peak=peak, warmup_steps=warmup, final=final), eps=eps
        ),
        evaluation=EvaluationConfig(batches=8),
        compute=Compute(precision='bfloat16', remat='full'),
    )


# LLaMA 1 (Touvron et al. 2023, tables 2 and section 2.3): 4M tokens a batch, 2,000 warm-up steps,
# down to 10% of the peak.


def _shape1(dim: int, layers: int, heads: int, ffn: int, norm_eps: float) -> ModelConfig:
    return ModelConfig(
        vocab=32000,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        ffn=ffn,
        context=2048,
        rope_theta=1e4,
        norm_eps=norm_eps,
    )


_7B = _shape1(4096, 32, 32, 11008, norm_eps=1e-6)
_13B = _shape1(5120, 40, 40, 13824, norm_eps=1e-6)
_33B = _shape1(6656, 60, 52, 17920, norm_eps=1e-6)
_65B = _shape1(8192, 80, 64, 22016, norm_eps=1e-5)


def llama1_7b() -> Experiment:
    return _pretrain('llama1_7b', _7B, tokens=1.0e12, peak=3e-4, seq_len=2048)


def llama1_13b() -> Experiment:
    return _pretrain('llama1_13b', _13B, tokens=1.0e12, peak=3e-4, seq_len=2048)


def llama1_33b() -> Experiment:
    return _pretrain('llama1_33b', _33B, tokens=1.4e12, peak=1.5e-4, seq_len=2048)


def llama1_65b() -> Experiment:
    return _pretrain('llama1_65b', _65B, tokens=1.4e12, peak=1.5e-4, seq_len=2048)


# Llama 2 (Touvron et al. 2023b, section 2.2): as LLaMA 1, with twice the context, 2T tokens and
# Adam's epsilon at 1e-5; grouped queries in the largest.

_2_7B = replace(_7B, context=4096, norm_eps=1e-5)
_2_13B = replace(_13B, context=4096, norm_eps=1e-5)
_2_70B = replace(_65B, context=4096, kv_heads=8, ffn=28672)


def llama2_7b() -> Experiment:
    return _pretrain('llama2_7b', _2_7B, tokens=2.0e12, peak=3e-4, seq_len=4096, eps=1e-5)


def llama2_13b() -> Experiment:
    return _pretrain('llama2_13b', _2_13B, tokens=2.0e12, peak=3e-4, seq_len=4096, eps=1e-5)


def llama2_70b() -> Experiment:
    return _pretrain('llama2_70b', _2_70B, tokens=2.0e12, peak=1.5e-4, seq_len=4096, eps=1e-5)


# Code Llama (Roziere et al. 2023, section 2.5): continues Llama 2 on code, sequences of 4096, 1,000
# warm-up steps, down to 1/30 of the peak; a fine-tuning on 16,384 tokens then sets theta to 1e6.
# The infill marks are the 16 extra ids, where the model was trained to infill. The Python variants
# continue Code Llama at 1e-4; their plain vocabulary is that of a model which cannot infill.


def _code(shape: ModelConfig, *, vocab: int) -> ModelConfig:
    return replace(shape, vocab=vocab, context=16384, rope_theta=1e6)


def _code_pretrain(name: str, model: ModelConfig, *, tokens: float, peak: float) -> Experiment:
    return _pretrain(name, model, tokens=tokens, peak=peak, seq_len=4096, warmup=1000, final=1 / 30)


_CODE_34B = replace(_2_70B, layers=48, ffn=22016)


def codellama_7b() -> Experiment:
    return _code_pretrain('codellama_7b', _code(_2_7B, vocab=32016), tokens=5e11, peak=3e-4)


def codellama_13b() -> Experiment:
    return _code_pretrain('codellama_13b', _code(_2_13B, vocab=32016), tokens=5e11, peak=3e-4)


def codellama_34b() -> Experiment:
    return _code_pretrain('codellama_34b', _code(_CODE_34B, vocab=32000), tokens=5e11, peak=1.5e-4)


def codellama_70b() -> Experiment:
    return _code_pretrain('codellama_70b', _code(_2_70B, vocab=32016), tokens=1e12, peak=1.5e-4)


def codellama_7b_python() -> Experiment:
    return _code_pretrain('codellama_7b_python', _code(_2_7B, vocab=32000), tokens=1e11, peak=1e-4)


def codellama_13b_python() -> Experiment:
    return _code_pretrain(
        'codellama_13b_python', _code(_2_13B, vocab=32000), tokens=1e11, peak=1e-4
    )


def codellama_34b_python() -> Experiment:
    return _code_pretrain(
        'codellama_34b_python', _code(_CODE_34B, vocab=32000), tokens=1e11, peak=1e-4
    )


# Llama 3 and 3.1 (Grattafiori et al. 2024, sections 3.2 and 3.4). Published for all: shapes, peak
# learning rates, about 15T tokens. Published for 405B: 8,000 warm-up steps, down to 1% of the peak,
# batches of 4M tokens that grow to 8M and 16M; ours is 16M throughout. Of 8B and 70B the batch (4M
# tokens), warm-up and final rate are ours. 3.1 is pre-trained on rows of 8192 too; its context is
# the length that later stages stretch it to. 3.3 is 3.1 70B with other post-training.

_3_8B = replace(
    _7B, vocab=128256, kv_heads=8, ffn=14336, context=8192, rope_theta=5e5, norm_eps=1e-5
)
_3_70B = replace(_2_70B, vocab=128256, context=8192, rope_theta=5e5)
_LONG = {'context': 131072, 'rope_scaling': RopeScaling(factor=8.0)}
_3_405B = replace(_3_70B, dim=16384, layers=126, heads=128, ffn=53248, **_LONG)


def llama3_8b() -> Experiment:
    return _pretrain('llama3_8b', _3_8B, tokens=15e12, peak=3e-4, seq_len=8192)


def llama3_70b() -> Experiment:
    return _pretrain('llama3_70b', _3_70B, tokens=15e12, peak=1.5e-4, seq_len=8192)


def llama3_1_8b() -> Experiment:
    model = replace(_3_8B, **_LONG)
    return _pretrain('llama3_1_8b', model, tokens=15e12, peak=3e-4, seq_len=8192)


def llama3_1_70b() -> Experiment:
    model = replace(_3_70B, **_LONG)
    return _pretrain('llama3_1_70b', model, tokens=15e12, peak=1.5e-4, seq_len=8192)


def llama3_1_405b() -> Experiment:
    """15.6T tokens; 3.8e25 FLOPs."""
    return _pretrain(
        'llama3_1_405b',
        _3_405B,
        tokens=15.6e12,
        peak=8e-5,
        seq_len=8192,
        batch_tokens=16 * 2**20,
        warmup=8000,
        final=0.01,
    )


def llama3_3_70b() -> Experiment:
    return replace(llama3_1_70b(), name='llama3_3_70b')


# Llama 3.2 (model card): pruned from 3.1 8B and distilled on up to 9T tokens. No recipe for a
# training from scratch is published: the rest is that of 3.1 8B.

_SMALL = {'tied': True, 'rope_scaling': RopeScaling(factor=32.0), 'context': 131072}
_3_2_1B = replace(_3_8B, dim=2048, layers=16, head_dim=64, ffn=8192, **_SMALL)
_3_2_3B = replace(_3_8B, dim=3072, layers=28, heads=24, ffn=8192, **_SMALL)


def llama3_2_1b() -> Experiment:
    return _pretrain('llama3_2_1b', _3_2_1B, tokens=9e12, peak=3e-4, seq_len=8192)


def llama3_2_3b() -> Experiment:
    return _pretrain('llama3_2_3b', _3_2_3B, tokens=9e12, peak=3e-4, seq_len=8192)
