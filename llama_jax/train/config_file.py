"""The user's Python file that defines a configuration, kept in the directory of the run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = 'configuration.py'
"""In the run's directory: the file as it was."""


@dataclass(frozen=True)
class ConfigFile:
    """`path/to/mine.py:NAME`, and the text of the file."""

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


def edited(facts: dict[str, Any], config_file: ConfigFile | None) -> list[str]:
    """What to say where a run goes on, of which the record `facts` tells: the file is another than
    before. Its settings are compared by themselves, and decide whether the run may go on."""
    before = facts.get('configuration')
    if config_file is None or not before or before['sha256'] == config_file.digest:
        return []
    return [
        f'{config_file} is not as it was when the run was last started (sha256 '
        f'{before["sha256"][:12]} -> {config_file.digest[:12]}); its {NAME} is written anew'
    ]
