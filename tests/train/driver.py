"""Trains in a process of its own and sends itself a signal: `driver.py STEP:SIGNAL[:PROCESS] ...`.

It comes when the record of STEP is written; of several processes only to the one named. FAIL in
place of a signal is an exception; `in:DIRECTORY` starts process K in DIRECTORY/K, and `chats:` is
no signal: chats are learnt.
"""

import dataclasses
import os
import signal
import sys

from experiments import cli, pretrain
from llama_jax import runtime
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.train import loop, run


def main() -> None:
    when, number, *only = sys.argv[1].split(':')
    if when == 'in':
        os.chdir(f'{number}/{os.environ[runtime.PROCESS]}')
    sys.argv[1:] = sys.argv[2:]
    run.peak_flops = lambda device: (1e12, 'of a test')
    finish = loop._finish

    def finish_and_strike(prepared, pending):
        told = finish(prepared, pending)
        struck = not only or only == [os.environ.get(runtime.PROCESS)]
        if struck and pending is not None and str(pending.step) == when:
            if number == 'FAIL':
                raise RuntimeError('a device is gone')
            os.kill(os.getpid(), signal.Signals[number])
        return told

    loop._finish = finish_and_strike
    cli.main(chats if when == 'chats' else pretrain.main)


def chats() -> None:
    experiment, options = cli.read('pretrain', __doc__, **pretrain.OPTIONS)
    runtime.initialize()
    loop.train(dataclasses.replace(experiment, objective=InstructionTuning()), options.workdir)


if __name__ == '__main__':
    main()
