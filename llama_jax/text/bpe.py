"""Byte-level byte-pair encoding: the vocabularies of GPT-2, Llama 3 and SmolLM2.

Text is split into words, their UTF-8 bytes are merged pair by pair (Sennrich et al. 2016, on bytes
as in Radford et al. 2019). Files spell each byte as one printable character. Needs the extra
`weights` (`tokenizers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.long_text import words_in_parts
from llama_jax.text.tokenizer import inside, refuse_surrogates

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


def _alphabet() -> dict[str, int]:
    """Character -> byte. Bytes that print stand for themselves, the rest follow from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _alphabet()
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
SPLITS = ('gpt-2', 'smollm', 'llama-bpe')
"""Ways to split text into words, by their names in GGUF files."""


def splitter(name: str) -> PreTokenizer:
    """One of SPLITS: GPT-2's words; the same after every digit is set apart; Llama 3's."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name == 'gpt-2':
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if name == 'smollm':
        return Sequence([Digits(individual_digits=True), splitter('gpt-2')])
    if name == 'llama-bpe':
        words = Split(Regex(_LLAMA3_WORDS), behavior='isolated')
        return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UserError(
        f'text is split by {name!r} in this vocabulary, which is not supported: {", ".join(SPLITS)}'
    )


class Bpe:
    """Text to token ids and back; `text.vocabulary.Vocabulary`.

    Attributes:
        vocab_size: number of ids, those without a token included.
        bos_id (None where there is none), eos_id, pad_id: ids of control tokens.
        end_ids: the ids that end a text.
        control: name to id of the control tokens. Text that spells a name is text.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        splitter: PreTokenizer,
        control: Mapping[str, int],
        whole: Mapping[str, int],
        vocab_size: int,
        bos_id: int | None,
        eos_id: int,
        pad_id: int | None = None,
        end_ids: Sequence[int] = (),
        ignore_merges: bool = False,
    ) -> None:
        """A vocabulary as files hold it.

        Args:
          tokens: id of each token that bytes are merged to, one character of BYTES per byte; files
            name those of the other kinds here as well, which are left out.
          merges: pairs of tokens, the first is merged first.
          splitter: sets words apart and spells them in BYTES.
          control: id of each control token by name.
          whole: id of each token that text may spell and that is found before all others.
          vocab_size: rows of the embedding; ids without a token have no text.
          pad_id: eos where there is none.
          end_ids: those that end a text besides eos.
          ignore_merges: a word that is a token is that token, whatever the merges say.

        Raises UserError for a vocabulary that is not byte-level, or not whole.
        """
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        # A word that is a control token's name must not be merged to it.
        tokens = {t: i for t, i in tokens.items() if t not in control and t not in whole}
        self._pieces = [b''] * vocab_size
        for spell, kind in ((_bytes_of, tokens), (str.encode, whole)):
            for token, i in zip(kind, inside(kind.values(), vocab_size), strict=True):
                self._pieces[i] = spell(token)
        inside(control.values(), vocab_size)
        self._names = {i: name for name, i in control.items()}
        self._unspelt = frozenset(b for char, b in BYTES.items() if char not in tokens)
        try:
            model = BPE({**tokens, **whole}, list(merges), ignore_merges=ignore_merges)
        except Exception as error:  # tokenizers raises no class of its own
            raise UserError(f'the merges do not fit the vocabulary: {error}') from None
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = splitter
        self._tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
        self._spaced = any(re.search(r'\S ', token) for token in whole)
        self.control = dict(control)
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.end_ids = tuple(dict.fromkeys((eos_id, *end_ids)))
        ids = [i for i in (bos_id, self.pad_id, *self.end_ids) if i is not None]
        inside(ids, vocab_size)

    def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Token ids of `text`, int32 [n]; no bos or eos, and never a control token.

        `continues` changes nothing: no space is ever put before a text. Raises UserError for a lone
        surrogate and for a character whose bytes the vocabulary lacks (control characters that its
        training text did not hold).
        """
        refuse_surrogates(text)
        if self._unspelt and not self._unspelt.isdisjoint(text.encode()):
            i, char = next(
                (i, char)
                for i, char in enumerate(text)
                if not self._unspelt.isdisjoint(char.encode())
            )
            raise UserError(
                f'this vocabulary has no token for the character U+{ord(char):04X} at {i}: '
                'leave it out'
            )
        parts = [text] if self._spaced else words_in_parts(text)
        ids = [self._tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
        return np.concatenate([np.array(part, np.int32) for part in ids])

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`. Control tokens are dropped, or spelled by name when `show_control`.

        Bytes that are no UTF-8 (a model may write any) become U+FFFD. Raises UserError for an id
        outside the vocabulary.
        """
        ids = inside(ids, self.vocab_size)
        if show_control:
            data = b''.join(self._pieces[i] or self._names.get(i, '').encode() for i in ids)
        else:
            data = b''.join([self._pieces[i] for i in ids])
        return data.decode('utf-8', errors='replace')

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that `token` stands for, perhaps a part of a character; b'' if none."""
        return self._pieces[inside([token], self.vocab_size)[0]]


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(map(BYTES.__getitem__, token))
    except KeyError:
        raise UserError(
            f'token {token!r} is not spelled in bytes: only byte-level vocabularies are supported'
        ) from None
