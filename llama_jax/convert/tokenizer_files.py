"""Files of a Hugging Face tokenizer, made from a vocabulary in the words of GGUF."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from llama_jax.convert.ggml_vocabulary import (
    BYTE,
    CONTROL,
    GGML,
    IGNORE_MERGES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    WHOLE,
)
from llama_jax.errors import UserError
from llama_jax.text.bpe import splitter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

_SPELT = (NORMAL, WHOLE, UNUSED)
_SPACE = '\u2581'
_NAMES = (
    *('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json'),
    *('added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja'),
    'generation_config.json',
)
"""What a model of Hugging Face may have of its tokenizer, and of how it generates."""


def copied(directory: Path) -> dict[str, bytes]:
    """Those of the directory of a model."""
    paths = (directory / name for name in _NAMES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def made(
    settings: Mapping[str, Any], *, context: int, model: bytes | None = None
) -> dict[str, bytes]:
    """Files of a tokenizer that `transformers` loads: tokenizer.json, tokenizer_config.json, the
    template of chats, and the SentencePiece `model` where there is one: a text that the two give
    other ids is told in a warning."""
    bos_id = settings.get(GGML + 'bos_token_id')
    tokens = settings[GGML + 'tokens']
    begin = bool(settings.get(GGML + 'add_bos_token')) and bos_id is not None
    names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
    config: dict[str, Any] = {
        # Reads tokenizer.json as it is: LlamaTokenizer would put another together.
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'add_bos_token': begin,
        'add_eos_token': False,
        'clean_up_tokenization_spaces': False,
        'model_max_length': context,
    }
    for theirs, name in names.items():
        i = settings.get(f'{GGML}{name}_token_id')
        if i is not None and i < len(tokens):
            config[f'{theirs}_token'] = tokens[i]
    tokenizer = of_settings(settings)
    if begin:
        from tokenizers.processors import TemplateProcessing

        bos = tokens[bos_id]
        tokenizer.post_processor = TemplateProcessing(
            single=f'{bos} $A', pair=f'{bos} $A {bos}:1 $B:1', special_tokens=[(bos, bos_id)]
        )
    files = {
        'tokenizer.json': tokenizer.to_str(pretty=True).encode(),
        'tokenizer_config.json': (json.dumps(config, indent=2, ensure_ascii=False) + '\n').encode(),
    }
    template = settings.get('tokenizer.chat_template')
    if template:
        files['chat_template.jinja'] = template.encode()
    if model is not None:
        files['tokenizer.model'] = model
        other = difference(tokenizer, model)
        if other is not None:
            log.warning(
                'tokenizer.json gives %r other tokens than the tokenizer of the model: libraries '
                'break ties between equally likely pieces in ways of their own',
                other,
            )
    return files


def of_settings(settings: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of the library `tokenizers` that gives the ids of the vocabulary in `settings`.

    Control tokens that a text spells become these tokens, as is usual there.
    """
    from tokenizers import AddedToken, Tokenizer

    tokens = settings[GGML + 'tokens']
    kinds = settings.get(GGML + 'token_type') or [NORMAL] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise UserError(f'the vocabulary has the token {twice!r} twice: it cannot be exported')
    kind = settings[GGML + 'model']
    if kind == 'gpt2':
        tokenizer = _byte_level(ids, settings)
    elif kind == 'llama':
        tokenizer = _bpe(ids, settings[GGML + 'scores'], kinds)
    elif kind == 't5':
        from tokenizers.models import Unigram

        scores = settings[GGML + 'scores']
        least = min(scores) - 1e6  # for what no text may spell
        pieces = [
            (token, score if kinds[i] in _SPELT else least)
            for i, (token, score) in enumerate(zip(tokens, scores, strict=True))
        ]
        unknown = settings[GGML + 'unknown_token_id']
        tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown, byte_fallback=True))
    else:
        raise UserError(f'a vocabulary of kind {kind!r} cannot be exported: gpt2 and llama can')
    if kind != 'gpt2':
        _spaces(tokenizer, before=settings.get(GGML + 'add_space_prefix', True))
    # A token of spaces is found in the text only once that is written as the vocabulary has it.
    whole = [
        AddedToken(token, special=False, normalized=_SPACE in token)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == WHOLE
    ]
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_tokens(whole)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def _byte_level(ids: Mapping[str, int], settings: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    pre = settings[GGML + 'pre']
    merges = [tuple(merge.split(' ')) for merge in settings[GGML + 'merges']]
    tokenizer = Tokenizer(BPE(dict(ids), merges, ignore_merges=pre in IGNORE_MERGES))
    tokenizer.pre_tokenizer = splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(ids: Mapping[str, int], scores: list[float], kinds: list[int]) -> Tokenizer:
    """SentencePiece merges to the piece of the highest score, whichever two parts it is made of."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    merges = []
    for piece, i in ids.items():
        if kinds[i] not in _SPELT:
            continue
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is None or right is None:
                continue
            if kinds[left] in _SPELT and kinds[right] in _SPELT:
                merges.append((-scores[i], i, left, right, (piece[:cut], piece[cut:])))
    merges.sort()
    unknown = next((token for token, i in ids.items() if kinds[i] == UNKNOWN), None)
    pairs = [pair for *_, pair in merges]
    return Tokenizer(
        BPE(dict(ids), pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
    )


def _spaces(tokenizer: Tokenizer, *, before: bool) -> None:
    """Spaces as SentencePiece writes them; `before`: one is put before every text."""
    from tokenizers import decoders, normalizers

    written: Any = normalizers.Replace(' ', _SPACE)
    parts: list[Any] = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if before:
        written = normalizers.Sequence([normalizers.Prepend(_SPACE), written])
        parts.append(decoders.Strip(' ', 1, 0))
    tokenizer.normalizer = written
    tokenizer.decoder = decoders.Sequence(parts)


def difference(tokenizer: Tokenizer, model: bytes) -> str | None:
    """A text that `tokenizer` gives other ids than the SentencePiece `model`, of many that were
    tried; None where there is none."""
    theirs = SentencePieceProcessor(model_proto=model)
    for text in _samples(theirs):
        if tokenizer.encode(text, add_special_tokens=False).ids != theirs.encode(text):
            return text
    return None


def _samples(processor: SentencePieceProcessor) -> Iterator[str]:
    """Every piece beside its neighbours, runs of one piece, and scripts that it may not know."""
    normal = [
        processor.id_to_piece(i).replace(_SPACE, ' ')
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    yield from ('', ' ', '  a  b', '\n\t\u4e2d\u6587 \U0001f600\u0301', '\x00\x7f\ufffd')
    for i in range(0, len(normal), 64):
        some = normal[i : i + 64]
        yield ''.join(some)
        yield ''.join(reversed(some))
    for piece in normal[:: max(1, len(normal) // 256)]:
        yield piece * 7
