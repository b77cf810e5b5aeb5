"""A long text in windows, in which each token is scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama_jax.generate.continuations import Request


def windows(
    ids: Sequence[int], prefix: Sequence[int], *, window: int, stride: int = 0
) -> Iterator[Request]:
    """A whole text as requests in which each token is scored once.

    The first window holds `window` tokens. Each further one scores the next `stride` tokens, of
    which the last is not read, after as many before them as it has room for; the last one scores
    what is left, with the whole window read. Without a stride it is the window, as in lm-eval.
    """
    if not len(ids):
        return
    stride = stride or window
    prefix = list(prefix)[-1:] if len(prefix) > window else list(prefix)
    first = window - len(prefix) + 1
    whole = [*prefix, *ids]
    yield Request(whole[: len(prefix)], whole[len(prefix) : len(prefix) + first])
    done = len(prefix) + first
    while done < len(whole):
        end = min(done + stride, len(whole))
        begin = max(end - 1 - window, 0)
        yield Request(whole[begin:done], whole[done:end])
        done = end
