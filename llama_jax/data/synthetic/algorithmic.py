"""Tasks with an exact answer that follows from the prompt alone."""

from __future__ import annotations

import numpy as np

from llama_jax.data.synthetic.made import Made, new_names, one, shuffled

_FILLER = (
    *('It rained in the morning.', 'The shop was closed.', 'Nobody said a word.'),
    *('The train was late again.', 'There was tea on the table.', 'A dog barked outside.'),
    *('The letter came on Monday.', 'They walked home slowly.', 'The lamp went out.'),
    *('Someone opened a window.', 'The street was quiet.', 'Bread was cheap that year.'),
)


def filler(rng: np.random.Generator, n: int) -> list[str]:
    return [one(rng, _FILLER) for _ in range(n)]


def induction(rng: np.random.Generator) -> Made:
    """The second token of a name that was there before (Olsson et al. 2022; Gloeckle et al. 2024,
    section 4.1): of three names in the text, the one whose first name is said again."""
    first = new_names(rng, 6)
    names = list(zip(first[:3], first[3:], strict=True))
    lines = [f'{a} {b} lives here.' for a, b in names]
    asked, answer = names[int(rng.integers(3))]
    between = filler(rng, 3)
    story = [line for pair in zip(lines, between, strict=True) for line in pair]
    return Made(
        key=' '.join(sorted(f'{a} {b}' for a, b in names)) + asked,
        prompt=' '.join([*story, f'Today we meet {asked}']),
        answer=f' {answer}',
        choices=shuffled(rng, [f' {b}' for _, b in names]),
        after='.\n',
    )


NEEDLES = 4


def needle(rng: np.random.Generator) -> Made:
    """A number that stands somewhere in a long text, among others like it."""
    names = new_names(rng, NEEDLES)
    codes = [str(1000 + x) for x in rng.choice(9000, NEEDLES, replace=False)]
    lines = filler(rng, 20)
    for name, code in zip(names, codes, strict=True):
        lines.insert(int(rng.integers(len(lines) + 1)), f'The code of {name} is {code}.')
    asked = int(rng.integers(NEEDLES))
    return Made(
        key=' '.join(sorted(f'{a}{b}' for a, b in zip(names, codes, strict=True))) + names[asked],
        prompt=' '.join([*lines, f'What is the code of {names[asked]}? The code of it is']),
        answer=f' {codes[asked]}',
        choices=shuffled(rng, [f' {code}' for code in codes]),
        after='.\n',
    )


DEGREE, PATH, NODES = 3, 4, 50


def star_graph(rng: np.random.Generator) -> Made:
    """Which of the paths that leave the start leads to the goal (Bachmann & Nagarajan 2024,
    section 3; 2403.06963): edges, start and goal, and the first step is asked for, the only one
    that does not follow from the step before."""
    start, *others = rng.permutation(NODES)[: 1 + DEGREE * (PATH - 1)].tolist()
    arms = [[start, *others[i::DEGREE]] for i in range(DEGREE)]
    edges = [pair for arm in arms for pair in zip(arm, arm[1:], strict=False)]
    path = arms[0]
    shown = '|'.join(f'{a},{b}' for a, b in (edges[i] for i in rng.permutation(len(edges))))
    return Made(
        key=f'{sorted(edges)}{path[-1]}',
        prompt=f'{shown}/{start},{path[-1]}={start},',
        # With what ends it, or 4 would be no less likely than 44.
        answer=f'{path[1]},',
        choices=shuffled(rng, [f'{arm[1]},' for arm in arms]),
        after=','.join(map(str, path[2:])) + '\n',
    )


PRIME, DEGREES = 7, 5
Polynomial = tuple[int, ...]


def polynomial(rng: np.random.Generator) -> Made:
    """Arithmetic of polynomials over F_7 modulo X^5 (Gloeckle et al. 2024, section 4.2): an
    expression of one to three operations, and the five coefficients, that of X^0 first."""
    values = [_drawn(rng)]
    text = _spelled(values[0])
    value = values[0]
    for _ in range(int(rng.integers(1, 4))):
        other, operation = _drawn(rng), one(rng, ['+', '*', '@'])
        text = f'({text}){operation}{_spelled(other)}'
        value = {'+': _plus, '*': _times, '@': _after}[operation](value, other)
    return Made(key=text, prompt=f'{text}=', answer=_spelled(value), after='\n')


def _drawn(rng: np.random.Generator) -> Polynomial:
    return tuple(rng.integers(PRIME, size=DEGREES).tolist())


def _spelled(x: Polynomial) -> str:
    return ''.join(map(str, x))


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple((x + y) % PRIME for x, y in zip(a, b, strict=True))


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % PRIME for k in range(DEGREES))


def _after(a: Polynomial, b: Polynomial) -> Polynomial:
    """a(b(X)), by Horner's scheme."""
    found: Polynomial = (0,) * DEGREES
    for coefficient in reversed(a):
        found = _plus(_times(found, b), (coefficient, *(0,) * (DEGREES - 1)))
    return found


def same_function(rng: np.random.Generator) -> Made:
    """Whether two expressions of x are the same function: a product of two linear terms and its
    expansion, or one with another coefficient."""
    a, b, c, d = (int(x) for x in rng.integers(1, 20, size=4))
    terms = [a * c, a * d + b * c, b * d]
    same = bool(rng.integers(2))
    if not same:
        which = int(rng.integers(3))
        # None may become 0 or less: no product has such a term.
        terms[which] += int(rng.choice([-2, -1, 1, 2] if terms[which] > 2 else [1, 2]))
    other = ' + '.join(
        f'{n}{of}' for n, of in ((terms[i], ('*x*x', '*x', '')[i]) for i in rng.permutation(3))
    )
    one_way = f'({a}*x + {b}) * ({c}*x + {d})'
    pair = [one_way, other] if rng.integers(2) else [other, one_way]
    return Made(
        # Of both answers of a product, so that none tells of the other.
        key=f'{sorted([(a, b), (c, d)])}',
        prompt=f'def f(x): return {pair[0]}\ndef g(x): return {pair[1]}\n# f(x) == g(x):',
        answer=f' {same}',
        choices=(' False', ' True'),
        after='\n',
    )
