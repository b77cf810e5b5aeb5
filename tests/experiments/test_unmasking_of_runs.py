"""Text of runs that fill masks in, by the script; and who refuses such runs."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

import configs
from experiments import generate, models
from llama_jax.errors import UserError
from llama_jax.generate.diffusion import Unmasker
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.diffusion import MaskedDiffusion
from llama_jax.objectives.dual import Dual
from llama_jax.objectives.weighted import Weighted
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.train import restore

BYTES = bytes_tokenizer()
CONFIG = ModelConfig(
    vocab=BYTES.vocab_size, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=32, context=64
)
RUNS = {
    'whole': MaskedDiffusion(),
    'blocks': BlockDiffusion(block=4),
    'dual': Dual(),
    'sum': Weighted((InfoNCE(), BlockDiffusion(block=2))),
    'causal': CausalLM(),
}
ONE = ('--mesh.fsdp', '1', '--mesh.data', '8', '--max-tokens', '6', '--temperature', '0')


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Directories that read as runs of this project."""
    params = layers.create(CONFIG, jax.random.key(0), make(MeshConfig(data=8)))
    experiment = replace(configs.get('quickstart'), model=CONFIG)

    def experiment_of(workdir):
        return replace(experiment, objective=RUNS[Path(workdir).name])

    def load(checkpoint, mesh, **how):
        return restore.Trained(experiment_of(checkpoint), params, {}, BYTES, 30)

    monkeypatch.setattr(restore, 'load', load)
    monkeypatch.setattr(restore, 'experiment_of', experiment_of)
    return tmp_path


def written(params, prompt, name, **how):
    asked = RUNS[name].reading.unmasks
    unmask = Unmasker(
        *(CONFIG, params),
        mesh=make(MeshConfig(data=8, fsdp=1)),
        compute=configs.get('quickstart').compute,
        mask_id=BYTES.mask_id,
        end_ids=(BYTES.eos_id,),
        pad_id=BYTES.pad_id,
        **asked._asdict(),
    )
    prompt = [BYTES.bos_id, *BYTES.encode(prompt)]
    (text,) = unmask([prompt], max_tokens=6, **how)
    return BYTES.decode([*prompt, *text.tokens])


@pytest.mark.parametrize(
    ('name', 'options', 'how'),
    [
        ('whole', ['--order', 'margin', '--steps', '2', '--block', '3'], {'block': 3}),
        ('blocks', [], {}),
        ('dual', ['--order', 'left'], {}),
        ('sum', [], {}),
    ],
)
def test_the_script_fills_masks_in(name, options, how, runs, run_script):
    said = dict(zip(options[::2], options[1::2], strict=True))
    how |= {'order': said.get('--order', 'confidence'), 'steps': int(said.get('--steps', 0))}
    code, out, error = run_script(
        generate.main, '--checkpoint', runs / name, '--prompt', '世 a', *ONE, *options
    )
    assert code == 0 and error[-1].startswith('[step 30; ')
    assert out == written(restore.load(runs / name, None).params, '世 a', name, **how) + '\n'


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('causal', ['--order', 'left'], '--order: causal was not trained to fill masks in'),
        ('causal', ['--steps', '2'], '--steps: causal was not trained'),
        ('blocks', ['--block', '2'], 'the model was trained to write blocks of 4 tokens'),
        ('blocks', ['--steps', '5'], 'takes 4 at most'),
        ('whole', ['--lookup', '2'], '--lookup has no effect where masks are filled in'),
        ('whole', ['--quantization.cache', 'int8'], '--quantization has no effect'),
        ('dual', ['--order', 'left', '--lookup', '2'], '--lookup has no effect'),
    ],
)
def test_options_of_the_other_way_are_refused(name, options, words, runs, run_script):
    code, out, error = run_script(
        generate.main, '--checkpoint', runs / name, '--prompt', 'a', *ONE, *options
    )
    assert code == 2 and not out and words in error[-1]


def test_who_continues_texts_refuses_what_only_fills_masks_in(runs):
    mesh = make(MeshConfig(data=8))
    assert models.from_run(runs / 'dual', mesh).left_to_right
    assert not models.from_run(runs / 'whole', mesh, any_order=True).left_to_right
    for name in ('whole', 'blocks'):
        with pytest.raises(UserError, match='fills masks in .*: ask it by experiments.generate'):
            models.load(runs / name, None, mesh)
