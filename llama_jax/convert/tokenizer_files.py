"""Files of a tokenizer that `transformers` loads, with the ids that it has here."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.text.sentencepiece_model import SentencePiece, parse
from llama_jax.text.special import NOTHING, Special
from llama_jax.text.template_files import NAMED_TEMPLATES
from llama_jax.text.tokenizer import SPACE, Tokenizer
from llama_jax.text.vocabulary import encode_spelled

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Theirs

log = logging.getLogger(__name__)

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SPELT = (_Piece.NORMAL, _Piece.USER_DEFINED, _Piece.UNUSED)
_NAMES = (
    *('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json'),
    *('added_tokens.json', 'vocab.json', 'merges.txt', 'tekken.json', 'chat_template.jinja'),
    *('chat_template.json', 'generation_config.json'),
)
"""What a model of Hugging Face may have of its tokenizer, and of how it generates."""


def copied(directory: Path) -> dict[str, bytes]:
    """Those of the directory of a model."""
    named = (directory / NAMED_TEMPLATES).glob('*.jinja')
    paths = [*(directory / name for name in _NAMES), *sorted(named)]
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in paths
        if path.is_file()
    }


def made(
    tokenizer: Tokenizer,
    *,
    begin: bool,
    context: int,
    template: str | None,
    named: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, the `template` of chats and those that are `named` for
    a purpose, and the model where it is one of SentencePiece. `begin`: bos stands before every
    text. A text that the library gives other ids is told in a warning."""
    files = {}
    content = _content(tokenizer)
    if isinstance(tokenizer, SentencePiece):
        theirs = of_sentencepiece(content, tokenizer.special)
        files[tokenizer.FILE] = content

        def encode(text: str) -> list[int]:
            return list(theirs.encode(text, add_special_tokens=False).ids)

        other = difference(encode, content)
        for name in tokenizer.names.values():  # by other names it has them for us alone
            for text in (f'{name}a', f'{name} a', f'a {name}\n{name}'):
                if other is None and encode(text) != encode_spelled(tokenizer, text):
                    other = text
        if other is not None:
            log.warning(
                'tokenizer.json gives %.60r other tokens than the model: libraries differ in ties '
                'between equally likely pieces, in spaces behind added tokens, and in those that a '
                'text begins with',
                other,
            )
    else:
        from tokenizers import Tokenizer as Library

        theirs = Library.from_str(content.decode())
    special = {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}
    tokens = {
        f'{which}_token': theirs.id_to_token(i) or tokenizer.names.get(i)
        for which, i in special.items()
        if i is not None
    }
    begin = begin and tokenizer.bos_id is not None
    plain, whole = (theirs.encode('a', add_special_tokens=x).ids for x in (False, True))
    if whole != [special['bos']] * begin + plain:  # or an end stands behind every text
        theirs.post_processor = _before(tokens['bos_token'], special['bos']) if begin else _none()
    config: dict[str, Any] = {
        # Reads tokenizer.json as it is: LlamaTokenizer would put another together.
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'add_bos_token': begin,
        'add_eos_token': False,
        'clean_up_tokenization_spaces': False,
        'model_max_length': context,
        **tokens,
        **tokenizer.settings().get('tokenizer_config.json', {}),
    }
    unknown = getattr(theirs.model, 'unk_token', None)
    if unknown:
        config['unk_token'] = unknown
    files['tokenizer.json'] = theirs.to_str(pretty=True).encode()
    files['tokenizer_config.json'] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    if template:
        files['chat_template.jinja'] = template.encode()
    for name, one in named.items():
        if set('/\\\0') & set(name):
            log.warning('the template %.60r is left out: no file can have its name', name)
        else:
            files[f'{NAMED_TEMPLATES}/{name}.jinja'] = one.encode()
    return files


def _content(tokenizer: Tokenizer) -> bytes:
    """Its file, without the tokens that it is narrower by: a model has no rows for them."""
    n = tokenizer.vocab_size
    if tokenizer.whole is tokenizer:
        return tokenizer.content
    if isinstance(tokenizer, SentencePiece):
        proto = parse(tokenizer.content)
        del proto.pieces[n:]
        spec = proto.trainer_spec
        spec.vocab_size = n
        for name in ('bos_id', 'pad_id'):
            if getattr(spec, name) >= n:
                setattr(spec, name, -1)
        return proto.SerializeToString()
    content = json.loads(tokenizer.content)
    content['added_tokens'] = [token for token in content['added_tokens'] if token['id'] < n]
    return json.dumps(content, ensure_ascii=False).encode()


