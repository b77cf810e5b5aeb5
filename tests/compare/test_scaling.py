"""Scaling laws: data of a known law give it back, what was left out is forecast."""

import json
import math

import numpy as np
import pytest

from experiments.scaling import lines
from llama_jax.compare import scaling, scaling_report
from llama_jax.compare.scaling import Law, Runs
from llama_jax.compare.scaling_report import Point
from llama_jax.errors import UserError
from tests.report import compared

LAW = Law(1.82, math.log(482.0), math.log(2085.0), 0.348, 0.366)
"""About that of Besiroglu et al. (2024)."""


def runs(noise=0.0, seed=0, law=LAW):
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(2e9, 4e11, 4)))
    drawn = np.exp(noise * np.random.default_rng(seed).normal(size=n.size))
    return Runs(n, d, law(n, d) * drawn)


def test_data_of_a_law_give_it_back():
    found = scaling.fit(runs())
    np.testing.assert_allclose(found, LAW, rtol=0.02)
    np.testing.assert_allclose(found(*runs()[:2]), runs().loss, rtol=1e-4)


def test_one_run_that_went_wrong_hardly_counts():
    broken = runs()
    broken.loss[5] *= 1.5
    np.testing.assert_allclose(scaling.fit(broken)[3:], LAW[3:], rtol=0.05)


def test_slopes_are_those_of_the_law():
    at = np.array([[1.0, 0.5, 0.3, 0.4, 0.3]])
    _, slope_5SR = scaling._terms(at, runs())
    for i in range(5):
        step = np.zeros((1, 5))
        step[0, i] = 1e-6
        up, down = (scaling._terms(at + sign * step, runs())[0] for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2e-6, slope_5SR[i], rtol=1e-4, atol=1e-8)


def test_the_largest_run_is_forecast_within_its_interval():
    law = scaling.fitted(runs(noise=0.003), resamples=20)
    assert all(
        low <= value <= high for low, value, high in zip(law.low, LAW, law.high, strict=True)
    )
    (check,) = scaling.leave_largest_out(runs(noise=0.003), resamples=20)
    assert check.measured == runs(noise=0.003).loss[-1]
    assert abs(check.error) < 0.01 and check.low < check.forecast < check.high


def test_the_best_size_is_the_lowest_point_at_its_budget():
    budgets = np.array([1e19, 1e21])
    n, d = LAW.best(budgets)
    np.testing.assert_allclose(6 * n * d, budgets)
    for at, c in zip(n, budgets, strict=True):
        around = at * np.geomspace(0.5, 2, 41)
        assert np.argmin(LAW(around, c / 6 / around)) == 20
    # And the parabola of runs at one budget finds it.
    sizes = (n[:, None] * np.geomspace(0.5, 2, 5)).ravel()
    flops = np.repeat(budgets, 5)
    found = scaling.iso_flops(Runs(sizes, flops / 6 / sizes, LAW(sizes, flops / 6 / sizes)), flops)
    assert list(found) == budgets.tolist()
    np.testing.assert_allclose([size for size, _ in found.values()], n, rtol=0.05)
    # A budget that another has taken opens none of its own.
    near = np.array([100.0, 102, 106, 106.5, 107.3])
    sizes = np.array([1.0, 2, 1, 2, 4])
    at = Runs(sizes, near / sizes, 2 + np.log(sizes / 2) ** 2)
    assert list(scaling.iso_flops(at, near)) == [106]
    # None where the lowest point is beyond the sizes.
    beyond = sizes[3:5] * 4, flops[3:5]
    one = np.append(beyond[0], beyond[0][-1] * 2), np.append(beyond[1], 1e19)
    assert not scaling.iso_flops(
        Runs(one[0], one[1] / 6 / one[0], LAW(one[0], one[1] / 6 / one[0])), one[1]
    )


def test_the_best_arm_may_change_with_the_budget():
    slow = LAW._replace(E=1.5, log_A=math.log(900.0))
    laws, per = {'quick': LAW, 'slow': slow}, {'quick': 6.0, 'slow': 6.0}
    assert scaling.best_by_budget(laws, [1e17, 1e24], per=per) == {1e17: 'quick', 1e24: 'slow'}
    # At twice the cost a budget buys half.
    same = {'one': LAW, 'dear': LAW}
    assert scaling.best_by_budget(same, [1e20], per={'dear': 12.0, 'one': 6.0}) == {1e20: 'one'}


