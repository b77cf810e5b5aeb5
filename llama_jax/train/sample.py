"""Text that the model writes during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.step import State

TEMPERATURE = 0.8


def sampler(
    experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[State], Iterator[tuple[str, str]]] | None:
    """A function that continues the prompts of the configuration: pairs (prompt, text). An encoder
    reads them, where there is one, and the decoder writes from the beginning.

    None when there are no prompts, or several processes: samples are a look at the model, not
    worth a second program on every host.
    """
    prompts = experiment.evaluation.prompts
    if not prompts or jax.process_count() > 1:
        return None
    from llama_jax.generate.engine import Generator

    def run(state: State) -> Iterator[tuple[str, str]]:
        generator = Generator(
            experiment.model,
            state.params,
            mesh=mesh,
            compute=experiment.compute,
            eos_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
        )
        begin, texts = [tokenizer.bos_id], [tokenizer.encode(prompt).tolist() for prompt in prompts]
        reads = experiment.model.encoder_layers > 0
        completions = generator(
            [begin] * len(texts) if reads else [[*begin, *text] for text in texts],
            sources=[text or begin for text in texts] if reads else None,
            max_tokens=experiment.evaluation.sample_tokens,
            temperature=TEMPERATURE,
            seed=list(range(len(prompts))),
        )
        for prompt, completion in zip(prompts, completions, strict=True):
            yield prompt, tokenizer.decode(completion.tokens)

    return run
