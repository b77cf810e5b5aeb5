"""Continue a prompt: `python -m experiments.generate --checkpoint DIRECTORY --prompt "def "`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from experiments import cli
from llama_jax import mesh as meshes
from llama_jax.generate.engine import Generator
from llama_jax.generate.text import Detokenizer
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.train.restore import load


@dataclass(frozen=True)
class Options:
    checkpoint: Path
    """The --workdir of a training."""
    prompt: str = ''
    """Text to continue. Empty: the beginning of a document."""
    max_tokens: int = 128
    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens. 0: from all."""
    top_p: float = 0.95
    """Draw from the most likely tokens that together have this probability."""
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: Compute = field(default_factory=Compute)


def main() -> None:
    options = tyro.cli(Options, prog='python -m experiments.generate', description=__doc__)
    mesh = meshes.make(options.mesh)
    model = load(options.checkpoint, mesh)
    tokenizer = model.tokenizer
    generator = Generator(
        model.config,
        model.params,
        mesh=mesh,
        compute=options.compute,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt).tolist()]
    detokenize = Detokenizer(tokenizer.decode, prompt=prompt)
    pieces = generator.stream(
        prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    begin, n_tokens = time.perf_counter(), 0
    for tokens in pieces:
        shown = '' if n_tokens else options.prompt
        n_tokens += len(tokens)
        print(shown + detokenize(tokens), end='', flush=True)
    print(detokenize.finish())
    seconds = time.perf_counter() - begin
    print(
        f'[step {model.step}; {n_tokens} tokens in {seconds:.1f} s, compilation included]',
        file=sys.stderr,
    )


if __name__ == '__main__':
    cli.main(main)