def test_an_arm_whose_loss_does_not_fall_with_size_is_not_ranked():
    # Less loss than the others, and no best size.
    grows = LAW._replace(log_A=math.log(0.1), alpha=-0.2)
    per = dict.fromkeys(('quick', 'slow', 'grows'), 6.0)
    laws = {'grows': grows, 'quick': LAW, 'slow': LAW._replace(log_A=math.log(900.0))}
    assert scaling.best_by_budget(laws, [1e17], per=per) == {1e17: 'quick'}
    for law in (grows, LAW._replace(beta=-0.1)):
        assert scaling.best_by_budget({'quick': LAW, 'grows': law}, [1e17], per=per) == {}
        with pytest.raises(UserError, match='has no best size'):
            law.best(1e17)


def test_what_tells_no_law_is_refused_in_one_line():
    with pytest.raises(UserError, match='16 runs of 1 sizes .* tell no law of five numbers'):
        scaling.fit(runs()._replace(parameters=np.full(16, 1e8)))
    for name in ('parameters', 'tokens'):  # of two values neither exponent is known
        few = np.sort(np.unique(getattr(runs(), name)))[:2]
        with pytest.raises(UserError, match='8 runs of .* 3 sizes and 3 numbers of tokens'):
            scaling.fit(runs().take(np.isin(getattr(runs(), name), few)))
    n = np.geomspace(1e8, 1e10, 8)
    # As many tokens per parameter: size and tokens cannot be told apart.
    with pytest.raises(UserError, match=r'tokens grow with the size \(.* 1.000\)'):
        scaling.fit(Runs(n, 20 * n, LAW(n, 20 * n)))
    iso = np.tile(n, 2)
    scaling.fit(Runs(iso, np.repeat([1e19, 1e20], 8) / iso, np.linspace(3, 2, 16)))
    # A run under another seed is no further pair.
    twice = runs().take(np.array([0, 1, 6, 10, 13] * 2))
    with pytest.raises(UserError, match='10 runs of 3 sizes .* 5 pairs of both'):
        scaling.fit(twice)
    with pytest.raises(UserError, match='5 runs of 4 sizes'):
        scaling.fit(runs().take(np.arange(5)))
    with pytest.raises(UserError, match='numbers above 0'):
        scaling.fit(runs()._replace(loss=np.full(16, np.nan)))
    with pytest.raises(UserError, match='--metric recall_span_1: a law is of what falls'):
        scaling_report.read([], 'recall_span_1')
    with pytest.raises(UserError, match='no finished run of no directory has alignment'):
        scaling_report.read([], 'alignment')


def test_finished_runs_are_read_by_what_a_law_is_of(tmp_path):
    workdir = compared.write(tmp_path / 'grid', arms=compared.THREE)
    compared.write_run(workdir / 'causal/seed-1', 'causal', 1, steps=150, evaluated=False)
    (workdir / 'causal/seed-1/evaluation.json').unlink()
    compared.set_metric(workdir, 'masked', 'bits_per_byte', [1.0, 1.1], kind='bound')
    found = scaling_report.read([workdir], 'loss')
    # A run on its way has a loss of its middle.
    assert {name: len(points) for name, points in found.items()} == {
        'CausalLM': 1,
        'MaskedLM': 2,
        'InfoNCE': 2,
    }
    of_bits = scaling_report.read([workdir], 'bits_per_byte')
    assert {name: {p.kind for p in points} for name, points in of_bits.items()} == {
        'CausalLM': {'exact'},
        'MaskedLM': {'bound'},
    }
    facts = json.loads((workdir / 'grid.json').read_text())
    arms = facts['arms']
    arms[2]['experiment']['optimizer']['class'] = 'AdamW'
    (workdir / 'grid.json').write_text(json.dumps(facts))
    assert {*scaling_report.read([workdir], 'loss')} == {
        *('CausalLM, Muon', 'MaskedLM, Muon', 'InfoNCE, AdamW')
    }
    arms[1]['objective'] = {**arms[0]['objective'], 'z_loss': 0.0}
    (workdir / 'grid.json').write_text(json.dumps(facts))
    with pytest.raises(
        UserError, match='grid/causal and .*grid/masked are both CausalLM, Muon, with .*z_loss: '
    ):
        scaling_report.read([workdir], 'loss')

    # What is counted in steps goes with the length of a run, in parts as well.
    def of(steps, begin):
        return {
            'experiment': {**arms[0]['experiment'], 'train': {'steps': steps}},
            'objective': {
                'class': 'Switch',
                'begins': [0, begin],
                'parts': [{'curriculum_steps': steps}],
            },
        }

    for one, other, same in (
        (of(40, 13), of(80, 27), True),
        (of(40, 13), of(81, 26), True),
        (of(40, 13), of(80, 33), False),
        (of(100, 50), of(100, 99), False),
        (of(40, 0), of(80, 0), True),
        (of(40, 0), of(80, 8), False),
    ):
        arms[:2] = [{'name': a['name'], **x} for a, x in zip(arms, (one, other), strict=False)]
        (workdir / 'grid.json').write_text(json.dumps(facts))
        if same:
            assert 'Switch, Muon' in scaling_report.read([workdir], 'loss')
        else:
            with pytest.raises(UserError, match='with other settings .objective.begins.1: '):
                scaling_report.read([workdir], 'loss')


