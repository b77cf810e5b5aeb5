"""Checkpoints with Orbax: asynchronous, atomic, restorable onto any mesh and number of hosts."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llama_jax.errors import UserError

log = logging.getLogger(__name__)

Items = dict[str, Any]
"""What a checkpoint holds, by name: pytrees of arrays that can be loaded one without the other."""


class Restored(NamedTuple):
    step: int
    items: Items
    metadata: dict[str, Any]
    damaged: list[str]
    """Newer checkpoints that could not be read, and why."""


SCORES = 'checkpoint-scores.json'
"""Beside the checkpoints: the score of each that was validated, by step; lower is better. 'of' says
what was read for them, 'history' has all validations, and 'saved' says whether a checkpoint was
ever on disk."""


_UNREADABLE_NOW = re.compile(
    'PermissionError|permission denied|PERMISSION_DENIED|too many open files|EMFILE|MemoryError|'
    'cannot allocate memory|RESOURCE_EXHAUSTED|stale file handle',
    re.IGNORECASE,
)
"""Failures that say nothing of a checkpoint: it may be sound."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, the best of those that were validated, and
    those of every `keep_every`-th step (0: none).

    `validated_on`: the digest of what a validation reads. Scores of anything else are given up, for
    they cannot be compared; `forgotten` are their steps. None: there is no validation.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        keep_every: int = 0,
        validated_on: str | None = None,
        read_only: bool = False,
    ):
        policies = ocp.training.preservation_policies
        self.directory = directory
        self._scores: dict[int, float] = {}
        keeps: list[Any] = [policies.LatestN(keep), _Best(self.best)]
        if keep_every:
            keeps.append(policies.EveryNSteps(keep_every))
        self._orbax = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keeps),
            cleanup_tmp_directories=not read_only,  # half-written ones, of a run that was killed
        )
        steps = set(self.steps())  # an earlier run's of the same directory count no more
        of, scores, history = self._read_scores()
        scores = {s: score for s, score in scores.items() if s in steps}
        same = validated_on in (None, of)
        self._of = of if validated_on is None else validated_on
        self._scores = scores if same else {}
        self._history = history if same else {}
        self.forgotten = () if same else tuple(scores)
        self._told_saved = bool(read_only or steps or committed(directory.parent))
        if not self._told_saved:  # whoever finds no checkpoint later knows that none was there
            self._write_scores()

    def save(self, step: int, items: Items, *, metadata: dict[str, Any]) -> None:
        """Begin to save; the arrays may be donated as soon as this returns.

        Raises what an earlier save in the background met, for example a full disk.
        """
        items = jax.tree.map(_plain, items)
        metadata = {**metadata, 'checksums': {name: checksum(item) for name, item in items.items()}}
        try:
            self.wait()
            self._orbax.save_checkpointables_async(
                step, items, force=True, custom_metadata=metadata
            )
        except OSError as error:
            raise self._save_failed(error) from error

    def validated(self, step: int, score: float | None) -> None:
        """Note the score of a validation after `step`, None for one that was not finite; of the
        checkpoints the one with the lowest is kept. All processes call this with the same
        values."""
        self._history = {s: x for s, x in self._history.items() if s < step} | {step: score}
        steps = self.steps()
        if score is not None and step in steps:
            self._scores = {s: x for s, x in {**self._scores, step: score}.items() if s in steps}
        self._write_scores()

    def _write_scores(self) -> None:
        if jax.process_index() == 0:
            path = self.directory.parent / SCORES
            partial = path.with_name(f'.{SCORES}')
            found = {'of': self._of, 'scores': self._scores, 'history': self._history}
            partial.write_text(json.dumps({**found, 'saved': self._told_saved}))
            partial.replace(path)

    def bad_validations(self, step: int) -> int:
        """How many validations in a row, up to that of `step`, were no better than the best before
        them; 0 where that of `step` is not the last."""
        if max(self._history, default=None) != step:
            return 0
        best, n = math.inf, 0
        for _, score in sorted(self._history.items()):
            n = 0 if score is not None and score < best else n + 1
            best = best if score is None else min(best, score)
        return n

    def lowest(self) -> int | None:
        """The step of the best validation, of a checkpoint or not; None where none was finite."""
        known = {step: score for step, score in self._history.items() if score is not None}
        return min(known, key=lambda step: (known[step], step), default=None)

    def has_score(self, step: int) -> bool:
        """Whether the checkpoint of `step` was validated."""
        return step in self._scores

    def best(self) -> int | None:
        """The step of the checkpoint with the lowest score; None when none was validated."""
        steps = set(self.steps())
        known = {step: score for step, score in self._scores.items() if step in steps}
        return min(known, key=lambda step: (known[step], -step), default=None)

    def _read_scores(self) -> tuple[str | None, dict[int, float], dict[int, float | None]]:
        try:
            found = json.loads((self.directory.parent / SCORES).read_text())
            scores = found.get('scores', found)  # all of it, of an earlier version
            known = {int(step): float(score) for step, score in scores.items()}
            history = found.get('history', known).items()
            every = {int(step): None if x is None else float(x) for step, x in history}
            return found.get('of'), known, every
        except (OSError, ValueError, TypeError, AttributeError):  # none yet, or not ours
            return None, {}, {}

    def wait(self) -> None:
        """Block until the save in progress is on disk. Raises UserError if it failed."""
        try:
            self._orbax.wait()
        except Exception as error:  # noqa: BLE001  tensorstore reports a full disk as ValueError
            raise self._save_failed(error) from error
        if not self._told_saved and self.steps():
            self._told_saved = True
            self._write_scores()

    def _save_failed(self, error: Exception) -> UserError:
        return UserError(
            f'a checkpoint could not be saved in {self.directory}: {_first_line(error)}; '
            'free some space (or mend the directory) and start again: the run resumes from '
            f'{self._newest()}'
        )

    def _newest(self) -> str:
        steps = self.steps()
        return f'step {steps[-1]}' if steps else 'its beginning'

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, in order."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as metadata."""
        return self._orbax.checkpointables_metadata(step).custom_metadata or {}

    def restore_newest(
        self,
        abstract: Items,
        *,
        check: Callable[[dict[str, Any]], None] = lambda metadata: None,
        set_aside: bool = False,
    ) -> Restored | None:
        """Load the newest checkpoint that can be read; None when there is none at all.

        Args:
          abstract: shapes, types and target shardings of the items wanted.
          check: is given the metadata before any array is read; raises to refuse.
          set_aside: rename the unreadable ones, so that their steps can be saved again; never all.

        Raises UserError when there are checkpoints and none of them can be read.
        """
        damaged: list[str] = []
        bad_steps: list[int] = []
        for step in reversed(self.steps()):
            try:
                items, metadata = self._load(step, abstract, check)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001  whatever a damaged file makes Orbax raise
                reason = _first_line(error)
                damaged.append(f'checkpoint {step} is damaged and was not used ({reason})')
                log.warning('%s', damaged[-1])
                bad_steps.append(step)
                continue
            if bad_steps and set_aside:
                self._set_aside(bad_steps)
            self._history = {s: score for s, score in self._history.items() if s <= step}
            return Restored(step, items, metadata, damaged)
        if damaged:
            raise UserError(
                f'no checkpoint in {self.directory} can be read, of steps '
                f'{", ".join(map(str, bad_steps))}: use another --workdir, or delete this one to '
                'begin again'
            )
        self._history = {}
        return None

    def restore_step(self, step: int, abstract: Items) -> Restored:
        """Load the checkpoint of `step`, as `restore_newest` does. Raises UserError when it cannot
        be read."""
        try:
            items, metadata = self._load(step, abstract, lambda metadata: None)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f'checkpoint {step} in {self.directory} is damaged ({_first_line(error)}): name '
                f'another of {", ".join(map(str, self.steps()))}'
            ) from error
        return Restored(step, items, metadata, [])

    def _load(
        self, step: int, abstract: Items, check: Callable[[dict[str, Any]], None]
    ) -> tuple[Items, dict[str, Any]]:
        plain = jax.tree.map(_plain_abstract, abstract)
        problem: Exception | None = None
        try:
            metadata = self.metadata(step)
            if 'checksums' not in metadata:
                raise ValueError('its metadata is missing')
            check(metadata)
            loaded = self._orbax.load_checkpointables(step, plain)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  as above
            problem = error
            if _UNREADABLE_NOW.search(_first_line(error)):
                problem = UserError(
                    f'checkpoint {step} in {self.directory} cannot be read ({_first_line(error)}): '
                    'mend that and start again; nothing was changed'
                )
        # One process may have met a damaged file where the others read theirs.
        if np.any(multihost_utils.process_allgather(np.array(problem is not None))):
            raise problem or ValueError('another process could not read it')
        for name, item in loaded.items():
            if checksum(item) != metadata['checksums'][name]:
                raise ValueError(f'the arrays of {name!r} are not those that were saved')
        items = {name: jax.tree.map(_typed, abstract[name], loaded[name]) for name in abstract}
        return items, metadata

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory.parent / f'damaged-checkpoint-{step}'
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices('damaged checkpoints are set aside')
        self._orbax.reload()

    def close(self) -> None:
        self.wait()
        self._orbax.close()


