"""What the runs of several comparisons say of scaling: their laws, forecasts and pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.compare import results, scaling
from llama_jax.compare.scaling import Law, Runs
from llama_jax.errors import UserError
from llama_jax.evaluate.metrics import METRICS
from llama_jax.report.grid import EXACT, FINISHED, GridRecords, read_grid
from llama_jax.report.picture import Axis, Curve, Picture
from llama_jax.report.units import spoken
from llama_jax.train.checkpoint import difference


class Point(NamedTuple):
    """A finished run."""

    parameters: float
    tokens: float
    flops: float
    seconds: float
    loss: float
    kind: str = EXACT
    """Of the loss: figures of different kinds are not compared."""


def read(
    workdirs: Sequence[Path], metric: str, say: Callable[[str], None] = lambda text: None
) -> dict[str, list[Point]]:
    """The finished runs of comparisons, by the name of their objective, and of their optimizer
    where there are several; sweeps are left out. Raises UserError where there are none, for other
    data or settings of one objective, and for a metric of which more is better: a law falls.

    `say` gets a line for each directory of which a run is left out, for it is not finished or not
    readable.
    """
    if metric in METRICS and METRICS[metric].higher_is_better:
        raise UserError(
            f'--metric {metric}: a law is of what falls with size; give loss, bits_per_byte or '
            'another metric of which less is better'
        )
    found: dict[str, list[Point]] = defaultdict(list)
    grids = [read_grid(workdir) for workdir in workdirs]
    kind = _kinds(workdirs, grids, measured=metric != 'loss')
    for workdir, grid in zip(workdirs, grids, strict=True):
        size = {row['arm']: row['parameters'] for row in grid.facts.get('budget', [])}
        of_arm = {arm['name']: kind[f'{workdir}/{arm["name"]}'] for arm in grid.facts['arms']}
        runs = [run for run in results.runs(grid) if not run.sweep]
        done = [run for run in runs if run.state == FINISHED]
        if len(done) < len(runs):
            say(f'{workdir}: {len(done)} of {len(runs)} runs are finished, and are read')
        for problem in grid.problems:
            say(f'{workdir}: {problem}')
        for run in done:
            loss = run.loss if metric == 'loss' else run.metrics.get(metric)
            numbers = (size.get(run.arm), run.tokens, run.flops, run.seconds, loss)
            if all(x is not None for x in numbers):
                point = Point(*map(float, numbers), run.kinds.get(metric, EXACT))  # type: ignore
                found[of_arm[run.arm]].append(point)
    if not found:
        raise UserError(
            f'no finished run of {", ".join(map(str, workdirs)) or "no directory"} has {metric}: '
            'give the --workdir of comparisons, or another --metric'
        )
    return dict(found)


_OF_TEXT = ('documents', 'tokenizer', 'evaluation suite')
"""What a comparison held fixed, by its hash."""


def _settings(arm: dict[str, Any], held: dict[str, Any], *, measured: bool) -> dict[str, Any]:
    """What has to be the same in all runs of a law: all but sizes, lengths, rates and seeds."""
    experiment = arm['experiment']
    train, model = experiment['train'], experiment['model']
    schedule = _optimizer(arm)['schedule']
    of_text = _OF_TEXT if measured else _OF_TEXT[:-1]
    return {
        'objective': _by_share(arm['objective'], train['steps']),
        'optimizer': {k: v for k, v in _optimizer(arm).items() if k != 'schedule'},
        'schedule': {name: schedule.get(name) for name in ('kind', 'final', 'decay_share')},
        'train': {name: train.get(name) for name in ('seq_len', 'batch')},
        'model': {k: v for k, v in model.items() if k not in _SIZES},
        'model.base_dim is set': bool(model.get('base_dim')),
        'compute.precision': experiment.get('compute', {}).get('precision'),
        'tune': experiment.get('tune'),
        'start': experiment.get('start'),
        'evaluation.patience': experiment.get('evaluation', {}).get('patience'),
        **{name: held.get(name) for name in of_text},
    }


_SIZES = frozenset(
    ('dim', 'layers', 'encoder_layers', 'heads', 'kv_heads', 'head_dim', 'ffn', 'vocab')
    + ('vocab_padding', 'context', 'base_dim', 'base_head_dim')
)
"""What makes a model larger or smaller, and nothing else."""


class _Share(float):
    """Of the steps of a run: the same as another one which is nearer than a step."""

    steps: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Share):
            return False
        return abs(self - other) < 1 / min(self.steps, other.steps)

    __hash__ = None  # type: ignore[assignment]


def _by_share(plain: Any, steps: int, inside: bool = False) -> Any:
    """An objective as plain values, whose counts of steps are shares of them: `begins`, and what
    ends in `_steps`."""
    if isinstance(plain, dict):
        return {
            k: _by_share(v, steps, inside or k == 'begins' or k.endswith('_steps'))
            for k, v in plain.items()
        }
    if isinstance(plain, list):
        return [_by_share(x, steps, inside) for x in plain]
    if not inside or not steps:
        return plain
    share = _Share(plain / steps)
    share.steps = steps
    return share


def _optimizer(arm: dict[str, Any]) -> dict[str, Any]:
    return arm['experiment']['optimizer']


def _kinds(
    workdirs: Sequence[Path], grids: Sequence[GridRecords], *, measured: bool
) -> dict[str, str]:
    """What each arm of each directory is called; `measured` by a suite."""
    optimizers = {_optimizer(arm)['class'] for grid in grids for arm in grid.facts['arms']}
    kinds: dict[str, str] = {}
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for workdir, grid in zip(workdirs, grids, strict=True):
        for arm in grid.facts['arms']:
            name, place = arm['objective']['class'], f'{workdir}/{arm["name"]}'
            if len(optimizers) > 1:
                name += f', {_optimizer(arm)["class"]}'
            own = _settings(arm, grid.facts.get('held_fixed', {}), measured=measured)
            other, others = first.setdefault(name, (place, own))
            if lines := difference(others, own):
                raise UserError(
                    f'the arms {other} and {place} are both {name}, with other settings '
                    f'({"; ".join(lines)}): a law is of runs that differ in size and tokens alone; '
                    'give comparisons of one'
                )
            kinds[place] = name
    return kinds


def report(
    found: dict[str, list[Point]], metric: str, *, resamples: int
) -> tuple[dict[str, Any], list[Picture]]:
    """As scaling.json holds it, and what it looks like."""
    objectives: dict[str, Any] = {}
    laws: dict[str, Law] = {}
    largest: dict[str, list[scaling.Check]] = {}
    per: dict[str, float] = {}
    for name, points in found.items():
        runs, flops = _runs(points), np.array([point.flops for point in points])
        try:
            law = scaling.fitted(runs, resamples=resamples)
        except UserError as error:
            objectives[name] = {'runs': len(points), 'why': str(error)}
            continue
        laws[name], largest[name] = law.law, _largest(runs, resamples)
        per[name] = float(np.median(flops / (runs.parameters * runs.tokens)))
        objectives[name] = {
            'runs': len(points),
            'law': {
                number: [_known(of.numbers()[number]) for of in (law.law, law.low, law.high)]
                for number in law.law.numbers()
            },
            'flops_per_parameter_and_token': per[name],
            'largest': [
                {key: _known(x) for key, x in {**check._asdict(), 'error': check.error}.items()}
                for check in largest[name]
            ],
            'iso_flops': {f'{c:.6g}': best for c, best in scaling.iso_flops(runs, flops).items()},
        }
    if not laws:
        raise UserError('; '.join(f'{name}: {of["why"]}' for name, of in objectives.items()))
    every = [point.flops for points in found.values() for point in points]
    budgets = np.geomspace(min(every), 10 * max(every), 5).tolist()
    # Own losses of several objectives are of different things.
    ranked = {
        name: law for name, law in laws.items() if metric != 'loss' and found[name][0].kind == EXACT
    }
    best = scaling.best_by_budget(ranked, budgets, per=per)
    result = {
        'metric': metric,
        'objectives': objectives,
        'best': {f'{budget:.6g}': name for budget, name in best.items()},
    }
    pictures = [*_views(found, metric), _iso_flops(found, metric), _fit(found, laws, metric)]
    pictures.append(_forecast(largest, metric))
    return result, [picture for picture in pictures if not picture.empty]


def _called(name: str, points: Sequence[Point]) -> str:
    """A name in a legend, which says of what is no exact value."""
    return name if points[0].kind == EXACT else f'{name} ({points[0].kind})'


def _spoken(metric: str) -> tuple[str, str]:
    """Label and unit."""
    return ('Own held-out loss', 'nats per token') if metric == 'loss' else spoken(metric)


def _known(value: float) -> float | None:
    """None for what is beyond any float."""
    return value if np.isfinite(value) else None


def _runs(points: Sequence[Point]) -> Runs:
    return Runs(
        *(np.array([getattr(p, name) for p in points]) for name in ('parameters', 'tokens', 'loss'))
    )


def _largest(runs: Runs, resamples: int) -> list[scaling.Check]:
    """Empty where too few runs are left without the largest."""
    try:
        return scaling.leave_largest_out(runs, resamples=resamples)
    except UserError:
        return []


def _views(found: dict[str, list[Point]], metric: str) -> list[Picture]:
    """The same runs at equal tokens, equal FLOPs and equal time."""
    pictures = []
    for x, label in (('tokens', 'tokens'), ('flops', 'FLOPs'), ('seconds', 'seconds of training')):
        curves: list[Curve] = []
        for name, points in found.items():
            for size in sorted({point.parameters for point in points}):
                of_size = sorted(p for p in points if p.parameters == size)
                places = sorted({p.tokens for p in of_size})
                mean = [
                    (
                        float(np.mean([getattr(p, x) for p in of_size if p.tokens == d])),
                        float(np.mean([p.loss for p in of_size if p.tokens == d])),
                    )
                    for d in places
                ]
                label_of = f'{_called(name, points)}, {size:,.0f} parameters'
                curves.append(Curve(label_of, mean, f'arm-{len(curves)}', dots=True))
        pictures.append(
            Picture(
                f'scaling_{x}',
                f'{_spoken(metric)[0]} against {label}',
                _spoken(metric)[1],
                Axis(label, log=True, tight=True),
                curves,
            )
        )
    return pictures


def _iso_flops(found: dict[str, list[Point]], metric: str) -> Picture:
    """Loss by size at each budget that three sizes share, with the lowest point of the parabola."""
    curves: list[Curve] = []
    for name, points in found.items():
        runs, flops = _runs(points), np.array([point.flops for point in points])
        best = scaling.iso_flops(runs, flops)
        for same in scaling.budgets(runs, flops):
            of = runs.take(same)
            sizes = sorted(set(of.parameters.tolist()))
            style, budget = f'arm-{len(curves)}', float(flops[same].min())
            mean = [(n, float(of.loss[of.parameters == n].mean())) for n in sizes]
            label = f'{_called(name, points)}, {budget:.2g} FLOPs'
            curves.append(Curve(label, mean, style, dots=True))
            if budget in best:
                curves.append(Curve('', [best[budget]], f'{style} mean cloud', line=False))
    return Picture(
        'scaling_iso_flops',
        f'{_spoken(metric)[0]} by size at equal FLOPs',
        _spoken(metric)[1],
        Axis('Parameters', log=True, tight=True),
        curves,
        note='Large dots: the lowest points of parabolas over log N.',
    )


def _forecast(largest: dict[str, list[scaling.Check]], metric: str) -> Picture:
    """The largest runs by the law of all others, with its interval, and as they were measured."""
    rows = [
        (f'{name}, {k + 1}', check)
        for name, checks in largest.items()
        for k, check in enumerate(checks)
    ]
    spans: list[tuple[float, float | None]] = []
    for i, (_, check) in enumerate(rows):
        spans += [(check.low, float(i)), (check.high, float(i)), (check.high, None)]
    at = {
        what: [(getattr(check, what), float(i)) for i, (_, check) in enumerate(rows)]
        for what in ('forecast', 'measured')
    }
    return Picture(
        'scaling_forecast',
        'The largest runs, by a law of the others',
        'law with its interval (95%), and measured',
        Axis(', '.join(_spoken(metric)), tight=True),
        [
            Curve('', spans, 'arm-0 spread'),
            Curve('forecast', at['forecast'], 'arm-0 mean cloud', line=False),
            Curve('measured', at['measured'], 'arm-1 mean cloud', line=False),
        ]
        if rows
        else [],
        rows=[name for name, _ in rows],
    )


def _fit(found: dict[str, list[Point]], laws: dict[str, Law], metric: str) -> Picture:
    """What the law says of each run, against what was measured: on the diagonal it fits."""
    curves = []
    for i, (name, points) in enumerate(found.items()):
        if name not in laws:
            continue
        runs = _runs(points)
        said = laws[name](runs.parameters, runs.tokens)
        cloud = list(zip(said.tolist(), runs.loss.tolist(), strict=True))
        curves.append(Curve(_called(name, points), cloud, f'arm-{i}', dots=True, line=False))
    ends = sorted(y for curve in curves for _, y in curve.points if y is not None)
    curves.append(Curve('law', [(ends[0], ends[0]), (ends[-1], ends[-1])], 'soft'))
    return Picture(
        'scaling_fit',
        f'{_spoken(metric)[0]}: measured against the law',
        _spoken(metric)[1],
        Axis('law', tight=True),
        curves,
    )
