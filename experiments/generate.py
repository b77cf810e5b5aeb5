"""Continue a prompt or answer in a chat.

python -m experiments.generate --checkpoint DIRECTORY --prompt "def "
python -m experiments.generate --weights smollm2 --chat "What is the capital of France?"
python -m experiments.generate --checkpoint ENCODER_DECODER --source "def add(a, b): <mask> a + b"
python -m experiments.generate --checkpoint DIFFUSION --prompt "def " --order confidence --steps 16
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import Mesh

from experiments import cli, models
from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.generate.diffusion import Order, Unmasker
from llama_jax.generate.generator import Generator
from llama_jax.generate.programs import Programs
from llama_jax.generate.quantized import Quantization
from llama_jax.generate.speculative.draft import Draft, Heads, Lookup
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.text import template_files
from llama_jax.text.chat import Conversation
from llama_jax.text.detokenizer import Detokenizer


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = None
    """The --workdir of a training, RUN, or RUN@STEP, RUN@best or RUN@mean:N; or --weights."""
    weights: str | None = None
    """smollm2, a .gguf file, or the directory of a model, Hugging Face's or Meta's."""
    prompt: str | None = None
    """Text to continue. Empty: the beginning of a document."""
    chat: str | None = None
    """What the user says; the model answers."""
    system: str | None = None
    """What the system says before."""
    messages: str | None = None
    """A JSON file with a whole chat: an array of messages, or an object with messages, tools,
    documents, variables, add_generation_prompt, continue_final_message."""
    chat_template: str | None = None
    """Instead of the model's own: a file with a Jinja template, or chatml, llama2, llama3, llama4.
    """
    source: str | None = None
    """What the encoder of an encoder-decoder reads; <mask> and other control tokens by name. Then
    --prompt is the beginning of what the decoder writes."""
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
    quantization: Quantization = field(default_factory=Quantization)
    lookup: int = 0
    """Draft so many tokens at a time: those that followed before where the text's last ones stood.
    The text stays what it is, and comes as a whole. 0: none."""
    draft: str | None = None
    """heads: those of the run, which --objective multi-token trained; the text stays what it is. Or
    a smaller model with the same tokenizer, as --checkpoint names one: drawn texts are other ones
    of the same distribution. Either way they come as a whole."""
    order: Order | None = None
    """Of a run of masked or block diffusion: which masks are filled in first, by the confidence in
    the token, by its margin over the second, at random, or from left to right. Default: confidence;
    a model of the dual objective continues from left to right as a causal one, unless it is given.
    """
    steps: int = 0
    """Passes in which the masks of a block are filled in, equally many in each. 0: one a pass."""
    block: int = 0
    """Masks that are filled in before others, from left to right. 0: all are there at once; a run
    of block diffusion has its own."""


def main() -> None:
    options = cli.options(Options, 'generate', __doc__)
    if options.source is not None:
        for name in ('chat', 'messages'):
            if getattr(options, name) is not None:
                raise UserError(
                    f'--source and --{name}: an encoder-decoder does not chat, leave one out'
                )
        options = replace(options, prompt=options.prompt or '')
    if sum(given is not None for given in (options.prompt, options.chat, options.messages)) != 1:
        raise UserError(
            'give either --prompt TEXT or --chat TEXT or --messages FILE; an encoder-decoder takes '
            '--source TEXT'
        )
    if options.system is not None and options.chat is None:
        raise UserError('--system is part of a chat: give --chat TEXT as well')
    if options.chat_template is not None:
        if options.prompt is not None:
            raise UserError('--chat-template is of a chat: give --chat TEXT in place of --prompt')
        template_files.chosen(options.chat_template)  # it is there
    conversation = None
    if options.messages is not None:
        conversation = template_files.conversation_of(options.messages)
    elif options.chat is not None:
        said = {'system': options.system, 'user': options.chat}
        conversation = Conversation(
            [{'role': role, 'content': text} for role, text in said.items() if text is not None]
        )
    if options.lookup and options.draft is not None:
        raise UserError('--lookup and --draft: one of them drafts, leave the other out')
    settings = ('max_tokens', 'temperature', 'top_k', 'top_p', 'seed')
    draws = {name: getattr(options, name) for name in settings}
    Controls(**draws).check(vocab=0)  # before the model is loaded; none of these is a token
    lookup = Lookup(n_draft=options.lookup) if options.lookup else None
    mesh = meshes.make(options.mesh)
    own = options.draft == 'heads'
    model = models.load(options.checkpoint, options.weights, mesh, heads=own, any_order=True)
    model = model.chatting(options.chat_template)
    fills = fills_masks(options, model)
    if conversation is None:
        prompt, before = model.prompt(options.prompt), options.prompt
    else:
        prompt, before = model.messages(conversation), ''
    if fills:
        write_by_unmasking(options, model, prompt, before, mesh=mesh, **draws)
        return
    generator = Generator(
        model.config,
        model.params,
        mesh=mesh,
        compute=options.compute,
        eos_ids=model.end_ids,
        pad_id=model.pad_id,
        quantization=options.quantization,
    )
    model = model.without_params()
    # An answer is a text of its own, a continuation follows the space that ends the prompt.
    vocabulary = model.vocabulary
    detokenize = Detokenizer(
        vocabulary.token_bytes,
        prompt=prompt if before else (),
        drop_space=vocabulary.dummy_prefix and not before,
    )
    source = None if options.source is None else model.source(options.source)
    how: Lookup | Heads | Draft | None = lookup
    if own:
        how = Heads(generator.programs.heads)
    elif options.draft is not None:
        how = by_model(options.draft, model, like=generator.programs)
    drafts = ''
    begin, n_tokens = time.perf_counter(), 0
    if how is None:
        pieces = generator.stream(prompt, source=source, **draws)
    else:
        sources = None if source is None else [source]
        (whole,) = generator([prompt], sources=sources, speculate=how, **draws)
        pieces, went = iter([whole.tokens]), whole.speculation
        drafts = f'{went.acceptance:.0%} of {went.drafted} drafts accepted; ' if went else ''
    with cli.whole_text():
        print(before, end='', flush=True)
        for tokens in pieces:
            n_tokens += len(tokens)
            print(detokenize(tokens), end='', flush=True)
    seconds = time.perf_counter() - begin
    step = '' if model.step is None else f'step {model.step}; '
    print(
        f'[{step}{drafts}{n_tokens} tokens in {seconds:.1f} s, compilation included]',
        file=sys.stderr,
    )


def fills_masks(options: Options, model: models.Pretrained) -> bool:
    """Whether the model writes by filling masks in. Raises UserError for options that the way in
    which it writes does not have."""
    asked = [f'--{name}' for name in ('order', 'steps', 'block') if getattr(options, name)]
    if model.unmasks is None:
        if asked:
            raise UserError(
                f'{asked[0]}: {model.name} was not trained to fill masks in, by masked or block '
                'diffusion: leave it out'
            )
        return False
    if model.left_to_right and not asked:
        return False
    given = {
        '--lookup': options.lookup,
        '--draft': options.draft,
        '--source': options.source,
        '--quantization': options.quantization != Quantization(),
    }
    for name, value in given.items():
        if value:
            raise UserError(f'{name} has no effect where masks are filled in: leave it out')
    return True


def write_by_unmasking(
    options: Options,
    model: models.Pretrained,
    prompt: list[int],
    before: str,
    *,
    mesh: Mesh,
    **draws: Any,
) -> None:
    """Print a text whose length is given, `before` in front."""
    assert model.unmasks is not None
    begin = time.perf_counter()
    unmask = Unmasker(
        model.config,
        model.params,
        mesh=mesh,
        compute=options.compute,
        mask_id=model.vocabulary.control['<mask>'],
        end_ids=model.end_ids,
        pad_id=model.pad_id,
        read_previous=model.unmasks.read_previous,
        block=model.unmasks.block,
    )
    (text,) = unmask(
        [prompt],
        order=options.order or 'confidence',
        steps=options.steps,
        block=options.block,
        **draws,
    )
    with cli.whole_text():
        print(
            before
            + model.vocabulary.decode([*prompt, *text.tokens])[
                len(model.vocabulary.decode(prompt)) :
            ],
            end='',
            flush=True,
        )
    seconds = time.perf_counter() - begin
    print(
        f'[step {model.step}; {len(text.tokens)} tokens in {seconds:.1f} s, compilation included]',
        file=sys.stderr,
    )


def by_model(run: str, large: models.Pretrained, *, like: Programs) -> Draft:
    """Drafts of the model that was trained in `run`, for the large one, whose programs these
    are."""
    small = models.load(run, None, like.mesh, '--draft')
    ours, theirs = (
        [model.vocabulary.token_bytes(token) for token in range(model.config.ids)]
        for model in (small, large)
    )
    if ours != theirs:
        raise UserError(f'--draft {run}: the model has another tokenizer, so it cannot draft')
    return Draft(small.programs(like.mesh, like.model.compute))


if __name__ == '__main__':
    cli.main(main)
