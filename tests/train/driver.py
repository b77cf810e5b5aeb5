"""Trains in a process of its own and sends itself a signal: `driver.py WHEN:SIGNAL ... OPTIONS`.

WHEN is the step whose record was written last, or `compile`: while the step is compiled.
"""

import os
import signal
import sys

from experiments import cli, pretrain
from llama_jax.train import loop, run

PEAK = 1e12


def main() -> None:
    when, number = sys.argv[1].split(':')
    sys.argv[1:] = sys.argv[2:]
    run.peak_flops = lambda device: (PEAK, 'of a test')
    finish, make_step = loop._finish, run.train_step

    def strike() -> None:
        os.kill(os.getpid(), signal.Signals[number])

    def finish_and_strike(prepared, pending):
        told = finish(prepared, pending)
        if pending is not None and str(pending.step) == when:
            strike()
        return told

    def strike_and_make_step(*args, **settings):
        if when == 'compile':
            strike()
        return make_step(*args, **settings)

    loop._finish, run.train_step = finish_and_strike, strike_and_make_step
    cli.main(pretrain.main)


if __name__ == '__main__':
    main()
