"""Jobs for worker processes, which import them."""

import dataclasses
import os
import signal
import time
from pathlib import Path

from llama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Failing:
    """A job that fails, late or at once."""

    number: int
    pause: float = 0.0

    def run(self, seen):
        time.sleep(self.pause)
        seen(5)
        if self.number == 9:
            raise ZeroDivisionError
        if self.number:
            raise UserError(f'job {self.number}')
        return self.number


@dataclasses.dataclass(frozen=True)
class Leaving:
    """A job that notes its process and ends."""

    note: Path

    def run(self, seen):
        self.note.write_text(str(os.getpid()))


@dataclasses.dataclass(frozen=True)
class Killing(Leaving):
    """A job that kills the process of `Leaving`, once that has nothing to do."""

    def run(self, seen):
        while not (self.note.exists() and self.note.read_text()):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(int(self.note.read_text()), signal.SIGKILL)
        time.sleep(0.2)
        return 'done'
