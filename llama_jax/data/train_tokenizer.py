"""Training of a SentencePiece vocabulary that loses no text."""

import collections
import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from llama_jax.data import tokenizer as tokenizer_lib
from llama_jax.errors import UserError

_BYTES = 256
_UNK_BOS_EOS = 3
# Not for the trainer: NUL (it refuses the sentence), its own space and unknown marks. They are
# spelled in bytes when text is encoded.
_RESERVED = re.compile('[\x00\u2581\u2585]')
_SENTENCE_CHARACTERS = 2000
_COVERAGE = 0.9995


def train(
    texts: Iterable[str], *, vocab: int, kind: tokenizer_lib.Literal['bpe', 'unigram']
) -> tokenizer_lib.Tokenizer:
    """A tokenizer of exactly `vocab` ids, control tokens included, learnt from `texts`.

    Byte fallback, no normalisation, no dummy prefix, digits one by one, and pieces that may hold
    runs of spaces (indentation). Raises UserError when the size does not suit the text.
    """
    appended = len(tokenizer_lib.CONTROL_NAMES) - 2  # bos and eos are in the model already
    size = vocab - appended
    smallest = appended + _UNK_BOS_EOS + _BYTES + 100
    if vocab < smallest:
        raise UserError(
            f'a vocabulary of {vocab} is too small: {appended + _UNK_BOS_EOS + _BYTES} ids are '
            f'control tokens and bytes; set tokenizer.vocab to {smallest} or more'
        )
    room = size - _BYTES - _UNK_BOS_EOS
    sentences = _without_rare_characters(list(_sentences(texts)), most=room // 2)
    if not sentences:
        raise UserError('no text to train a tokenizer on: give a corpus that is not empty')
    if not any(' ' in sentence for sentence in sentences):
        # A space needs a piece: in bytes it would be spelled, and come back, as SentencePiece's
        # mark for it. Chinese text may be without one.
        sentences.append(f'{sentences[0][:1]} ')
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name='identity',
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=16 * _SENTENCE_CHARACTERS,
            num_threads=1,  # unigram sums in the order of its threads: one thread is reproducible
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r'value <= (\d+)', str(error))
        remedy = f'set tokenizer.vocab to {int(most[1]) + appended} or less' if most else 'set less'
        raise UserError(
            f'cannot learn a vocabulary of {vocab} from {sum(map(len, sentences))} characters: '
            f'{remedy}, or give more text'
        ) from error
    return tokenizer_lib.Tokenizer(model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of about 2,000 characters, cut at line ends where there are any."""
    for text in texts:
        pending = ''
        for line in _RESERVED.sub('', text).splitlines(keepends=True):
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                pending += line[start : start + _SENTENCE_CHARACTERS]
                if len(pending) >= _SENTENCE_CHARACTERS:
                    yield pending
                    pending = ''
        if pending:
            yield pending


def _without_rare_characters(sentences: list[str], *, most: int) -> list[str]:
    """Cuts the sentences at all but the `most` commonest characters, and at the very rare ones.

    Chinese has more characters than a small vocabulary has room for; the rest is spelled in bytes.
    (SentencePiece would do it by `character_coverage`, but accepts no share below 98%.)
    """
    counts: collections.Counter[str] = collections.Counter()
    for sentence in sentences:
        counts.update(sentence)
    enough = _COVERAGE * counts.total()
    covered, rare = 0, []
    for rank, (character, count) in enumerate(counts.most_common()):
        if rank >= most or covered >= enough:
            rare.append(re.escape(character))
        covered += count
    if not rare:
        return sentences
    cuts = re.compile('[' + ''.join(rare) + ']+')
    return [part for sentence in sentences for part in cuts.split(sentence) if part]
