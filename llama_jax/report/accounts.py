"""The tables of a comparison beside its results: what was compared and fixed, what it cost."""

from __future__ import annotations

import shlex
import statistics
from typing import Any

from llama_jax.report import baselines
from llama_jax.report.grid import ArmRecords, GridRecords, SeedRun
from llama_jax.report.read import Line, inside, last, number
from llama_jax.report.tables import NOT_YET, Cell, Row, Table
from llama_jax.report.text import compact, significant
from llama_jax.units import duration

_BUDGET = (
    ('tokens', 'tokens'),
    ('text_positions', 'text\npositions'),
    ('loss_tokens', 'loss tokens'),
    ('unique_tokens', 'unique tokens'),
    ('text_seen', 'text seen'),
    ('padding', 'padding'),
    ('cut', 'documents\ncut'),
    ('parameters', 'parameters'),
    ('flops', 'FLOPs'),
)
_SHARES = ('padding', 'cut')


def arms(grid: GridRecords) -> Table:
    """What each arm is and how far it has come; of the model and the optimizer, what is not the
    same in all arms."""
    settings = [_settings(arm) for arm in grid.arms]
    differing = _differing(settings)
    rows = []
    for arm, of_arm in zip(grid.arms, settings, strict=True):
        other = ', '.join(f'{x} {_shown(of_arm[x])}' for x in differing if x in of_arm)
        about = [_shown(arm.facts.get('objective')), *([other or NOT_YET] if differing else [])]
        digest = str(arm.facts.get('digest') or NOT_YET)
        cells = [*about, digest[:12], progress(arm)]
        rows.append(Row(arm.name, [Cell(text) for text in cells], arm.index, not arm.done))
    column = ['settings, where arms differ'] * bool(differing)
    return Table(['arm', 'objective', *column, 'digest', 'seeds'], rows, right=False)


def _settings(arm: ArmRecords) -> Line:
    """Of its model by their names, and of its optimizer."""
    optimizer = inside(arm.facts, 'experiment', 'optimizer')
    optimizer = dict(optimizer) if isinstance(optimizer, dict) else {}
    schedule = optimizer.pop('schedule', None)
    found = {f'optimizer.{name}': value for name, value in optimizer.items()}
    for name, value in schedule.items() if isinstance(schedule, dict) else ():
        found[f'optimizer.schedule.{name}'] = value
    model = arm.facts.get('model')
    return {**(model if isinstance(model, dict) else {}), **found}


def progress(arm: ArmRecords) -> str:
    """How many seeds are finished, and what is the matter with the others."""
    told = [f'{sum(run.done for run in arm.runs)} of {len(arm.runs)} finished']
    told += [f'seed {run.seed}: {run.state}' for run in arm.runs if not run.done]
    return '; '.join(told)


def cost(grid: GridRecords) -> Table:
    """Means over the seeds of what was recorded, finished or not."""
    rows = []
    for arm in grid.arms:
        seconds = _mean([_last(run, 'seconds') for run in arm.runs])
        flops = _mean([_last(run, 'flops') for run in arm.runs])
        evaluation = _mean([number(run.evaluation, 'seconds') for run in arm.runs])
        mfu = _mean([_median(run, 'mfu') for run in arm.runs])
        cells = [
            _count(_mean([_fact(run, 'parameters') for run in arm.runs])),
            _count(_mean([_last(run, 'tokens') for run in arm.runs])),
            NOT_YET if flops is None else significant(flops),
            NOT_YET if seconds is None else duration(seconds),
            _whole(_mean([_median(run, 'tokens_per_second') for run in arm.runs])),
            NOT_YET if mfu is None else f'{mfu:.1%}',
            _share(_mean([_clipped(run) for run in arm.runs])),
            NOT_YET if evaluation is None else duration(evaluation),
        ]
        rows.append(Row(arm.name, [Cell(text) for text in cells], arm.index, not arm.done))
    columns = ['parameters', 'tokens', 'FLOPs', 'training\ntime', 'tokens/s', 'MFU', 'clipped']
    return Table(['arm', *columns, 'evaluation\ntime'], rows)


def budget(grid: GridRecords) -> Table:
    """The plan, as it was proved before the first step; FLOPs also over those of the first arm, and
    the seconds that it took."""
    lines = grid.facts.get('budget')
    lines = [x for x in lines if isinstance(x, dict)] if isinstance(lines, list) else []
    places = {arm.name: arm.index for arm in grid.arms}
    taken = {arm.name: _mean([_last(run, 'seconds') for run in arm.runs]) for arm in grid.arms}
    seconds = {name: f'{value:,.0f}' for name, value in taken.items() if value is not None}
    first = number(lines[0], 'flops') if lines else None
    rows = []
    for line in lines:
        tokens, padding = number(line, 'tokens'), number(line, 'padding')
        if tokens is not None and padding is not None:
            line = {**line, 'text_positions': tokens * (1 - padding)}
        values = [number(line, field) for field, _ in _BUDGET]
        cells = [
            _budgeted(field, value)
            for (field, _), value in zip(_BUDGET[:-1], values[:-1], strict=True)
        ]
        flops = values[-1]
        cells.append(Cell(NOT_YET if flops is None else significant(flops)))
        cells.append(Cell(f'{flops / first:.2f}' if flops is not None and first else NOT_YET))
        name = str(line.get('arm'))
        cells.append(Cell(seconds.get(name, NOT_YET)))
        rows.append(Row(name, cells, places.get(name)))
    relative = f'FLOPs / {lines[0].get("arm")}' if lines else 'relative FLOPs'
    return Table(['arm', *(label for _, label in _BUDGET), relative, 'seconds'], rows)