class _Best:
    """Keeps the checkpoint that is the best when another is saved: scores are known only after
    their checkpoints are on disk, which Orbax's own policy does not foresee."""

    def __init__(self, best: Callable[[], int | None]):
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self._best()
        return [checkpoint.step == best for checkpoint in checkpoints]


def present(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in `directory`, which is only looked at."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    return []


def committed(workdir: Path) -> bool | None:
    """Whether a checkpoint of the run in `workdir` was ever on disk; None where nothing says so."""
    try:
        found = json.loads((workdir / SCORES).read_text())
        if 'saved' in found:
            return bool(found['saved'])
        return True if found.get('scores', found) else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom: Orbax puts several layers of its own upon it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    line = next(iter(str(error).strip().splitlines()), '')
    if len(line) > 200:  # between a long path stands what, at the end why
        line = f'{line[:60]} ... {line[-130:]}'
    return f'{type(error).__name__}: {line}'


def checksum(tree: Any) -> int:
    """Sum of the bits of all elements, as words, modulo 2^32: the same on every mesh."""
    return int(sum_of_words(jax.tree.leaves(tree)))


@functools.partial(jax.jit, static_argnames='float32')
def sum_of_words(leaves: list[jax.Array], *, float32: bool = False) -> jax.Array:
    """`checksum` on the devices. `float32`: of the numbers as such, whatever their type."""
    words = [_words(x.astype(jnp.float32) if float32 else x).astype(jnp.uint32) for x in leaves]
    # Each array counts with its own odd factor, so that two exchanged arrays are noticed.
    return sum(jnp.sum(x) * jnp.uint32(2 * i + 1) for i, x in enumerate(words))


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element; of one with 64 bits, both halves."""
    n_bits = min(8 * x.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{n_bits}'))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if not _is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    sharding = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _typed(abstract: Any, leaf: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(leaf) if _is_key(abstract) else leaf


def difference(saved: Any, wanted: Any, prefix: str = '') -> list[str]:
    """Fields in which two nested dicts of plain values differ, as 'model.dim: 256 -> 512'."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        lines: list[str] = []
        for name in sorted(saved.keys() | wanted.keys()):
            lines += difference(saved.get(name), wanted.get(name), f'{prefix}.{name}'.lstrip('.'))
        return lines
    saved, wanted = (list(x) if isinstance(x, (list, tuple)) else x for x in (saved, wanted))
    if isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        pairs = enumerate(zip(saved, wanted, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f'{prefix}.{i}')]
    return [] if saved == wanted else [f'{prefix}: {saved!r} -> {wanted!r}']


def numpy_tree(tree: Any) -> Any:
    """The arrays of `tree` on the host."""
    return jax.tree.map(np.asarray, tree)
