"""Tasks that are made here: exact generators, no download.

Each is a data set `synthetic/NAME` to train on (data/synthetic/builder.py), a task of
`experiments.evaluate --tasks NAME` and one of a suite. What is trained on and what is asked are
apart by construction: the split of an example follows from a hash of all that there is to know of
it, and of a Python module from that of its name, as in `python_corpus`. `reversal_told` is the one
exception: it asks for what `reversal` tells in training.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama_jax.data.synthetic import algorithmic, language, python_code
from llama_jax.data.synthetic.made import Made, Synthetic

TASKS: dict[str, Synthetic] = {
    'minimal_pairs_python': Synthetic(
        'which of two functions is Python', 1 / 2, every=python_code.minimal_pairs_python
    ),
    'minimal_pairs_en': Synthetic(
        'which of two English sentences is right', 1 / 2, language.minimal_pairs_en
    ),
    'minimal_pairs_zh': Synthetic(
        'which of two Chinese sentences is right', 1 / 2, language.minimal_pairs_zh
    ),
    'cloze': Synthetic('the last word of a passage', 1 / 4, every=python_code.cloze),
    'induction': Synthetic(
        'the second token of a name that was there before', 1 / 3, algorithmic.induction
    ),
    'polynomial': Synthetic(
        'arithmetic of polynomials over F_7',
        1 / algorithmic.PRIME**algorithmic.DEGREES,
        algorithmic.polynomial,
    ),
    'star_graph': Synthetic(
        'the first step to the goal', 1 / algorithmic.DEGREE, algorithmic.star_graph
    ),
    'reversal': Synthetic('B is A, of facts told as A is B', 1 / 4, every=language.reversal),
    'reversal_told': Synthetic('A is B, of the same facts', 1 / 4, every=language.told),
    'needle': Synthetic(
        'a number that stands somewhere in a text', 1 / algorithmic.NEEDLES, algorithmic.needle
    ),
    'order_sensitivity': Synthetic(
        'which of two texts has its words in order', 1 / 2, every=python_code.order_sensitivity
    ),
    'same_function': Synthetic(
        'whether two expressions are the same function', 1 / 2, algorithmic.same_function
    ),
    'docstring_fits': Synthetic(
        'which of two docstrings a function has', 1 / 2, every=python_code.docstring_fits
    ),
}


def examples(name: str, split: str, n: int) -> Iterator[Made]:
    """Up to `n` examples of a split of a task, the same at every call."""
    return TASKS[name].examples(name, split, n)
