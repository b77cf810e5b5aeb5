"""Jobs for worker processes, which import them."""

import dataclasses
import time

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