def _before(token: Any, i: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f'{token} $A', pair=f'{token} $A {token}:1 $B:1', special_tokens=[(token, i)]
    )


def _none() -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single='$A', pair='$A $B:1', special_tokens=[])


def of_sentencepiece(model: bytes, special: Special = NOTHING) -> Theirs:
    """A tokenizer of the library `tokenizers` that gives the ids of a SentencePiece model; control
    tokens that a text spells become these tokens, as is usual there. `special` says which spaces
    stand beside them.

    Raises UserError for a model that changes text before it encodes it.
    """
    from tokenizers import AddedToken

    proto = parse(model)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise UserError(
            'the tokenizer normalises text (another Unicode form, or fewer spaces), which cannot '
            'be exported: train one with normalization_rule_name=identity and '
            'remove_extra_whitespaces=False'
        )
    if spec.model_type not in (spec.BPE, spec.UNIGRAM) or spec.treat_whitespace_as_suffix:
        raise UserError(
            'the tokenizer is no SentencePiece model of type bpe or unigram with spaces before '
            'words: others cannot be exported'
        )
    tokenizer = (_bpe if spec.model_type == spec.BPE else _unigram)(proto.pieces)
    _spaces(tokenizer, before=normal.add_dummy_prefix, spaced=special.spaced)
    # A token of spaces is found in the text only once that is written as the vocabulary has it.
    whole = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=SPACE in token) for token in whole]
    )
    closed = (_Piece.CONTROL, _Piece.UNKNOWN)
    control = {i: piece.piece for i, piece in enumerate(proto.pieces) if piece.type in closed}
    takes = {i: {'lstrip': left, 'rstrip': right} for i, left, right in special.takes}
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, **takes.get(i, {})) for i, token in control.items()]
    )
    return tokenizer


def _bpe(pieces: Sequence[Any]) -> Theirs:
    """SentencePiece merges to the piece of the highest score, whichever two parts it is made of."""
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    spelt = {piece.piece: i for i, piece in enumerate(pieces) if piece.type in _SPELT}
    merges = []
    for piece, i in spelt.items():
        for cut in range(1, len(piece)):
            parts = piece[:cut], piece[cut:]
            if parts[0] in spelt and parts[1] in spelt:
                merges.append((-pieces[i].score, i, *map(ids.__getitem__, parts), parts))
    merges.sort()
    unknown = next((piece.piece for piece in pieces if piece.type == _Piece.UNKNOWN), None)
    byte = any(piece.type == _Piece.BYTE for piece in pieces)
    pairs = [pair for *_, pair in merges]
    return Library(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=byte))


def _unigram(pieces: Sequence[Any]) -> Theirs:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import Unigram

    least = min(piece.score for piece in pieces) - 1e6  # for what no text may spell
    scores = [(p.piece, p.score if p.type in _SPELT else least) for p in pieces]
    unknown = next((i for i, p in enumerate(pieces) if p.type == _Piece.UNKNOWN), None)
    return Library(Unigram(scores, unk_id=unknown, byte_fallback=True))


def _spaces(tokenizer: Theirs, *, before: bool, spaced: bool) -> None:
    """Spaces as SentencePiece writes them; `before`: one is put before every text, and where they
    are `spaced` before what follows a control token as well."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    written: Any = normalizers.Replace(' ', SPACE)
    parts: list[Any] = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if before:
        if spaced:
            written = normalizers.Sequence([normalizers.Prepend(SPACE), written])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
                SPACE, prepend_scheme='first', split=False
            )
        parts.append(decoders.Strip(' ', 1, 0))
    tokenizer.normalizer = written
    tokenizer.decoder = decoders.Sequence(parts)


def difference(encode: Callable[[str], Sequence[int] | Any], model: bytes) -> str | None:
    """A text that `encode` gives other ids than the SentencePiece `model`, of many that are tried;
    None where there is none."""
    processor = SentencePieceProcessor(model_proto=model)
    for text in _samples(processor):
        if list(encode(text)) != processor.encode(text):
            return text
    return None


def _samples(processor: SentencePieceProcessor) -> Iterator[str]:
    """Every piece beside its neighbours, runs of one piece, and scripts that it may not know."""
    normal = [
        processor.id_to_piece(i).replace(SPACE, ' ')
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    yield from ('', ' ', '  a  b', '<0x41>', '\n\t\u4e2d\u6587 \U0001f600\u0301', '\x00\x7f\ufffd')
    for i in range(0, len(normal), 64):
        some = normal[i : i + 64]
        yield ''.join(some)
        yield ''.join(reversed(some))
    for piece in normal[:: max(1, len(normal) // 256)]:
        yield piece * 7
