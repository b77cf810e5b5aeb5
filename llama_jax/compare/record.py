"""WORKDIR/grid.json: what was planned and proved, from which each run takes its experiment."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_jax import installed
from llama_jax.compare import baselines
from llama_jax.compare.fair import EVALUATION_CODE, OF_FILES, TRAINING_CODE, Proof
from llama_jax.compare.grid import FINISHED, Arm, Grid, Planned, allowed, at_place, nearest
from llama_jax.compare.tune import at_rates
from llama_jax.errors import UserError
from llama_jax.evaluate.suite import Suite
from llama_jax.report.baselines import FOLDER
from llama_jax.train.checkpoint import difference
from llama_jax.train.code import evaluation_code, training_code
from llama_jax.train.config_file import NAME as OWN_FILE
from llama_jax.train.config_file import ConfigFile, edited, know_objectives
from llama_jax.train.experiment import Experiment, digest, from_dict, to_dict
from llama_jax.train.plain import from_plain, own_classes, to_plain
from llama_jax.train.records import read_run, versions, write_atomically

NAME = 'grid.json'
TUNING = 'tuning'
"""In grid.json: each arm to its rates, see `tune.Tuned.facts`."""

MAY_CHANGE = ('mesh', 'checkpoint', 'data.workers', 'data.prefetch', 'train.log_every')
"""Settings with which a grid may go on: they change no result. Seeds and arms may be added."""


def read(workdir: Path) -> dict[str, Any] | None:
    """The grid.json of `workdir`; None when there is none."""
    path = workdir / NAME
    try:
        facts = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(facts, dict):
            raise ValueError('no object')
        return facts
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise UserError(
            f'{path} cannot be read ({error}): delete it; the command that began the grid writes '
            'it anew'
        ) from error


def check_place(workdir: Path) -> None:
    """Raise UserError for the directory of a grid that cannot be written or made, or that holds a
    run; what is made to see this is taken away again."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'{workdir} is no directory: give another --workdir')
    if (workdir / 'run.json').exists():
        raise UserError(f'{workdir} holds a run, and no comparison: give another --workdir')
    new = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise _unwritable(workdir, error) from error
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(f'cannot write in {workdir} ({error.strerror}): give another --workdir')


def check_workdir(workdir: Path, grid: Grid, config_file: ConfigFile | None = None) -> None:
    """Raise UserError when `workdir` holds another grid, or results that other code measured;
    `config_file` defines the grid, and may define what trains."""
    facts = read(workdir)
    if facts is None:
        return
    plan = json.loads(json.dumps(_plan(grid)))
    lines = difference(_whole(facts), _whole(plan))
    if not any(workdir.glob(f'*/**/{FINISHED}')):  # nothing was measured by another suite
        lines = [line for line in lines if not line.startswith('suite.')]
    wanted = _experiments(plan)
    of_arms: dict[str, list[str]] = {}
    for name, experiment in _experiments(facts).items():
        if name not in wanted:
            lines.append(f'the arm {name}, which is gone')
            continue
        for line in difference(experiment, wanted[name]):
            if not allowed(line.split(':')[0], MAY_CHANGE):
                of_arms.setdefault(line, []).append(name)
    # What every arm has differently is told once.
    lines += [
        line if len(names) == len(facts['arms']) else f'{line} ({", ".join(names)})'
        for line, names in of_arms.items()
    ]
    if lines:
        raise UserError(
            f'{workdir} holds another grid; it differs in {"; ".join(lines)}. Use another '
            '--workdir, or the settings it began with'
        )
    _check_code(workdir, facts, config_file)


