"""Where a configuration in a file of one's own was written down: kept in the run's directory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = 'configuration.py'
"""In the run's directory: the file as it was."""


@dataclass(frozen=True)
class Written:
    """A file of Python, and the name in it."""

    path: Path
    name: str
    source: bytes

    def __str__(self) -> str:
        return f'{self.path}:{self.name}'

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def facts(self) -> dict[str, Any]:
        """For run.json and grid.json."""
        return {'file': str(self.path), 'name': self.name, 'sha256': self.digest}

    def keep(self, workdir: Path) -> None:
        """Write the file's text into a run's directory."""
        (workdir / NAME).write_bytes(self.source)


def changed(facts: dict[str, Any], written: Written | None) -> list[str]:
    """What to say where a run goes on, of which the record `facts` tells: the file is another than
    before. Its settings are compared by themselves, and decide whether the run may go on."""
    before = facts.get('configuration')
    if written is None or not before or before['sha256'] == written.digest:
        return []
    return [
        f'{written} is not as it was when the run was last started (sha256 '
        f'{before["sha256"][:12]} -> {written.digest[:12]}); its {NAME} is written anew'
    ]