def test_a_law_is_of_the_same_text(tmp_path):
    one, other = (compared.write(tmp_path / name, arms=compared.THREE) for name in 'ab')

    def read(edit, metric='bits_per_byte'):
        for workdir in (one, other):
            facts = json.loads((one / 'grid.json').read_text())
            facts['held_fixed'] |= {'documents': 'd', 'evaluation suite': 's'}
            if workdir is other:
                edit(facts['held_fixed'], facts['arms'][0]['experiment'])
            (workdir / 'grid.json').write_text(json.dumps(facts))
        return scaling_report.read([one, other], metric)

    assert len(read(lambda held, own: None)['CausalLM']) == 4
    # Who prepares the text is not asked, nor where it lies.
    assert len(read(lambda held, own: own['data'].update(workers=3, train_split='x'))) == 1
    assert len(read(lambda held, own: own['model'].update(dim=999, heads=9, ffn=99))) == 1
    assert len(read(lambda held, own: held.update({'evaluation suite': 't'}), 'loss')) == 3
    for edit, field in (
        (lambda held, own: held.update({'evaluation suite': 't'}), 'evaluation suite'),
        (lambda held, own: held.update(documents='e'), 'documents'),
        (lambda held, own: held.update(tokenizer='e'), 'tokenizer'),
        (lambda held, own: own['train'].update(seq_len=77), 'train.seq_len'),
        (lambda held, own: own['train'].update(batch=7), 'train.batch'),
        (lambda held, own: own['model'].update(dropout=0.5), 'model.dropout'),
        (lambda held, own: own['model'].update(mlp='relu'), 'model.mlp'),
        (lambda held, own: own['model'].update(base_dim=16), 'model.base_dim is set'),
        (lambda held, own: own.update(compute={'precision': 'bfloat16'}), 'compute.precision'),
        (lambda held, own: own.update(tune={'class': 'LoRA'}), 'tune.class'),
        (lambda held, own: own['optimizer']['schedule'].update(kind='wsd'), 'schedule.kind'),
        (lambda held, own: own.update(evaluation={'patience': 3}), 'evaluation.patience'),
        (lambda held, own: own.update(start='runs/x'), 'start'),
    ):
        with pytest.raises(UserError, match=f'with other settings .{field}: '):
            read(edit)


def test_a_run_that_ended_between_two_lines_of_training_counts_all_of_its_tokens(tmp_path):
    workdir = compared.write(tmp_path / 'grid', arms=compared.THREE)
    path = workdir / 'causal/seed-1/metrics.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ended = max(line['step'] for line in lines if line['kind'] == 'validation')
    kept = [line for line in lines if line['kind'] != 'train' or line['step'] < ended - 15]
    path.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    one, other = scaling_report.read([workdir], 'loss')['CausalLM']
    assert (one.tokens, one.flops) == (other.tokens, other.flops)


def test_what_is_left_out_is_told(tmp_path):
    workdir = compared.write(tmp_path / 'grid', arms=compared.THREE)
    said = []
    scaling_report.read([workdir], 'loss', said.append)
    assert said == []
    compared.write_run(workdir / 'causal/seed-1', 'causal', 1, steps=150, evaluated=False)
    (workdir / 'causal/seed-1/evaluation.json').unlink()
    (workdir / 'masked/seed-0/evaluation.json').write_text('{')
    scaling_report.read([workdir], 'loss', said.append)
    first, *problems = said
    assert first == f'{workdir}: 4 of 6 runs are finished, and are read'
    assert any('evaluation.json' in line for line in problems)


