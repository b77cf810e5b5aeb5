"""How a model of another code base reads and writes text: its vocabulary and its chat format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.text.bpe import Bpe, splitter
from llama_jax.text.chat import ChatFormat, from_template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.vocabulary import Vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _WHOLE, _UNUSED, _BYTE = range(1, 7)
"""Kinds of token in a GGUF file; SentencePiece has the same numbers."""


@dataclass(frozen=True)
class Text:
    vocabulary: Vocabulary
    begin: tuple[int, ...]
    """Ids before every prompt that is no chat: bos, where the model was trained with it."""
    chat: ChatFormat | None
    """None for a model without a template for chats, or with one that is not known."""


def from_gguf(settings: Mapping[str, Any]) -> Text:
    """Of the settings of a GGUF file. Raises UserError for a kind of vocabulary not supported."""

    def get(name: str) -> Any:
        value = settings.get(f'tokenizer.ggml.{name}')
        if value is None:
            raise UserError(f'GGUF: tokenizer.ggml.{name} is missing')
        return value

    def optional(name: str, default: Any = None) -> Any:
        return settings.get(f'tokenizer.ggml.{name}', default)

    kind = get('model')
    vocabulary: Vocabulary
    if kind == 'gpt2':
        split = get('pre')
        vocabulary = _byte_level(
            get('tokens'),
            optional('token_type') or [_NORMAL] * len(get('tokens')),
            merges=(merge.split(' ') for merge in get('merges')),
            splitter=splitter(split),
            ignore_merges=split == 'llama-bpe',
            bos_id=optional('bos_token_id'),
            eos_id=get('eos_token_id'),
            pad_id=optional('padding_token_id'),
            end_ids=[
                i for name in ('eot', 'eom') if (i := optional(f'{name}_token_id')) is not None
            ],
        )
        with_bos = split == 'llama-bpe'
    elif kind == 'llama':
        vocabulary = _sentencepiece(
            get('tokens'),
            get('scores'),
            get('token_type'),
            bos_id=get('bos_token_id'),
            eos_id=get('eos_token_id'),
            space_before=optional('add_space_prefix', True),
        )
        with_bos = True
    else:
        raise UserError(
            f'GGUF: tokenizer.ggml.model = {kind!r} is not supported: gpt2 (byte-level) and llama '
            '(SentencePiece) are'
        )
    begin: tuple[int, ...] = ()
    if optional('add_bos_token', with_bos) and vocabulary.bos_id is not None:
        begin = (vocabulary.bos_id,)
    template = settings.get('tokenizer.chat_template')
    return Text(vocabulary, begin, from_template(template) if template else None)


def from_huggingface(directory: Path, *, vocab: int) -> Text:
    """Of tokenizer.model (SentencePiece) or tokenizer.json (byte-level) in the directory of a model
    with `vocab` rows of embedding."""
    settings = _json(directory / 'tokenizer_config.json', {})
    vocabulary: Vocabulary
    if (directory / 'tokenizer.model').is_file():
        vocabulary = Tokenizer.load(directory / 'tokenizer.model')
        begin: tuple[int, ...] = (vocabulary.bos_id,) if settings.get('add_bos_token', True) else ()
    elif (directory / 'tokenizer.json').is_file():
        # What generate() of transformers would stop at, then what the model's settings say.
        ends = _json(directory / 'generation_config.json', {}).get('eos_token_id')
        if ends is None:
            ends = _json(directory / 'config.json', {}).get('eos_token_id')
        vocabulary, begin = _tokenizer_json(
            directory / 'tokenizer.json', settings, ends=ends, vocab=vocab
        )
    else:
        raise UserError(f'{directory} has neither tokenizer.model nor tokenizer.json')
    template = settings.get('chat_template')
    if isinstance(template, list):  # several by name
        template = next((t['template'] for t in template if t['name'] == 'default'), None)
    path = directory / 'chat_template.jinja'
    if path.is_file():
        template = path.read_text(encoding='utf-8')
    return Text(vocabulary, begin, from_template(template) if template else None)


def _byte_level(
    tokens: list[str], kinds: list[int], *, merges: Iterable[list[str]], **settings: Any
) -> Bpe:
    def of(*wanted: int) -> dict[str, int]:
        pairs = enumerate(zip(tokens, kinds, strict=True))
        return {token: i for i, (token, kind) in pairs if kind in wanted}

    return Bpe(
        of(_NORMAL),
        [_pair(merge) for merge in merges],
        control=of(_CONTROL, _UNKNOWN),
        whole=of(_WHOLE),
        vocab_size=len(tokens),
        **settings,
    )


def _pair(merge: list[str]) -> tuple[str, str]:
    if len(merge) != 2:
        raise UserError(f'merge {" ".join(merge)!r} is not of two tokens')
    return merge[0], merge[1]


def _sentencepiece(
    tokens: list[str],
    scores: list[float],
    kinds: list[int],
    *,
    bos_id: int,
    eos_id: int,
    space_before: bool,
) -> Tokenizer:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = _BYTE in kinds
    proto.trainer_spec.bos_piece, proto.trainer_spec.eos_piece = tokens[bos_id], tokens[eos_id]
    proto.normalizer_spec.add_dummy_prefix = space_before
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    return Tokenizer(proto.SerializeToString())


def _tokenizer_json(
    path: Path, settings: Mapping[str, Any], *, ends: int | list[int] | None, vocab: int
) -> tuple[Bpe, tuple[int, ...]]:
    """The vocabulary of tokenizer.json, and the ids that it puts before a text."""
    from tokenizers import Tokenizer as Theirs

    content = _json(path, None)
    model, name = content['model'], path.name
    if model.get('type') != 'BPE' or 'ByteLevel' not in json.dumps(content['pre_tokenizer']):
        raise UserError(f'{name} is no byte-level BPE: give the tokenizer.model of SentencePiece')
    if content.get('normalizer'):
        raise UserError(f'{name}: a normalizer, {content["normalizer"]["type"]}, is not supported')
    if '"add_prefix_space": true' in json.dumps(content['pre_tokenizer']):
        raise UserError(f'{name}: add_prefix_space = true is not supported')
    added = content.get('added_tokens') or []
    for token in added:
        if any(token.get(flag) for flag in ('lstrip', 'rstrip', 'single_word')):
            raise UserError(
                f'{name}: {token["content"]!r} takes spaces from the text, which is not supported'
            )
    control = {token['content']: token['id'] for token in added if token['special']}
    whole = {token['content']: token['id'] for token in added if not token['special']}

    def id_of(which: str) -> int | None:
        token = settings.get(which)
        if isinstance(token, dict):
            token = token['content']
        return control.get(token)

    if ends is None:
        ends = id_of('eos_token')
    if ends is None:
        raise UserError(f'{path.parent}: neither config.json nor tokenizer_config.json names eos')
    end_ids = ends if isinstance(ends, list) else [ends]
    theirs = Theirs.from_file(str(path))
    plain, marked = (theirs.encode('a', add_special_tokens=marks).ids for marks in (False, True))
    if marked[len(marked) - len(plain) :] != plain:
        raise UserError(f'{name} puts tokens behind a text, which is not supported')
    begin = tuple(marked[: len(marked) - len(plain)])
    vocabulary = Bpe(
        model['vocab'],
        [_pair(m.split(' ') if isinstance(m, str) else m) for m in model['merges']],
        splitter=theirs.pre_tokenizer,
        control=control,
        whole=whole,
        vocab_size=vocab,
        bos_id=begin[0] if begin else id_of('bos_token'),
        eos_id=end_ids[0],
        pad_id=id_of('pad_token'),
        end_ids=end_ids,
        ignore_merges=model.get('ignore_merges', False),
    )
    return vocabulary, begin


def _json(path: Path, default: Any) -> Any:
    """The contents of `path`; `default` where there is none."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise UserError(f'{path} is no JSON ({error}): copy it again') from None
