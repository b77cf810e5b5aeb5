"""Training of a SentencePiece vocabulary that loses no text."""

import base64
import collections
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from llama_jax.errors import UserError
from llama_jax.text import tokenizer as tokenizer_lib
from llama_jax.text.sentencepiece_model import SentencePiece, bytes_tokenizer

log = logging.getLogger(__name__)

_BYTES = 256
_UNK_BOS_EOS = 3
_APPENDED = len(tokenizer_lib.CONTROL_NAMES) - 2  # bos and eos are in the model already
SMALLEST = _APPENDED + _UNK_BOS_EOS + _BYTES + 100
"""Fewest ids that are worth training."""
# Not for the trainer: NUL (it refuses the sentence), its own space and unknown marks. They are
# spelled in bytes when text is encoded.
_RESERVED = re.compile('[\x00\u2581\u2585]')
_SENTENCE_CHARACTERS = 2000
_COVERAGE = 0.9995
_SILENT_SECONDS = 1.5

# SentencePiece hears no signal while it trains: it does so in a process that can be killed, and
# that goes with its parent, however that ended. It is given the settings on a line, and then each
# sentence; it gives the model, or what was wrong with them.
_CHILD = """
import base64, ctypes, io, json, os, signal, sys
import sentencepiece
signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
lines = iter(sys.stdin.buffer)
settings = json.loads(next(lines))
model = io.BytesIO()
try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(json.loads, lines), model_writer=model, **settings
    )
except RuntimeError as error:
    print(json.dumps({'error': str(error)}))
else:
    print(json.dumps({'model': base64.b64encode(model.getvalue()).decode()}))
"""


def train(
    texts: Iterable[str], *, vocab: int, kind: Literal['bpe', 'unigram']
) -> tokenizer_lib.Tokenizer:
    """A tokenizer of `vocab` ids, control tokens included, learnt from `texts`; of fewer where they
    have not as many words, which is logged.

    Byte fallback, no normalisation, no dummy prefix, digits one by one, and pieces that may hold
    runs of spaces (indentation). Raises UserError where there is no text, or a `vocab` below
    SMALLEST.
    """
    if vocab < SMALLEST:
        raise UserError(f'a vocabulary of {vocab} is too small: the least is {SMALLEST}')
    size = vocab - _APPENDED
    room = size - _BYTES - _UNK_BOS_EOS
    sentences = list(_sentences(texts))
    if not sentences:
        raise UserError('no text to train a tokenizer on: give a corpus that is not empty')
    sentences = _without_rare_characters([s for s in sentences if s], most=room // 2)
    if not sentences:  # only what is spelled in bytes anyway
        return bytes_tokenizer()
    if not any(' ' in sentence for sentence in sentences):
        # A space needs a piece: in bytes it would be spelled, and come back, as SentencePiece's
        # mark for it. Chinese text may be without one.
        sentences.append(f'{sentences[0][:1]} ')
    settings: dict[str, Any] = dict(
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
    what = f'{kind} vocabulary of {vocab:,} from {sum(map(len, sentences)) / 1e6:.1f} M characters'
    found = _trained(sentences, settings, what)
    if 'Vocabulary size too high' in found.get('error', ''):
        found = _trained(sentences, {**settings, 'hard_vocab_limit': False}, what)
    if 'error' in found:
        raise UserError(
            f'SentencePiece cannot learn a {what} ({found["error"]}): give more or other text, or '
            '--data.tokenizer.kind bytes'
        )
    tokenizer = SentencePiece(base64.b64decode(found['model'])).extended()
    if tokenizer.vocab_size < vocab:
        log.info(
            'the text has no more words: its vocabulary has %d ids, not %d',
            *(tokenizer.vocab_size, vocab),
        )
    return tokenizer


def _trained(sentences: list[str], settings: dict[str, Any], what: str) -> dict[str, str]:
    """{'model': base64} or {'error': text} of SentencePiece's trainer; a signal ends it."""
    lines = [json.dumps(x, ensure_ascii=False) for x in (settings, *sentences)]
    child = subprocess.Popen(
        [sys.executable, '-c', _CHILD, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding='utf-8',
        errors='replace',
    )
    with child:
        try:
            given: str | None = '\n'.join(lines)
            for timeout in (_SILENT_SECONDS, None):
                try:
                    out, errors = child.communicate(given, timeout=timeout)
                    break
                except subprocess.TimeoutExpired:
                    log.info('learning a %s', what)
                    given = None
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or ['no message']
        raise UserError(
            f'learning a {what} ended with code {child.returncode} ({last[0]}): where memory is '
            'short, lower --data.tokenizer.sample-bytes'
        )
    return json.loads(out.splitlines()[-1])


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of about 2,000 characters, cut at line ends where there are any. '' for a text of
    which nothing is for the trainer."""
    for text in texts:
        pending = ''
        for line in _RESERVED.sub('', text).splitlines(keepends=True):
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                pending += line[start : start + _SENTENCE_CHARACTERS]
                if len(pending) >= _SENTENCE_CHARACTERS:
                    yield pending
                    pending = ''
        if pending or text:
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
