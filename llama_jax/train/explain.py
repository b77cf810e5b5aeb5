"""What a run will do, said before it does: sizes, text, time, memory, files."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from llama_jax import trees
from llama_jax.data.config import cache_dir
from llama_jax.errors import UserError
from llama_jax.optim.schedule import ScheduleConfig
from llama_jax.train import agreement, resume
from llama_jax.train.checkpoint import Checkpoints, present
from llama_jax.train.experiment import Experiment
from llama_jax.train.flops import flops_per_token
from llama_jax.train.records import read_run
from llama_jax.train.run import Run, prepare
from llama_jax.train.workdir import in_use, unsaved
from llama_jax.units import duration, size

STEPS = 5
"""Steps that are timed, after one that is not."""
VALIDATION_BATCHES = 8
_LINE_BYTES = 700
"""Of a line in metrics.jsonl and its points for TensorBoard."""


def explain(experiment: Experiment, workdir: Path) -> str:
    """What a run of `experiment` in `workdir` will do, as text for a terminal.

    It compiles the step and takes a few on the devices, in a directory of its own that is removed;
    nothing in `workdir` changes. Raises UserError for whatever a run would refuse before its first
    step, but for what is in `workdir`: that is said.
    """
    with agreement.together(), _scratch(workdir) as scratch, prepare(experiment, scratch) as run:
        with jax.set_mesh(run.mesh):
            seconds, waited = _step_seconds(run)
            opening, validation = _validation_seconds(run)
        sections = {
            'model': _model(run),
            'training': _training(run),
            'text': _text(run),
            'learning rate': [rate_in_words(run.experiment.optimizer.schedule, _train(run).steps)],
            'time': _time(run, seconds, waited, opening, validation),
            'memory': _memory(run),
            'files': _files(run, workdir),
            'start': _start(run, workdir),
        }
    width = max(map(len, sections))
    return '\n'.join(
        f'{name if not i else "":<{width}}  {line}'
        for name, lines in sections.items()
        for i, line in enumerate(lines)
    )


@contextlib.contextmanager
def _scratch(workdir: Path) -> Iterator[Path]:
    """A directory for what a run writes at its start, removed afterwards. Several processes need
    the same one, on a file system that they share: it is beside `workdir`."""
    if jax.process_count() == 1:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    directory = workdir.with_name(f'.{workdir.name}.explain')
    try:
        yield directory
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _train(run: Run) -> Any:
    return run.experiment.train


def _step_seconds(run: Run) -> tuple[float, float]:
    """Seconds of a step, the median of a few, and those of them that it waits for data."""
    each, waiting = [], []
    for _ in range(STEPS + 1):
        begin, waited = time.perf_counter(), run.loader.seconds_waited
        run.state, metrics = run.step(run.state, run.place(run.read()))
        jax.block_until_ready((run.state, metrics))
        each.append(time.perf_counter() - begin)
        waiting.append(run.loader.seconds_waited - waited)
    return statistics.median(each[1:]), statistics.median(waiting[1:])


def _validation_seconds(run: Run) -> tuple[float, float]:
    """Seconds of a validation up to its first batch, and of each batch; 0 where there is none."""
    if run.validate is None:
        return 0.0, 0.0

    def some(batches: int) -> tuple[float, int]:
        asked = [0]

        def stop() -> bool:
            asked[0] += 1
            return asked[0] > batches

        begin = time.perf_counter()
        run.validate(run.state.evaluated, stop)  # type: ignore[misc]
        return time.perf_counter() - begin, max(1, min(asked[0], batches))

    some(1)  # compiles
    opening, _ = some(1)
    seconds, batches = some(1 + VALIDATION_BATCHES)
    if batches == 1:
        return 0.0, opening
    each = max(seconds - opening, 0.0) / (batches - 1)
    return max(opening - each, 0.0), each


def _model(run: Run) -> list[str]:
    model, devices = run.experiment.model, run.mesh.devices.size
    axes = ' x '.join(f'{name} {size}' for name, size in run.mesh.shape.items() if size > 1)
    return [
        f'{trees.size(run.state.params):,} parameters: {model.layers} layers of {model.dim}, '
        f'vocabulary of {model.vocab:,}',
        f'{type(run.experiment.objective).__name__} on {devices} device'
        f'{"s" if devices > 1 else ""} ({run.mesh.devices.flat[0].device_kind}'
        f'{f", mesh {axes}" if axes else ""}) in {jax.process_count()} process'
        f'{"es" if jax.process_count() > 1 else ""}',
    ]


def _training(run: Run) -> list[str]:
    train = _train(run)
    a_step = train.batch * train.seq_len
    micro = f' in {train.accumulate} microbatches' if train.accumulate > 1 else ''
    flops = flops_per_token(replace(run.experiment, train=train))
    return [
        f'{train.steps:,} steps of {train.batch} x {train.seq_len} = {a_step:,} tokens{micro}: '
        f'{train.steps * a_step:,} tokens, {train.steps * a_step * flops:.3g} FLOPs'
    ]


def _text(run: Run) -> list[str]:
    read = run.loader.will_read(_train(run).steps)
    lines = []
    for label, texts in zip(run.loader.labels, run.loader.texts, strict=True):
        end = f'/{label}' if len(run.loader.labels) > 1 else ''
        share = f', {read[f"share{end}"]:.1%} of all' if end else ''
        lines.append(
            f'{label}: {len(texts):,} documents, {texts.tokens:,} tokens '
            f'({size(texts.bytes)}); {read[f"epochs{end}"]:.3g} epochs are read, '
            f'{read[f"documents{end}"]:,} documents begun{share}'
        )
    return lines


def rate_in_words(config: ScheduleConfig, steps: int) -> str:
    """How the learning rate of a run of `steps` goes."""
    peak, warmup = f'{config.peak:.3g}', config.warmup(steps)
    rises = f'rises over {warmup:,} steps to {peak}, ' if warmup else f'begins at {peak}, '
    last = f'{config.peak * config.final:.3g} after step {steps:,}'
    if config.kind == 'cosine':
        return f'{rises}then falls as a cosine to {last}'
    if config.kind == 'constant':
        return f'{rises}then stays there'
    if config.kind == 'inverse_sqrt':
        end = config.peak * math.sqrt((warmup + 1) / max(steps, warmup + 1))
        return f'{rises}then falls as 1 / sqrt(step) to {end:.3g} at step {steps:,}'
    falls = steps - config.decay_steps(steps)
    return f'{rises}stays there until step {falls:,}, then falls in a straight line to {last}'


def _time(run: Run, seconds: float, waited: float, opening: float, validation: float) -> list[str]:
    train, every = _train(run), run.experiment.evaluation.every
    a_step = train.batch * train.seq_len
    peak = (read_run(run.workdir) or {}).get('peak_flops')
    flops = flops_per_token(replace(run.experiment, train=train))
    speed = a_step / seconds
    mfu = f', MFU {speed * flops / (peak * run.mesh.devices.size):.1%}' if peak else ''
    lines = [
        f'{duration(train.steps * seconds)} of training in all: {seconds:.3g} s a step, '
        f'{speed:,.0f} tokens/s{mfu} (median of {STEPS} steps taken here, after one to warm up)',
        f'{waited / seconds:.0%} of a step waits for data',
    ]
    if run.validate is not None:
        batches = sum(
            n or math.ceil(run.validate.tokens / a_step / len(run.validate.batches))
            for n in run.validate.batches
        )
        times = math.ceil(train.steps / every) + (run.experiment.start is not None)
        whole = times * (opening + batches * validation)
        lines.append(
            f'{duration(whole)} of validation in all: {times:,} times about {batches:,} batches '
            f'of {validation:.3g} s (measured on {VALIDATION_BATCHES}) and {opening:.2g} s to begin'
        )
    else:
        lines.append('no validation')
    return lines


def _memory(run: Run) -> list[str]:
    stats: Any = run.step.memory_analysis()  # type: ignore[attr-defined]
    device = run.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get('bytes_limit')
    whole = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    whole += stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        f'{size(whole)} a device{f" of {size(limit)}" if limit else ""}: '
        f'{size(stats.argument_size_in_bytes)} state and batch '
        f'({size(_of_optimizer(run))} of {type(run.experiment.optimizer).__name__}), '
        f'{size(stats.temp_size_in_bytes)} in a step (as the compiler says)',
        f'{size(peak * (1 if sys.platform == "darwin" else 1024))} of the host, up to now',
    ]


def _of_optimizer(run: Run) -> int:
    """Bytes of its state on the device that has most of it."""
    used: dict[Any, int] = {}
    for x in jax.tree.leaves(run.state.optimizer):
        for shard in x.addressable_shards:
            used[shard.device] = used.get(shard.device, 0) + shard.data.nbytes
    return max(used.values())


def _files(run: Run, workdir: Path) -> list[str]:
    saving, train = run.experiment.checkpoint, _train(run)
    state = run.state
    saves = (state.params, state.average, state.optimizer, state.carried)
    each = sum(x.nbytes for x in jax.tree.leaves(saves))
    saved = {train.steps}
    validated = run.experiment.evaluation.every if run.experiment.evaluation.patience else 0
    for every in (saving.every, saving.keep_every, validated):
        saved |= set(range(every, train.steps + 1, every)) if every else set()
    kept = set(sorted(saved)[-saving.keep :])
    if saving.keep_every:
        kept |= {step for step in saved if step % saving.keep_every == 0}
    best = run.validate is not None and len(saved) > len(kept)
    n = len(kept) + best
    lines = -(-train.steps // train.log_every)
    where = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(where).free
    by_time = f', one every {saving.minutes:g} minutes' if saving.minutes else ''
    return [
        f'{workdir}/checkpoints: {len(saved):,} are saved{by_time}, {n:,} of {size(each)} stay'
        f'{", the best among them" if best else ""}: {size(n * each)}, and one more while saving '
        f'({size(free)} are free there)',
        f'{workdir}: run.json, metrics.jsonl, tensorboard/, the tokenizer, report.html: about '
        f'{size(lines * _LINE_BYTES + 1_000_000)}',
        f'{cache_dir()}: the prepared text and its tokens, there already',
    ]


def _start(run: Run, workdir: Path) -> list[str]:
    """What the run would find in its directory, which is only looked at."""
    taken = in_use(workdir)
    if taken is not None:
        return [f'refused: {taken}']
    try:
        if unsaved(workdir):
            return ['begins anew: an earlier run there ended before its first checkpoint']
        resume.check_workdir(workdir, run.experiment)
        return _going_on(run, workdir)
    except UserError as error:
        return [f'refused: {error}']


def _going_on(run: Run, workdir: Path) -> list[str]:
    steps = present(workdir / 'checkpoints')
    if not steps:
        begins = f'with the parameters of {run.experiment.start}' if run.experiment.start else ''
        return [f'begins in {workdir} {begins}'.rstrip()]
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=len(steps), read_only=True)
    with contextlib.closing(checkpoints):
        metadata = checkpoints.metadata(steps[-1])
    tokenizer = str(run.metadata['tokenizer'])
    resume.check_metadata(metadata, run.experiment, tokenizer, workdir)
    resume.check_data(metadata, run.loader.digest, run.experiment, workdir)
    _, notes = resume.continuation(metadata, run.experiment, workdir)
    left = _train(run).steps - steps[-1]
    goes = f'goes on from step {steps[-1]:,}: {left:,} are left' if left else 'is finished'
    return [f'the run in {workdir} {goes}', *notes]
