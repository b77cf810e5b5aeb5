"""Live comparison with trl: DPO and reward models, loss and gradients of the same batch in float32.

What trl does not have (conservative smoothing, which its 'sigmoid' ignores, and the NLL term per
answer) is compared with formulas in tests/objectives/test_preference.py.
"""

import jax
import numpy as np
import pytest

from llama_jax.data.pieces import Encoded
from llama_jax.model import layers
from llama_jax.objectives.preference import DPO, answer_log_probs
from llama_jax.objectives.reward import RewardModel
from llama_jax.train.place import place
from tests.objectives import preferred
from tests.parity.cases import CASES
from tests.parity.training import (
    COMPUTE,
    assert_gradients_equal,
    devices,
    ours,
    params_of,
    peer,
    settings,
)

pytestmark = [
    pytest.mark.parity,
    # trl 1.16 asks transformers 5.23 by the old name.
    pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.* is deprecated:FutureWarning'),
]

CONFIG = CASES['llama2']
SEQ_LEN, PAD = 64, 0
WORDS = [f'w{i}' for i in range(CONFIG.vocab - 3)]
BETA = 0.3


def pairs():
    """Prompts and answers of 1 to 9 words, in texts; margins."""
    random = np.random.default_rng(0)

    def words():
        return ' '.join(random.choice(WORDS, random.integers(1, 10)))

    return [
        {'prompt': words(), 'chosen': f' {words()}', 'rejected': f' {words()}', 'margin': i / 4}
        for i in range(4)
    ]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(['<pad>', '</s>', '<unk>', *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token='<pad>', eos_token='</s>', unk_token='<unk>'
    )


def score():
    return np.random.default_rng(7).normal(size=(1, CONFIG.dim)).astype(np.float32)


def of_batch(batch, completion):
    """Our records of trl's batch, whose first half are the chosen answers."""
    ids, mask = batch['input_ids'].numpy(), batch['attention_mask'].numpy().astype(bool)
    parts = [row[keep].astype(np.int32) for row, keep in zip(ids, mask, strict=True)]
    loss = [row[keep].astype(np.float32) for row, keep in zip(completion, mask, strict=True)]
    n = len(parts) // 2
    margins = np.zeros(n) if 'margin' not in batch else batch['margin'].numpy()
    return [
        Encoded((parts[i], parts[n + i]), (loss[i], loss[n + i]), float(margins[i]))
        for i in range(n)
    ]


def packed(objective, records, given=None):
    return preferred.batch(objective, records, given, rows=4, seq_len=SEQ_LEN)


def references(objective, records):
    batch = packed(objective, records)
    with jax.set_mesh(devices()):
        sums = jax.jit(
            lambda params, batch: answer_log_probs(
                layers.bind(CONFIG, params), batch, compute=COMPUTE, key=None
            )
        )(params_of(CONFIG, 1), place(batch, devices()))
    pairs_BM2 = np.stack(jax.device_get(sums), axis=-1)
    counts = batch['chosen/segments'].max(1)
    return np.array([pairs_BM2[b, m] for b, n in enumerate(counts) for m in range(n)])


@pytest.mark.parametrize('loss_type', ['sigmoid', 'ipo'])
def test_dpo_equals_trl(loss_type, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{name: row[name] for name in ('prompt', 'chosen', 'rejected')} for row in pairs()]
    trainer = DPOTrainer(
        model=peer(CONFIG, pad_token_id=PAD),
        ref_model=peer(CONFIG, seed=1, pad_token_id=PAD),
        args=DPOConfig(**settings(tmp_path), beta=BETA, loss_type=loss_type),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    records = of_batch(batch, batch['completion_mask'].numpy())
    assert all(ids[-1] == 1 for record in records for ids in record.parts)  # ends with eos
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    objective = DPO(beta=BETA, loss_type=loss_type)
    own, (gradients, _) = ours(
        CONFIG, objective, packed(objective, records, references(objective, records)), {}
    )
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    assert_gradients_equal(gradients, trainer.model, CONFIG)


def test_reward_model_with_margins_equals_trl(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {'chosen': row['prompt'] + row['chosen'], 'rejected': row['prompt'] + row['rejected']}
        | {'margin': row['margin']}
        for row in pairs()
    ]
    trainer = RewardTrainer(
        model=peer(CONFIG, head=score(), pad_token_id=PAD, num_labels=1),
        args=RewardConfig(**settings(tmp_path), disable_dropout=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    batch['margin'] = batch.get('margin')
    assert batch['margin'] is not None
    records = of_batch(batch, np.ones(batch['input_ids'].shape))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    objective = RewardModel()
    own, (gradients, extra) = ours(
        CONFIG, objective, packed(objective, records), {'head_D': score()[0]}
    )
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    assert_gradients_equal(gradients, trainer.model, CONFIG)
    theirs = trainer.model.score.weight.grad.numpy()[0]
    assert np.linalg.norm(extra['head_D'] - theirs) < 1e-5 * np.linalg.norm(theirs)
