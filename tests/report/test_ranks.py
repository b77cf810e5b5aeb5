"""Ranks during training."""

import json

import pytest

from llama_jax.report.grid import read_grid
from llama_jax.report.pictures import sections
from tests.report import compared


@pytest.fixture
def three(tmp_path):
    return compared.write(tmp_path / 'three', arms=compared.THREE)


def test_ranks_are_by_the_mean_of_seeds_the_best_above(three):
    grid = read_grid(three)
    (picture,) = [
        p for *_, found in sections(grid) for p in found if p.name == 'ranks-recall-span-1'
    ]
    found = [dict(curve.points) for curve in picture.curves]
    lines = [[{x['tokens']: x for x in run.records.light} for run in a.runs] for a in grid.arms]
    for x in found[0]:
        mean = [sum(run[x]['recall_span_1'] for run in runs) / len(runs) for runs in lines]
        places = [sorted(mean, reverse=True).index(value) for value in mean]
        assert [points[x] for points in found] == places
    assert picture.rows == ['1', '2', '3'] and len(found[0]) > 1


def test_ranks_by_likelihood_are_of_exact_ones(three):
    """Two of three arms have it; a bound is no figure to rank by."""
    for arm, bits, kind in (
        ('causal', 2.0, {}),
        ('masked', 1.0, {}),
        ('contrastive', 0.5, 'bound'),
    ):
        for seed in (0, 1):
            path = three / f'{arm}/seed-{seed}/metrics.jsonl'
            told = {'likelihood': kind} if kind else {}
            lines = [
                {'kind': 'validation', 'step': i, 'tokens': i, 'bits_per_byte': bits, **told}
                for i in (100, 200)
            ]
            path.write_text(''.join(json.dumps(line) + '\n' for line in lines), 'utf-8')

    def ranks():
        every = [p for *_, found in sections(read_grid(three)) for p in found]
        return [p for p in every if p.name == 'ranks-bits-per-byte']

    (picture,) = ranks()
    assert [dict(c.points) for c in picture.curves] == [{100: 1, 200: 1}, {100: 0, 200: 0}, {}]
    # Where arms differ in steps they are ranked where all have been measured.
    for seed in (0, 1):
        path = three / f'masked/seed-{seed}/metrics.jsonl'
        path.write_text(path.read_text().replace('"tokens": 200', '"tokens": 220'))
    (picture,) = ranks()
    assert [dict(c.points) for c in picture.curves] == [{100: 1}, {100: 0}, {}]
    for seed in (0, 1):
        (three / f'masked/seed-{seed}/metrics.jsonl').write_text('')
    assert ranks() == []  # one arm has no rank
