"""The scalars of a run in Weights & Biases, beside metrics.jsonl.

Nothing depends on it: what fails there is said once, and the run goes on without.
"""

from __future__ import annotations

import importlib
import json
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_jax.errors import UserError
from llama_jax.train.progress import say

FILE = 'wandb.json'
"""In the workdir: which run there is this one, however often it goes on."""


def package(project: str) -> ModuleType:
    """The package. Raises UserError where it is not installed, or no project is named."""
    if not project:
        raise UserError('--wandb: give the name of a project')
    try:
        found = importlib.import_module('wandb')
    except ImportError as error:
        raise UserError(
            f"--wandb {project}: wandb is missing ({error}): pip install 'wandb>=0.22'"
        ) from error
    if not hasattr(found, 'init'):  # a directory of that name, such as offline runs leave
        raise UserError(f"--wandb {project}: wandb is not installed: pip install 'wandb>=0.22'")
    return found


class Mirror:
    """One run there. A run that goes on after `step` steps has the id that it began with; what it
    does a second time after a kill, wandb leaves out, which has equal values from before."""

    def __init__(self, project: str, workdir: Path, config: dict[str, Any], *, step: int) -> None:
        self._run: Any = None
        try:
            wandb = package(project)
            path = workdir / FILE
            known = json.loads(path.read_text()) if step and path.exists() else {}
            if known.get('project') != project:
                known = {'project': project, 'id': secrets.token_hex(4)}
                path.write_text(json.dumps(known))
            self._run = wandb.init(
                project=project,
                id=known['id'],
                resume='allow',
                name=config.get('name'),
                config=config,
                dir=str(workdir),
                settings=wandb.Settings(console='off', quiet=True),
            )
        except Exception as error:  # noqa: BLE001  whatever it is, the run is worth more
            self._failed(error)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add one point to each of these curves."""
        if self._run is not None:
            try:
                self._run.log(numbers, step=step)
            except Exception as error:  # noqa: BLE001  as above
                self._failed(error)

    def close(self) -> None:
        """Wait until all is sent."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001  as above
                self._failed(error)
            self._run = None

    def _failed(self, error: Exception) -> None:
        self._run = None
        reason = next(iter(str(error).strip().splitlines()), '')
        say(f'wandb failed, and the run goes on without it: {type(error).__name__}: {reason}')