def _check_code(workdir: Path, facts: dict[str, Any], config_file: ConfigFile | None) -> None:
    """Raise UserError for runs made by other code or other versions than those of now."""
    begun = sorted(workdir.glob('*/**/run.json'))
    held = facts.get('held_fixed', {})
    own = {name for arm in facts['arms'] for name in own_classes(arm['objective'])}
    if begun and own and config_file and edited(facts, config_file):
        raise UserError(
            f'{config_file.path} defines {", ".join(sorted(own))} and has changed since {workdir} '
            'was begun, so runs would not be trained alike: use another --workdir, or the file of '
            f'then, {workdir / OWN_FILE}'
        )
    if begun and held.get(TRAINING_CODE) not in (None, training_code()):
        raise UserError(
            f'the code that trains has changed since {workdir} was begun, so runs would not be '
            'trained alike: use another --workdir, or the code of then '
            f'(git commit {(read_run(begun[0].parent) or {}).get("git_commit")})'
        )
    if begun and isinstance(facts.get('versions'), dict):
        lines = difference(facts['versions'], versions())
        if lines:
            raise UserError(
                f'{workdir} was begun with other versions: {"; ".join(lines)}. Use those, or '
                'another --workdir'
            )
    measured = sorted(workdir.glob(f'*/**/{FINISHED}'))
    code = held.get(EVALUATION_CODE)
    if measured and code != evaluation_code():
        raise UserError(
            f'the code that evaluates has changed since {measured[0]} was written, so runs would '
            f'not be measured alike: delete every {FINISHED} in {workdir} to measure all again '
            '(no run is trained again), or use another --workdir'
        )


def check_proof(workdir: Path, proof: Proof) -> None:
    """Raise UserError where what follows from files has changed under the settings of a grid that
    goes on: its documents and their order, its tokenizer, the initial weights. (Of `start` each run
    records what it began with.)"""
    held = (read(workdir) or {}).get('held_fixed', {})
    changed = [
        name
        for name in held.keys() & proof.held_fixed.keys()
        if name.startswith(OF_FILES) and held[name] != proof.held_fixed[name]
    ]
    if changed and any(workdir.glob('*/**/run.json')):
        raise UserError(
            f'{workdir} was begun with other files, so runs would not be trained alike: changed '
            f'are {", ".join(sorted(changed))}. Use the files of then, or another --workdir'
        )


def check_here(workdir: Path) -> None:
    """Raise UserError where this process runs other code or versions than those that began the
    grid: another checkout on another host, say."""
    facts = read(workdir) or {}
    held = facts.get('held_fixed', {})
    for what, code in ((TRAINING_CODE, training_code()), (EVALUATION_CODE, evaluation_code())):
        if held.get(what) not in (None, code):
            raise UserError(f'the {what} here is not that which began {workdir}: use that')
    lines = difference(facts.get('versions') or {}, versions()) if facts.get('versions') else []
    if lines:
        raise UserError(f'{workdir} was begun with other versions: {"; ".join(lines)}. Use those')


def write(
    workdir: Path,
    grid: Grid,
    proof: Proof,
    command: str,
    *,
    config_file: ConfigFile | None = None,
    tuning: dict[str, Any] | None = None,
) -> None:
    """Write grid.json, and the `config_file` that defines the grid; when the grid goes on, its
    beginning and its earlier commands stay. `tuning` is what the choice of rates made, {} where
    that has yet to be."""
    before = read(workdir) or {}
    if tuning is not None:
        grid, tuning = _tuned(grid, before, tuning)
    commands = str(before.get('command') or '').splitlines()
    facts = {
        **_plan(grid),
        'seeds': max(grid.seeds, int(before.get('seeds') or 0)),
        'held_fixed': {**before.get('held_fixed', {}), **proof.held_fixed},
        'may_differ': list(grid.may_differ),
        'match': grid.match,
        'again': grid.again,
        'tuned': grid.tuned,
        **({} if tuning is None else {TUNING: tuning}),
        **({FOLDER: baselines.groups(grid)} if grid.baselines else {}),
        'budget': [asdict(row) for row in proof.budget],
        'command': '\n'.join(dict.fromkeys([*commands, command])),
        **({} if config_file is None else {'configuration': config_file.facts()}),
        'versions': versions(),
        'device': before.get('device', ''),
        'started': before.get('started') or datetime.now(UTC).isoformat(timespec='seconds'),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir, facts)
        if config_file is not None:
            config_file.keep(workdir)
    except OSError as error:
        raise _unwritable(workdir, error) from error