def test_one_objective_without_a_law_leaves_the_others_theirs():
    points = [Point(n, d, 6 * n * d, 1.0, x) for n, d, x in zip(*runs(), strict=True)]
    found = {'CausalLM': points, 'MultiToken': points[:2]}
    result, pictures = scaling_report.report(found, 'bits_per_byte', resamples=2)
    assert 'law' in result['objectives']['CausalLM']
    assert result['objectives']['MultiToken']['why'].startswith('2 runs of')
    assert '  no law: 2 runs of' in '\n'.join(lines(result))
    assert len([p for p in pictures if p.name == 'scaling_fit'][0].curves) == 2
    with pytest.raises(UserError, match='MultiToken: 2 runs of'):
        scaling_report.report({'MultiToken': points[:2]}, 'bits_per_byte', resamples=2)


@pytest.mark.slow
def test_the_best_is_told_of_exact_figures_alone():
    def points(law, kind='exact'):
        made = zip(*runs(law=law), strict=True)
        return [Point(n, d, 6 * n * d, 1.0, loss, kind) for n, d, loss in made]

    better = LAW._replace(E=1.5)
    found = {
        'CausalLM': points(LAW),
        'Dual': points(LAW._replace(E=1.9)),
        'Low': points(better, 'bound'),
    }
    best, _ = scaling_report.report(found, 'bits_per_byte', resamples=2)
    assert {*best['best'].values()} == {'CausalLM'}
    # The own losses of two objectives are of different things.
    assert scaling_report.report(found, 'loss', resamples=2)[0]['best'] == {}


def test_a_report_holds_every_view_of_the_runs():
    points = [
        Point(n, d, 6 * n * d, n * d / 1e12, loss) for n, d, loss in zip(*runs(), strict=True)
    ]
    result, pictures = scaling_report.report({'CausalLM': points}, 'loss', resamples=5)
    law = result['objectives']['CausalLM']['law']
    assert law['alpha'][0] == pytest.approx(LAW.alpha, rel=0.02)
    (check,) = result['objectives']['CausalLM']['largest']
    assert check['error'] == pytest.approx(0, abs=0.01) and result['best'] == {}
    names = [picture.name for picture in pictures]
    views = ['scaling_tokens', 'scaling_flops', 'scaling_seconds']
    assert names == [*views, 'scaling_fit', 'scaling_forecast']
    assert all(len(picture.curves) == 4 for picture in pictures[:3])
    measured = {y for x, y in pictures[3].curves[0].points}
    assert measured == set(runs().loss.tolist())
    span, forecast, was = pictures[4].curves
    assert was.points == [(check['measured'], 0.0)] and forecast.points == [
        (check['forecast'], 0.0)
    ]
    assert span.points[:2] == [(check['low'], 0.0), (check['high'], 0.0)]


def test_sizes_at_one_budget_are_drawn_with_the_best_of_them():
    sizes, budgets = np.geomspace(1e8, 1e10, 5), (1e20, 1e21)
    points = [Point(n, c / 6 / n, c, 1.0, float(LAW(n, c / 6 / n))) for c in budgets for n in sizes]
    result, pictures = scaling_report.report({'CausalLM': points}, 'loss', resamples=2)
    (picture,) = [p for p in pictures if p.name == 'scaling_iso_flops']
    assert [c.label for c in picture.curves if c.label] == [
        *('CausalLM, 1e+20 FLOPs', 'CausalLM, 1e+21 FLOPs'),
    ]
    assert [len(c.points) for c in picture.curves] == [5, 1, 5, 1]
    best = result['objectives']['CausalLM']['iso_flops']
    assert [c.points[0] for c in picture.curves[1::2]] == list(best.values())


@pytest.mark.slow
@pytest.mark.parametrize('of', ['size', 'nothing'])
def test_an_exponent_that_runs_do_not_tell_is_no_overflow(of, tmp_path):
    """Of a loss that hardly depends on a number, an exponent may be as large as it likes."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e7, 3), np.geomspace(1e6, 1e8, 3)))
    rng = np.random.default_rng(0)
    loss = (2 + (30 / d**0.3 if of == 'size' else 0 * d)) * np.exp(0.003 * rng.normal(size=9))
    points = [Point(*row, 1.0, x) for *row, x in zip(n, d, 6 * n * d, loss, strict=True)]
    result, _ = scaling_report.report({'CausalLM': points}, 'loss', resamples=8)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text)['objectives']['CausalLM']['law']['E'][0] > 0
    assert all(isinstance(line, str) for line in lines(result))
