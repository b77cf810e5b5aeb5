"""What an engine can be made for, and which requests it takes."""

from __future__ import annotations

from llama_jax.engine.request import Request
from llama_jax.errors import UserError
from llama_jax.generate.programs import Programs, check_chunk, check_prompt
from llama_jax.mesh import batch_shards


def check_sizes(
    programs: Programs,
    *,
    rows: int,
    length: int,
    source_length: int | None,
    queue: int,
    prefill_chunk: int,
    steps: int,
) -> None:
    """Raise UserError for an engine that cannot be; the sizes are those of Engine."""
    config = programs.config
    check_chunk(prefill_chunk)
    if batch_shards(programs.mesh) != 1:
        raise UserError(
            f'an engine serves one replica, and the mesh divides a batch by '
            f'{batch_shards(programs.mesh)}: use --mesh.fsdp 1 --mesh.tensor -1'
        )
    if source_length is not None and not config.encoder_layers:
        raise UserError('source_length is given, but this model has no encoder: leave it out')
    for name, value in (('rows', rows), ('queue', queue), ('steps', steps)):
        if value < 1:
            raise UserError(f'{name} {value}: at least 1')
    if (source_length or 0) > config.context:
        raise UserError(f'source_length {source_length} exceeds the context of {config.context}')
    if not 2 <= length <= config.context:
        raise UserError(f'length {length} is not within 2 and the context of {config.context}')


def check_request(programs: Programs, request: Request, *, length: int, source_length: int) -> None:
    """Raise UserError for what a row of `length` tokens, after a source of `source_length`, cannot
    hold, and for settings that go against each other."""
    controls, n_prompt = request.controls, len(request.prompt)
    check_prompt(request.prompt, 'the prompt', vocab=programs.config.ids)
    controls.check(vocab=programs.config.ids)
    programs.check_source(request.source, 'the source')
    if request.source is not None and len(request.source) > source_length:
        raise UserError(
            f'the source ({len(request.source)} tokens) exceeds the {source_length} of a '
            'row: shorten it'
        )
    if request.grammar is not None and (controls.min_tokens or controls.ignore_end):
        raise UserError('a grammar says where the text ends: leave min_tokens, ignore_end out')
    if n_prompt + controls.max_tokens > length:
        raise UserError(
            f'the prompt ({n_prompt} tokens) and max_tokens ({controls.max_tokens}) exceed the '
            f'{length} tokens of a row: shorten one of them'
        )