def _write(workdir: Path, facts: dict[str, Any]) -> None:
    write_atomically(workdir / NAME, json.dumps(facts, indent=1, ensure_ascii=False))


def retune(workdir: Path, grid: Grid, tuning: dict[str, Any]) -> None:
    """Record the rates that were chosen: the arms of `grid` have them."""
    facts = read(workdir) or {}
    grid, tuning = _tuned(grid, facts, tuning)
    _write(workdir, {**facts, **_plan(grid), TUNING: tuning})


def _tuned(
    grid: Grid, before: dict[str, Any], tuning: dict[str, Any]
) -> tuple[Grid, dict[str, Any]]:
    """With the rates that were recorded meanwhile: of other arms, on other slices of a pod."""
    tuning = {**(before.get(TUNING) or {}), **tuning}
    return at_rates(grid, {arm: found['rate'] for arm, found in tuning.items()}), tuning


def note_device(workdir: Path) -> None:
    """Record on what devices the runs were made, as they say."""
    facts = read(workdir)
    if facts is None:
        return
    found = [read_run(path.parent) or {} for path in workdir.glob('*/**/run.json')]
    devices = {f'{run.get("devices", 1)} x {run["device"]}' for run in found if 'device' in run}
    _write(workdir, {**facts, 'device': ', '.join(sorted(devices))})


def rates(workdir: Path) -> dict[str, float] | None:
    """The rate that was chosen for each arm; None where the grid is not tuned, {} where they have
    yet to be chosen."""
    tuning = (read(workdir) or {}).get(TUNING)
    return None if tuning is None else {arm: found['rate'] for arm, found in tuning.items()}


def planned(workdir: Path, place: str) -> tuple[Planned, Suite]:
    """The run at `place` of the grid in `workdir`, as it was checked, and how it is measured."""
    facts = read(workdir)
    if facts is None:
        raise UserError(f'{workdir} holds no grid: begin one with {installed.command("compare")}')
    know_objectives(workdir, facts, *(arm['experiment'] for arm in facts['arms']))
    experiments = _experiments(facts)
    of_baseline = place.startswith(f'{FOLDER}/')
    name = baselines.arm_of(place, next(iter(experiments))) if of_baseline else place.split('/')[0]
    if name not in experiments:
        raise UserError(f'{workdir} has no arm {name!r}: {nearest(name, list(experiments))}')
    arm = Arm(name, from_dict(experiments[name]))
    run = baselines.at_place(arm, place) if of_baseline else at_place(arm, place)
    return run, from_plain(Suite, facts['suite'])


def _plan(grid: Grid) -> dict[str, Any]:
    arms = []
    for arm in grid.arms:
        plain = to_dict(arm.experiment)
        arms.append(
            {
                'name': arm.name,
                'objective': plain['objective'],
                'model': plain['model'],
                'digest': digest(arm.experiment),
                'experiment': plain,
            }
        )
    return {'name': grid.name, 'title': grid.title, 'arms': arms, 'suite': to_plain(grid.suite)}


def _whole(facts: dict[str, Any]) -> dict[str, Any]:
    """What a grid has beside its arms that makes it the one it is, as of `_experiments`."""
    return {'name': facts.get('name'), 'suite': _plain(from_plain(Suite, facts.get('suite') or {}))}


def _experiments(facts: dict[str, Any]) -> dict[str, Any]:
    """The experiment of each arm, as plain values; a setting that the record lacks, since it was
    written before there was one, has its default."""
    return {arm['name']: _plain(from_dict(arm['experiment'])) for arm in facts['arms']}


def _plain(value: Any) -> Any:
    plain = to_dict(value) if isinstance(value, Experiment) else to_plain(value)
    return json.loads(json.dumps(plain))
