"""Text to token ids and back, by the routes that vLLM's server has: whoever scores token ids over
HTTP, such as lm-eval, needs no tokenizer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.errors import UserError
from llama_jax.serve.body import Fields
from llama_jax.serve.errors import ApiError
from llama_jax.serve.schema import check_model
from llama_jax.serve.served import Served
from llama_jax.text.vocabulary import TooLongError, encode_spelled, within

Json = dict[str, Any]
_MOST = 2**16
"""Tokens of a text: more than a context, for clients that cut long texts by themselves."""


def tokenizer_info(served: Served) -> Json:
    """The names of the tokens that begin and end a text; null where there is none."""
    names = {token: name for name, token in served.vocabulary.control.items()}
    vocabulary = served.vocabulary
    ids = {'bos': vocabulary.bos_id, 'eos': vocabulary.eos_id, 'pad': vocabulary.pad_id}
    return {f'{what}_token': None if i is None else names.get(i) for what, i in ids.items()}


def tokenized(served: Served, fields: Mapping[str, Any]) -> Json:
    """Of a body with `prompt`, in which control tokens go by name. The ids that begin a text are
    put before it unless `add_special_tokens` is false, or it spells them."""
    body = Fields(fields, known={'model', 'prompt', 'add_special_tokens'})
    check_model(body, served)
    text = body.text('prompt', None)
    if text is None:
        body.bad('prompt', 'is missing: give a string')
    try:
        ids = encode_spelled(within(served.vocabulary, _MOST), text)
    except TooLongError:
        ids = None
    except UserError as error:
        raise ApiError(400, str(error), param='prompt') from None
    if ids is None or len(ids) > _MOST:
        body.bad('prompt', f'has more than {_MOST} tokens: send it in parts')
    begun = tuple(ids[: len(served.begin)]) == served.begin
    if body.boolean('add_special_tokens', True) and not begun:
        ids = [*served.begin, *ids]
    return {'tokens': ids, 'count': len(ids), 'max_model_len': served.engine.length}


def detokenized(served: Served, fields: Mapping[str, Any]) -> Json:
    """Of a body with `tokens`; control tokens are spelled by name."""
    body = Fields(fields, known={'model', 'tokens'})
    check_model(body, served)
    if not body.has('tokens'):
        body.bad('tokens', 'is missing: give token ids')
    ids = body.ids('tokens', vocab=served.engine.config.ids)
    return {'prompt': served.vocabulary.decode(ids, show_control=True)}
