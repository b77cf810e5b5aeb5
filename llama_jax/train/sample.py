"""Text that the model writes during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.step import State

TEMPERATURE = 0.8


def sampler(
    experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[State], Iterator[tuple[str, str]]] | None:
    """A function that continues the prompts of the configuration: pairs (prompt, text). An encoder
    reads them, where there is one, and the decoder writes from the beginning.

    None when there are no prompts, no validations, or several processes: samples are a look at the
    model, not worth a second program on every host. Raises UserError for what does not fit the
    model's context.
    """
    prompts = experiment.evaluation.prompts
    if not prompts or not experiment.evaluation.every or jax.process_count() > 1:
        return None
    from llama_jax.generate.engine import Generator

    begin, texts = (
        [tokenizer.control['<s>']],
        [tokenizer.encode(prompt).tolist() for prompt in prompts],
    )
    reads = experiment.model.encoder_layers > 0
    _check(experiment, texts, reads=reads)

    def run(state: State) -> Iterator[tuple[str, str]]:
        generator = Generator(
            experiment.model,
            state.evaluated,
            mesh=mesh,
            compute=experiment.compute,
            eos_ids=(tokenizer.eos_id,),
            pad_id=tokenizer.pad_id,
        )
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


def _check(experiment: Experiment, texts: list[list[int]], *, reads: bool) -> None:
    context, tokens = experiment.model.context, experiment.evaluation.sample_tokens
    for prompt, text in zip(experiment.evaluation.prompts, texts, strict=True):
        shown = repr(prompt if len(prompt) <= 40 else f'{prompt[:37]}...')
        if reads and len(text) > context:
            raise UserError(
                f'the prompt {shown} of --evaluation.prompts has {len(text)} tokens, and the '
                f'encoder reads {context}: shorten it'
            )
        before = 1 if reads else 1 + len(text)
        if before + tokens > context:
            raise UserError(
                f'--evaluation.sample-tokens {tokens} after the prompt {shown} ({before} tokens '
                f'with the begin token) is more than the context of {context}: '
                + (
                    f'set --evaluation.sample-tokens {context - before} or less'
                    if before < context
                    else 'shorten the prompt'
                )
            )
