"""Live comparison with trl: DPO and reward models, loss and gradients of the same batch in float32.

What trl does not have (conservative smoothing, which its 'sigmoid' ignores, and the NLL term per
answer) is compared with formulas in tests/objectives/test_preference.py.
"""

import functools

import jax
import numpy as np
import pytest

from llama_jax import layout, mesh
from llama_jax.convert import huggingface, huggingface_config
from llama_jax.data.pieces import Encoded
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.config import Compute
from llama_jax.objectives.preference import DPO, answer_log_probs
from llama_jax.objectives.reward import RewardModel
from llama_jax.train.place import place
from tests.objectives import preferred
from tests.parity.cases import CASES, weights

pytestmark = [
    pytest.mark.parity,
    # trl 1.16 asks transformers 5.23 by the old name.
    pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.* is deprecated:FutureWarning'),
]

CONFIG = CASES['llama2']
COMPUTE = Compute(attention='reference')
SEQ_LEN = 64
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


def peer(seed, *, reward=False):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    settings = huggingface_config.config_to_huggingface(CONFIG)
    config = LlamaConfig(**settings, attn_implementation='eager', pad_token_id=0, num_labels=1)
    tensors = {name: torch.tensor(x) for name, x in weights(CONFIG, seed).items()}
    if reward:
        del tensors['lm_head.weight']
        tensors['score.weight'] = torch.tensor(score())
    model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)
    model.load_state_dict(tensors, strict=True)
    return model


def score():
    return np.random.default_rng(7).normal(size=(1, CONFIG.dim)).astype(np.float32)


def settings(tmp_path):
    return dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        gradient_checkpointing=None,
        activation_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
    )


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


@functools.cache
def devices():
    return mesh.make(MeshConfig(), jax.devices()[:1])


def params_of(seed):
    params = huggingface.params_from_huggingface(weights(CONFIG, seed), CONFIG)
    return jax.device_put(params, layout.shardings(params, devices()))


def ours(objective, records, *, given=None, extra=None):
    """Loss, and its gradients to the model and to the objective's own parameters."""
    batch = preferred.batch(objective, records, given, rows=4, seq_len=SEQ_LEN)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def mean(params, extra, batch):
        model = layers.bind(CONFIG, params)
        loss = objective.loss(model, batch, extra=extra, compute=COMPUTE, key=None)
        return loss.total / loss.weight

    with jax.set_mesh(devices()):
        return jax.device_get(mean(params_of(0), extra or {}, place(batch, devices())))


def references(objective, records):
    batch = preferred.batch(objective, records, rows=4, seq_len=SEQ_LEN)
    with jax.set_mesh(devices()):
        sums = jax.jit(
            lambda params, batch: answer_log_probs(
                layers.bind(CONFIG, params), batch, compute=COMPUTE, key=None
            )
        )(params_of(1), place(batch, devices()))
    pairs_BM2 = np.stack(jax.device_get(sums), axis=-1)
    counts = batch['chosen/segments'].max(1)
    return np.array([pairs_BM2[b, m] for b, n in enumerate(counts) for m in range(n)])


def assert_gradients_equal(gradients, model):
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    mine = huggingface.params_to_huggingface(gradients, CONFIG)
    assert len(theirs.keys() & mine.keys()) > 20
    for name in theirs.keys() & mine.keys():
        error = np.linalg.norm(mine[name] - theirs[name])
        assert error < 1e-5 * np.linalg.norm(theirs[name]) + 1e-7, name


@pytest.mark.parametrize('loss_type', ['sigmoid', 'ipo'])
def test_dpo_equals_trl(loss_type, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{name: row[name] for name in ('prompt', 'chosen', 'rejected')} for row in pairs()]
    trainer = DPOTrainer(
        model=peer(0),
        ref_model=peer(1),
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
    own, (gradients, _) = ours(objective, records, given=references(objective, records))
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    assert_gradients_equal(gradients, trainer.model)


def test_reward_model_with_margins_equals_trl(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {'chosen': row['prompt'] + row['chosen'], 'rejected': row['prompt'] + row['rejected']}
        | {'margin': row['margin']}
        for row in pairs()
    ]
    trainer = RewardTrainer(
        model=peer(0, reward=True),
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

    own, (gradients, extra) = ours(RewardModel(), records, extra={'head_D': score()[0]})
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    assert_gradients_equal(gradients, trainer.model)
    theirs = trainer.model.score.weight.grad.numpy()[0]
    assert np.linalg.norm(extra['head_D'] - theirs) < 1e-5 * np.linalg.norm(theirs)