def _budgeted(field: str, value: float | None) -> Cell:
    if value is not None and field in _SHARES:
        return Cell(f'{value:.1%}')
    return Cell(_count(value), told='' if value is None else f'{value:,.0f}')


def rates(grid: GridRecords) -> Table | None:
    """The learning rate that was chosen for each arm, and the losses that chose it; None where the
    comparison chose none."""
    tuning = grid.facts.get('tuning')
    if not isinstance(tuning, dict) or not tuning:
        return None
    tried = sorted({rate for arm in tuning.values() for rate in inside(arm, 'losses')}, key=float)
    rows = []
    for arm in grid.arms:
        found = tuning.get(arm.name)
        if not isinstance(found, dict):
            continue
        rate = number(found, 'rate')
        edge = ', at the edge' if found.get('at_the_edge') else ''
        cells = [Cell(NOT_YET if rate is None else f'{rate:g}{edge}')]
        for text in tried:
            loss = number(found, 'losses', text)
            there = text in (inside(found, 'losses') or {})
            shown = NOT_YET if not there else 'not finite' if loss is None else f'{loss:.4f}'
            cells.append(Cell(shown))
        rows.append(Row(arm.name, cells, arm.index))
    return Table(['arm', 'learning rate', *(f'own loss\nat {text}' for text in tried)], rows)


def absent(grid: GridRecords) -> list[str]:
    """What is planned beside the arms and not finished, in words."""
    seeds = int(number(grid.facts, 'seeds') or 0)
    told = []
    planned = grid.facts.get(baselines.FOLDER)
    for name in planned if isinstance(planned, dict) else ():
        if name == baselines.COUNTS:
            done, whole = int(any(x.arms is None for x in grid.baselines)), 1
        else:
            done = sum(len(x.metrics) for x in grid.baselines if x.name == name)
            whole = seeds
        if done < whole:
            told.append(
                f'The baseline {name} is not finished ({done} of {whole}): what stands in the '
                'headline may be below it.'
            )
    if planned is None and 'arms' in grid.facts:
        told.append('This grid has no baselines: whether training helps is not seen here.')
    done = sum(run.done for run in grid.arms[0].again) if grid.arms else 0
    if grid.facts.get('again') and done < seeds:
        told.append(f'The A/A arm is not finished ({done} of {seeds}): it is the noise floor.')
    if grid.facts.get('again') is False:
        told.append('This grid has no A/A arm: no noise floor stands beside its differences.')
    return [*told, *_fixed_seeds(grid)]


def _fixed_seeds(grid: GridRecords) -> list[str]:
    """A sentence on what is drawn alike in all runs of an arm."""
    own = [inside(arm.facts, 'experiment', 'randomness') or {} for arm in grid.arms]
    given = [
        f'{name} {seed}'
        for name, seed in (own[0] if own else {}).items()
        if seed is not None and all(other.get(name) == seed for other in own)
    ]
    if not given:
        return []
    return [
        f'Every run has the same {", ".join(given)} (randomness): what seeds and the A/A arm show '
        'is without it.'
    ]


def code(grid: GridRecords) -> list[str]:
    """Sentences on runs that were not made, or not measured, alike."""
    told = []
    runs = [run for arm in grid.arms for run in [*arm.runs, *arm.again, *arm.sweep]]
    facts = [run.records.facts for run in runs if run.records]
    for name, what in (('code', 'code'), ('versions', 'versions of packages')):
        if len({repr(x[name]) for x in facts if name in x}) > 1:
            told.append(f'Runs were trained by different {what}: they are not equals.')
    selection = {str(inside(run.evaluation, 'text', 'selection') or '') for run in runs} - {''}
    if selection and (grid.facts.get('tuning') or grid.facts.get('tuned')):
        told.append(
            f'The texts of {", ".join(sorted(selection))} chose the learning rates and are '
            'measured as well: give them a split test of their own.'
        )
    texts = {run.evaluation['examples'] for run in runs if 'examples' in run.evaluation}
    if len(texts.union(*(baseline.examples for baseline in grid.baselines))) > 1:
        told.append('Runs or baselines were measured on different texts: they are not equals.')
    return told


