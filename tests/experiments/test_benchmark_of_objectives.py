"""The benchmark of objectives takes steps of those that read no plain text, or have a teacher."""

import math
from dataclasses import replace

import pytest

from benchmarks import objectives
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.objectives.causal import CausalLM
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import resolved
from tests.compare import tiny


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'text.txt'
    lines = (f'{i} The quick brown fox jumps over the lazy dog. ' * 8 for i in range(64))
    path.write_text('\n\n'.join(lines))
    data = DataConfig(
        sources=(Source('text_files', files=(str(path),), document_characters=400),),
        tokenizer=TokenizerConfig(kind='bytes'),
    )
    tokenizer = load_tokenizer(data)
    made = replace(tiny.experiment(path), data=data)
    made = tiny.changed(tiny.changed(made, 'model', context=512, vocab=0), 'train', seq_len=512)
    return resolved(made, tokenizer.vocab_size), tokenizer


@pytest.mark.parametrize('name', ['distill', 'retrieval'])
def test_steps_are_taken(base, name, tmp_path):
    experiment, tokenizer = base
    arm = objectives.arm(experiment, objectives.ARMS[name], name, tmp_path)
    loss = objectives.steps(arm, tokenizer)(2)
    assert math.isfinite(loss) and loss > 0
    assert objectives.host_speed(arm, tokenizer, seconds=0.01) > 0
    alone = CausalLM().flops(experiment.model, 512)
    assert objectives.flops_of(arm) == (
        pytest.approx(alone * 4 / 3) if name == 'distill' else arm.objective.flops(arm.model, 512)
    )
