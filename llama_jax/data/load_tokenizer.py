"""The tokenizer of a configuration: read from its file, or learnt from a sample of the corpus."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator

import grain
import numpy as np
import sentencepiece

from llama_jax.data import prepare
from llama_jax.data.config import DataConfig, cache_dir
from llama_jax.data.documents import Documents
from llama_jax.data.record import Record, Text
from llama_jax.data.sources import Corpus, open_sources
from llama_jax.data.train_tokenizer import SMALLEST, train
from llama_jax.errors import UserError
from llama_jax.text.files import tokenizer_of
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import Tokenizer, TokenizerConfig

log = logging.getLogger(__name__)

PIECE = 16_384
"""Characters of a document that a sample takes or leaves together."""


def load_tokenizer(config: DataConfig, reads: type[Record] = Text) -> Tokenizer:
    """The tokenizer of the configuration: loaded from its file, or trained once and cached.

    A trained one is learnt from a sample of the training split, mixed as in training, and found
    again by the content of the sample. Several processes may ask at once: one of them trains.
    `reads` is what the objective reads: of records it is learnt from all that is said in them.
    """
    recipe = config.tokenizer
    known = _without_corpus(recipe)
    if known is not None:
        return known
    assert recipe.kind != 'bytes'  # these are known
    texts = list(sample(open_sources(config, 'train', reads), recipe.sample_bytes))
    digest = hashlib.sha256(repr((recipe, sentencepiece.__version__)).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = cache_dir() / 'tokenizers' / f'{digest.hexdigest()[:32]}.model'
    if not path.exists():
        with prepare.locked(path.with_suffix('.lock')):
            if not path.exists():
                train(texts, vocab=recipe.vocab, kind=recipe.kind).save(path)
    try:
        return tokenizer_of(path)
    except UserError as error:
        raise UserError(
            f'the tokenizer that was trained before is damaged ({error.__cause__ or error}): '
            f'delete {path}; the same command trains it anew'
        ) from error


def for_model(tokenizer: Tokenizer, *, ids: int, marks: bool) -> Tokenizer:
    """The tokenizer for a model of so many ids (0: as many as it needs): narrower where the model
    has no rows for control tokens of ours, and an objective without `marks` needs none."""
    narrow = None
    if not marks and 0 < ids < tokenizer.vocab_size:
        narrow = tokenizer.narrowed(ids)
    return tokenizer if narrow is None else narrow


def check(recipe: TokenizerConfig, *, rows: int, marks: bool = True) -> None:
    """Raise UserError for a tokenizer that cannot be, or that is too large for a model of `rows`
    embeddings (0: as many as the tokenizer needs); see `for_model`. Touches no corpus."""
    known = _without_corpus(recipe)
    if known is not None:
        check_rows(for_model(known, ids=rows, marks=marks).vocab_size, rows=rows)
    elif 0 < rows < recipe.vocab:
        raise UserError(
            f'data.tokenizer.vocab is {recipe.vocab}, but the model has {rows} ids: set '
            f'--model.vocab {recipe.vocab}, or 0 to leave it to the tokenizer'
        )


def check_rows(vocab_size: int, *, rows: int) -> None:
    """Raise UserError for a tokenizer with more ids than the model has embeddings; see `check`."""
    if 0 < rows < vocab_size:
        raise UserError(
            f'the model has a vocabulary of {rows}, the tokenizer one of {vocab_size}: set '
            f'--model.vocab {vocab_size}, or 0 to leave it to the tokenizer'
        )


def _without_corpus(recipe: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer, where no text is needed for it. Raises UserError for a bad recipe."""
    if recipe.path is not None:
        if recipe.kind == 'bytes':
            raise UserError(
                f'data.tokenizer.path {recipe.path} and kind bytes: leave one of them out'
            )
        tokenizer = tokenizer_of(recipe.path)
        warn_of_losses(recipe.path, tokenizer.losses)
        return tokenizer
    if recipe.kind == 'bytes':
        return bytes_tokenizer()
    if recipe.vocab < SMALLEST:
        raise UserError(
            f'data.tokenizer.vocab {recipe.vocab} is too small: control tokens and bytes alone are '
            f'{SMALLEST - 100} ids; set {SMALLEST} or more, or --data.tokenizer.kind bytes'
        )
    if recipe.sample_bytes < 1:
        raise UserError(f'data.tokenizer.sample_bytes is {recipe.sample_bytes}: set 1 or more')
    return None


@functools.cache  # once, however often the tokenizer is asked for
def warn_of_losses(name: str, losses: tuple[str, ...]) -> None:
    """Says what a tokenizer makes of text that it cannot give back, where it does."""
    if not losses:
        return
    log.warning(
        'the tokenizer %s loses text: %s. Bits per byte are of the text as it comes back, and '
        'cannot be compared with those of other tokenizers',
        *(name, '; '.join(losses)),
    )


def sample(corpus: Corpus, most_bytes: int) -> Iterator[str]:
    """Text of the corpus in random order, up to `most_bytes` of UTF-8 in all, of which every source
    has the share of its weight for as long as it has any left."""
    walks = {i: _pieces(source, i, most_bytes) for i, source in enumerate(corpus.sources)}
    taken = dict.fromkeys(walks, 0)
    while walks and most_bytes > 0:
        behind = min(walks, key=lambda i: taken[i] / corpus.weights[i])
        text = next(walks[behind], None)
        if text is None:
            del walks[behind]
            continue
        data = text.encode()[:most_bytes]
        taken[behind] += len(data)
        most_bytes -= len(data)
        yield data.decode('utf-8', 'ignore')


def _pieces(source: Documents, number: int, most_bytes: int) -> Iterator[str]:
    """Every piece of every document once, at random: a first few of each document, then twice as
    many of each that has as many, and so on. One long document among many counts no more than
    others do at first, and it is read a few times and not once for each of its pieces.
    """
    order = grain.MapDataset.range(len(source)).shuffle(seed=number)
    few = 1 + most_bytes // PIECE // len(source)
    first = 0
    more = True
    while more:
        more = False
        for i in range(len(source)):
            record = int(order[i])
            text = source[record]
            n = -(-len(text) // PIECE)
            if first >= n:
                continue
            more = more or n > first + few
            mixed = np.random.default_rng([number, record]).permutation(n)
            for place in mixed[first : first + few]:
                yield text[place * PIECE : (place + 1) * PIECE]
        first, few = first + few, 2 * few