def fine_tuning(grid: GridRecords) -> list[str]:
    """Sentences on fine-tunings that more steps, rates or seeds could make better."""
    told = []
    suite = grid.facts.get('suite')
    if isinstance(suite, dict) and _is_fine_tuned(grid):
        one = [
            what
            for what, number_of in (
                ('learning rate', len(suite.get('rates') or ())),
                ('seed', suite.get('tuned_seeds')),
            )
            if number_of == 1
        ]
        if one:
            told.append(
                f'Each run is fine-tuned at one {" and one ".join(one)}: another may order the '
                'arms otherwise (--suite.rates, --suite.tuned-seeds).'
            )
    for key, what, remedy in (
        ('cut', 'was still getting better at its last step', 'raise --suite.steps'),
        ('edge', 'took the lowest or highest of its learning rates', 'widen --suite.rates'),
    ):
        runs = {arm.name: [*arm.runs, *arm.again] for arm in grid.arms}
        arms = [
            f'{name} ({n} of {len(of_arm)} runs)'
            for name, of_arm in runs.items()
            if (n := sum(_of_fine_tuning(run, key) for run in of_arm))
        ]
        if arms:
            told.append(f'Fine-tuning {what} in {", ".join(arms)}: {remedy}.')
    return told


def _is_fine_tuned(grid: GridRecords) -> bool:
    """Whether any run was fine-tuned."""
    return any('finetuning' in run.evaluation for _, run in grid.runs)


def _of_fine_tuning(run: SeedRun, key: str) -> bool:
    found = run.evaluation.get('finetuning')
    return isinstance(found, dict) and bool(found.get(key))


def held_fixed(grid: GridRecords) -> Table:
    """Names and hashes, or values, of what is the same in all arms."""
    fixed = grid.facts.get('held_fixed')
    rows = [
        Row(str(name), [Cell(_shown(value))])
        for name, value in (fixed.items() if isinstance(fixed, dict) else ())
    ]
    return Table(['held fixed', 'value or hash'], rows, right=False, code=True)


def runs(grid: GridRecords) -> Table:
    """Every run, those of the sweep too, with what makes it again."""
    rows = []
    for arm in grid.arms:
        for run in [*arm.runs, *arm.sweep]:
            facts = run.records.facts if run.records else {}
            rate = run.learning_rate
            cells = [
                str(run.seed),
                NOT_YET if rate is None else f'{rate:g}',
                run.state,
                str(facts.get('digest') or NOT_YET)[:12],
                str(facts.get('git_commit') or NOT_YET)[:12],
                _time(facts.get('started')),
                command(facts.get('command')),
            ]
            rows.append(Row(arm.name, [Cell(x) for x in cells], arm.index, not run.done))
    columns = ['seed', 'learning rate', 'state', 'digest', 'commit', 'started', 'command']
    return Table(['arm', *columns], rows, right=False, code=True)


def versions(grid: GridRecords) -> Table:
    """Where and with what the comparison was made."""
    found = grid.facts.get('versions')
    pairs: list[tuple[str, Any]] = [
        ('started', _time(grid.facts.get('started'))),
        ('device', grid.facts.get('device')),
        *(found.items() if isinstance(found, dict) else ()),
    ]
    rows = [Row(str(k), [Cell('not recorded' if v is None else _shown(v))]) for k, v in pairs]
    return Table(['software', 'version'], rows, right=False, code=True)


def command(value: Any) -> str:
    """A command line as it would be typed."""
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return str(value or 'not recorded')


def _shown(value: Any) -> str:
    """A setting as it would be written in Python: a class as a call."""
    return value if isinstance(value, str) else _written(value)


def _written(value: Any) -> str:
    if isinstance(value, dict) and 'class' in value:
        inner = ', '.join(f'{k}={_written(v)}' for k, v in value.items() if k != 'class')
        return f'{value["class"]}({inner})'
    if isinstance(value, list):
        return f'[{", ".join(map(_written, value))}]'
    return repr(value)


def _differing(settings: list[Line]) -> list[str]:
    """Names of those that are not the same in all."""
    names = dict.fromkeys(name for of_arm in settings for name in of_arm)
    return [x for x in names if any(s.get(x) != settings[0].get(x) for s in settings)]


def _last(run: SeedRun, name: str) -> float | None:
    return last(run.records.train, name) if run.records else None


def _fact(run: SeedRun, name: str) -> float | None:
    return number(run.records.facts, name) if run.records else None


def _median(run: SeedRun, name: str) -> float | None:
    lines = run.records.train if run.records else []
    values = [x for x in (number(line, name) for line in lines) if x is not None]
    return statistics.median(values) if values else None


def _clipped(run: SeedRun) -> float | None:
    """The share of the recorded steps whose gradient was scaled down."""
    if run.records is None:
        return None
    most = number(run.records.facts, 'experiment', 'optimizer', 'clip')
    norms = [x for x in (number(line, 'grad_norm') for line in run.records.train) if x is not None]
    return sum(x > most for x in norms) / len(norms) if norms and most is not None else None


def _share(value: float | None) -> str:
    return NOT_YET if value is None else f'{value:.0%}'


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _count(value: float | None) -> str:
    return NOT_YET if value is None else compact(value)


def _whole(value: float | None) -> str:
    return NOT_YET if value is None else f'{value:,.0f}'


def _time(value: Any) -> str:
    return str(value or NOT_YET)[:16].replace('T', ' ')
