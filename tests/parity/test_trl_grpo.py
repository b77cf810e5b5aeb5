"""Live comparison with trl: the loss of GRPO and its gradients on the same completions in float32,
in each of its normalisations that we have."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.convert import huggingface
from llama_jax.data import packing
from llama_jax.model import layers
from llama_jax.objectives.grpo import GRPO, advantages
from llama_jax.objectives.rollout import Drawn, Rollout
from llama_jax.train.place import place
from tests.parity.test_trl_preferences import CONFIG, PAD, tokenizer
from tests.parity.training import COMPUTE, devices, params_of, peer, settings

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.* is deprecated:FutureWarning'),
]

P, G, MOST = 4, 2, 7
ROLLOUT = Rollout(completions=G, max_tokens=MOST)
OURS = GRPO(ROLLOUT, updates=2, eps_low=0.1, eps_high=0.2, beta=0.05)
NORMALISERS = {'tokens': 'dapo', 'sequences': 'grpo', 'constant': 'dr_grpo'}


def completions():
    """Groups of prompts and completions of any length, the longest of them truncated."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(P):
        prompt = rng.integers(3, CONFIG.vocab, rng.integers(1, 6)).astype(np.int32)
        group = []
        for _ in range(G):
            n = int(rng.integers(1, MOST + 1))
            tokens = rng.integers(3, CONFIG.vocab, n).astype(np.int32)
            group.append(Drawn(prompt, tokens, np.zeros(n, np.float32), n == MOST))
        drawn.append(group)
    return drawn


def theirs(tmp_path, normaliser, drawn, old, reference, advantage):
    """trl's loss and the gradients of its model, both float32."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = peer(CONFIG, pad_token_id=PAD)
    options = settings(tmp_path)
    del options['max_length']
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            **options,
            loss_type=NORMALISERS[normaliser],
            epsilon=OURS.eps_low,
            epsilon_high=OURS.eps_high,
            use_bias_correction_kl=False,  # times the ratio (DeepSeek-V3.2), which is no k3
            num_generations=G,
            max_completion_length=MOST,
        ),
        train_dataset=Dataset.from_list([{'prompt': 'w1'}] * 4),
        processing_class=tokenizer(),
    )
    trainer.beta = OURS.beta  # a reference of its own it would look for on the hub
    trainer.current_gradient_accumulation_steps = 1
    flat = [one for group in drawn for one in group]
    n = max(len(one.prompt) for one in flat)
    arrays = {
        'prompt_ids': np.full((len(flat), n), PAD),
        'prompt_mask': np.zeros((len(flat), n), int),
        'completion_ids': np.full((len(flat), MOST), PAD),
        'completion_mask': np.zeros((len(flat), MOST), int),
        'old_per_token_logps': np.zeros((len(flat), MOST), np.float32),
        'ref_per_token_logps': np.zeros((len(flat), MOST), np.float32),
    }
    for i, one in enumerate(flat):
        m = len(one.tokens)
        arrays['prompt_ids'][i, n - len(one.prompt) :] = one.prompt
        arrays['prompt_mask'][i, n - len(one.prompt) :] = 1
        arrays['completion_ids'][i, :m] = one.tokens
        arrays['completion_mask'][i, :m] = 1
        arrays['old_per_token_logps'][i, :m] = old[i]
        arrays['ref_per_token_logps'][i, :m] = reference[i]
    inputs = {name: torch.tensor(x) for name, x in arrays.items()}
    inputs['advantages'] = torch.tensor(advantage.reshape(-1).astype(np.float32))
    inputs['num_items_in_batch'] = inputs['completion_mask'].sum()
    model.train()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return float(loss.detach()), {name: x.grad.numpy() for name, x in model.named_parameters()}


def laid(objective, drawn, rewards, **given):
    """Our batch, two completions a row; `given` are arrays of each completion by name."""
    examples, _ = objective.completed(drawn, rewards)
    arrays = packing.layout_of(objective.blank(1), pad_id=PAD)
    arrays |= {name: (np.dtype(np.float32), 0, ()) for name in given}
    batch = packing.empty_rows(arrays, rows=P, lengths={'': 32})
    for i, example in enumerate(example for group in examples for example in group):
        here = example['shares'] > 0
        for name, values in given.items():
            example[name] = np.zeros(len(here), np.float32)
            example[name][here] = values[i]
    for row, group in enumerate(examples):
        packing.lay(batch, row, group, lengths={'': 32})
    return batch


def ours(objective, batch):
    """(loss, gradients, log-probabilities of each completion)."""

    def mean(params, batch):
        model = layers.bind(CONFIG, params)
        loss = objective.loss(model, batch, extra={}, compute=COMPUTE, key=None)
        return loss.total / loss.weight, loss.kept['old']

    with jax.set_mesh(devices()):
        program = jax.jit(jax.value_and_grad(mean, has_aux=True))
        (loss, log_p_BT), gradients = jax.device_get(
            program(params_of(CONFIG), place(batch, devices()))
        )
    each = [
        log_p_BT[row][(batch['segments'][row] == segment) & (batch['shares'][row] > 0)]
        for row in range(P)
        for segment in (1, 2)
    ]
    return float(loss), gradients, each


@pytest.mark.parametrize('normaliser', NORMALISERS)
def test_loss_and_gradients_are_trls(normaliser, tmp_path):
    drawn = completions()
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(P, G))
    blank = {'reference': [0.0] * (P * G)}
    _, _, own = ours(OURS, laid(OURS, drawn, rewards, **blank))

    def near():
        return [x + rng.normal(size=len(x)).astype(np.float32) / 5 for x in own]

    old, reference = near(), near()
    wanted, gradients = theirs(
        *(tmp_path, normaliser, drawn, old, reference, advantages(rewards, 'group'))
    )
    objective = replace(OURS, normaliser=normaliser)
    batch = laid(objective, drawn, rewards, old=old, reference=reference)
    loss, found, _ = ours(objective, batch)
    # A mean of terms of either sign and of the size of an advantage, 1.
    assert loss == pytest.approx(wanted, abs=1e-5)
    found = huggingface.params_to_huggingface(found, CONFIG)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(found[name] - gradient)
        assert error < 1e-5 * np.linalg.norm(gradient) + 1e-7, name
