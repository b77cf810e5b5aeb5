"""The table of docs/evaluation.md says what each objective answers."""

import re
from pathlib import Path

import pytest

from llama_jax.objectives import of_text

PAGE = Path(__file__).parents[2] / 'docs' / 'evaluation.md'
COLUMNS = ['likelihood', 'suffix given the first half', 'middle span', 'infill']


def rows():
    """Objective's name -> its four cells."""
    lines = PAGE.read_text(encoding='utf-8').splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('| `--objective` |'))
    assert cells(lines[start])[1:] == COLUMNS
    found = {}
    for line in lines[start + 2 :]:
        if not line:
            return found
        names, *answers = cells(line)
        found |= dict.fromkeys(re.findall('`(.*?)`', names), answers)
    raise AssertionError('the table has no end')


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_it_has_no_objective_that_is_not_there():
    assert rows().keys() <= of_text().keys()


@pytest.mark.parametrize('name', rows())
def test_a_row_tells_the_kind_of_each_likelihood(name):
    *likelihoods, infill = rows()[name]
    reading = of_text()[name].reading
    kinds = [q.kind if q else 'n/a' for q in (reading.whole, reading.rest, reading.middle)]
    assert [re.match(r'[*]*([a-z/]+)', cell)[1] for cell in likelihoods] == kinds
    ends = {
        'mark': 'until a control token',
        'suffix': 'until the suffix begins',
        'length': 'masks filled, most certain first',
    }
    wanted = ends[reading.infill.ends] if reading.infill else 'n/a'
    assert infill.partition(':')[0] == wanted
