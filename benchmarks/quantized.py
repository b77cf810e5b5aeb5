"""What fewer bits cost in quality: perplexity and agreement with float32.

python -m benchmarks.quantized --weights smollm2 --files prose.md

Every token is read by a step of generation after those before it, with the cache that the setting
names. Files are read in pieces of `length` tokens, as rows of one batch; by default they are code
and prose of Python itself: the module `argparse`, and the topics of its help.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import PartitionSpec as P

from benchmarks.text import CODE_AND_PROSE, encoded
from experiments import cli, models
from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.generate import decode
from llama_jax.generate.programs import Programs
from llama_jax.generate.quantized import Quantization
from llama_jax.mesh import MeshConfig
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute
from llama_jax.model.layers import Params

HOW = {
    'float32': Quantization(),
    'int8 weights': Quantization(weights='int8'),
    'int4 weights': Quantization(weights='int4'),
    'int8 cache': Quantization(cache='int8'),
    'int8 weights and cache': Quantization(weights='int8', cache='int8'),
}


@dataclass(frozen=True)
class Options:
    weights: str = 'smollm2'
    """smollm2, a .gguf file, or the directory of a Hugging Face model."""
    files: tuple[Path, ...] = CODE_AND_PROSE
    tokens: int = 2048
    """At most so many of each file."""
    length: int = 256
    """Tokens of a piece."""


def main() -> None:
    options = tyro.cli(Options, prog='python -m benchmarks.quantized', description=__doc__)
    mesh = meshes.make(MeshConfig())
    model = models.from_weights(options.weights, mesh)
    if not 2 <= options.length <= model.config.context:
        raise UserError(f'--length {options.length}: from 2 to the context {model.config.context}')
    if options.tokens < 2:
        raise UserError(f'--tokens {options.tokens}: give 2 or more')
    texts = {
        path: encoded(path, model.vocabulary, least=2)[: options.tokens] for path in options.files
    }
    base: dict[Path, tuple[float, np.ndarray]] = {}
    print('text | tokens | setting | perplexity | change | top-5 agreement | same first')
    for name, how in HOW.items():
        programs = model.programs(mesh, Compute(), how)
        for file, tokens in texts.items():
            length = min(options.length, len(tokens))
            token_BT = tokens[: len(tokens) // length * length].reshape(-1, length)
            loss, top_TBR = read(programs, token_BT.astype(np.int32))
            base_loss, base_TBR = base.setdefault(file, (loss, top_TBR))
            agreement = (top_TBR[..., :, None] == base_TBR[..., None, :]).any(-1).mean()
            first = (top_TBR[..., 0] == base_TBR[..., 0]).mean()
            change = np.exp(loss - base_loss) - 1
            print(
                f'{file.name} | {token_BT.size} | {name} | {np.exp(loss):.3f} | {change:+.2%} | '
                f'{agreement:.1%} | {first:.1%}',
                flush=True,
            )


def read(programs: Programs, token_BT: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss per token in nats, and the five likeliest next tokens at every place."""

    rows = layout.rows()

    def scores(logits_BV: jax.Array, next_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_BV = jax.nn.log_softmax(logits_BV)
        log_B = jnp.take_along_axis(log_BV, next_B[:, None], axis=1)[:, 0]
        return log_B, jax.lax.top_k(logits_BV, 5)[1]

    def scored(params: Params, cache: Cache, token_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: tuple, both: tuple) -> tuple:
            (at, cache), (token_B, next_B) = carry, both
            at_B = jnp.zeros_like(token_B) + at
            logits_BV, cache = decode.step(programs.model, params, token_B, at_B, cache)
            by_row = jax.shard_map(scores, in_specs=rows, out_specs=rows, check_vma=False)
            return (at + 1, cache), by_row(jax.reshard(logits_BV, P(*rows, None)), next_B)

        token_TB = jnp.einsum('BT->TB', token_BT)
        return jax.lax.scan(step, (jnp.int32(0), cache), (token_TB[:-1], token_TB[1:]))[1]

    B, T = token_BT.shape
    with jax.set_mesh(programs.mesh):
        cache = programs.empty(batch=B, slots=T)
        log_TB, top_TBR = jax.device_get(
            jax.jit(scored)(programs.params, cache, programs.place(token_BT))
        )
    return -float(log_TB.astype(np.float64).mean()), top_TBR


if __name__ == '__main__':
    cli.main(main)
