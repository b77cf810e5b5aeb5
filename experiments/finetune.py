"""Fine-tune a model:
`python -m experiments.finetune text --from smollm2 --data.files my.jsonl --workdir runs/mine`.

--from names what it begins with: a run of this project (RUN, RUN@STEP, RUN@best), the directory of
a model of others, a .gguf file, or smollm2. --check reads all records and trains nothing;
--show-examples 3 prints the first ones with their tokens coloured by loss weight. Started again
with the same command it goes on from the newest checkpoint. In the end the run's directory holds
report.html, with figures and texts before and after.
"""

from __future__ import annotations

from configs import finetune
from experiments import cli, pretrain
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment
from llama_jax.train.labels import labelled


def main() -> None:
    try:
        experiment, options = cli.read('finetune', __doc__, tunes=True, **pretrain.OPTIONS)
        _check(experiment)
        pretrain.run(labelled(experiment), options)
    except UserError as error:  # whoever typed --from looks for it
        raise UserError(str(error).replace('--start', '--from')) from error


def _check(experiment: Experiment) -> None:
    if experiment.start is None and experiment.model == finetune.ANY:
        raise UserError(
            'nothing to tune: give --from RUN, --from smollm2, a .gguf file or the directory of a '
            'model'
        )
    if not experiment.data.sources:
        raise UserError("no data to tune on: give --data.files my.jsonl, or --data.mix 'a.jsonl=2'")


if __name__ == '__main__':
    cli.main(main)
