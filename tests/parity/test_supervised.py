"""Live comparison with trl (instruction tuning) and transformers (chat templates, classification
heads): ids, masks, losses and gradients of the same records in float32."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.data.record import Chat, Labelled
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.text.chat import Conversation
from llama_jax.text.special import Special
from llama_jax.text.template import Template
from llama_jax.text.tokenizer_json import JsonTokenizer
from tests.objectives.records import batch_of
from tests.parity.cases import CASES
from tests.parity.training import assert_gradients_equal, devices, ours, peer, settings

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.* is deprecated:FutureWarning'),
]

CONFIG = dataclasses.replace(CASES['llama2'], vocab=320)
NAMES = re.compile(r'<\|[^<|>\s]+\|>|<｜[^<｜>\s]+｜>|</?(?:s|start_of_turn|end_of_turn)>')
TOKENS = {'bos_token': '<s>', 'eos_token': '</s>'}
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizers(source, *, size=0):
    """A byte-level vocabulary with the control tokens of a template: theirs, and ours."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    names = sorted({*NAMES.findall(source), *TOKENS.values()})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    n_merges = 40 if not size else size - len(names) - 256
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(names) + n_merges, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(['user assistant system the answer is'] * 9, trainer)
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=library, **TOKENS, pad_token='<s>', chat_template=source
    )
    ids = {name: library.token_to_id(token) for name, token in TOKENS.items()}
    ours = JsonTokenizer(
        library.to_str().encode(), Special(bos_id=ids['bos_token'], eos_id=ids['eos_token'])
    )
    return theirs, ours


def chats():
    user = [' Hi\n', 'What is it? <|im_end|>', '你好 🙂', 'the user is the system']
    answer = ['Hello.', ' The answer is\n\n42. ', '好', 'Yes, the answer']
    for i in range(4):
        said = [{'role': 'system', 'content': 'Be brief.'}] if i == 1 else []
        for k in range(1 + i % 3):
            said.append({'role': 'user', 'content': user[(i + k) % 4]})
            said.append({'role': 'assistant', 'content': answer[(i + 2 * k) % 4]})
        yield said


def templates():
    """Those of real models that come with trl, by name."""
    import trl

    folder = Path(trl.__file__).parent / 'chat_templates'
    return {path.stem: path.read_text('utf-8') for path in sorted(folder.glob('*.jinja'))}


def learnt_of(messages):
    return [i for i, message in enumerate(messages) if message['role'] == 'assistant']


PICTURES = ('idefics3', 'smolvlm', 'llava_next')
"""Contents are parts for these: of a text theirs writes nothing."""


def test_ids_of_real_templates_are_those_of_transformers():
    from jinja2 import TemplateError

    equal = []
    for name, source in templates().items():
        if name.removesuffix('_training') in PICTURES:
            continue
        theirs, ours = tokenizers(source)
        template = Template(source, TOKENS)
        for messages in chats():
            messages = [
                {**one, 'content': one['content'].replace('<|im_end|>', 'end')} for one in messages
            ]
            try:
                expected = theirs.apply_chat_template(messages, return_dict=False)
            except (TemplateError, TypeError, KeyError):
                continue  # without a role
            found = template.turns(Conversation(messages), ours, learnt=learnt_of(messages))
            ids = found.ids.tolist()
            assert ids == expected or ids == [*expected, ours.eos_id], name
            equal.append(name)
    assert len(set(equal)) > 25 and len(equal) > 90


EQUAL = ('cohere', 'gemma', 'gemma3', 'llama3', 'lfm2', 'phi3', 'qwen3_instruct_2507', 'qwen3_vl')


def test_turns_are_what_the_marks_of_trl_say():
    """Of templates that are marked for training; trl also learns the line break behind an end."""
    found = templates()
    for name in EQUAL:
        source, marked = found[name], found[f'{name}_training']
        theirs, ours = tokenizers(source)
        for messages in chats():
            if name.startswith('gemma') and messages[0]['role'] == 'system':
                continue
            told = theirs.apply_chat_template(
                messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
            )
            turns = Template(source, TOKENS).turns(
                Conversation(messages), ours, learnt=learnt_of(messages)
            )
            if turns.ids.tolist() != told['input_ids']:
                assert 'im_end' in str(messages), name  # theirs reads it as a control token
                continue
            mask = np.array(told['assistant_masks'], bool)
            ids = turns.ids[mask & (turns.message < 0)]
            assert {ours.decode([i], show_control=True) for i in ids} <= {'\n', '</s>'}, name
            assert mask[turns.message >= 0].all(), name


def test_instruction_tuning_equals_trl(tmp_path):
    """Two microbatches of theirs, normalised over both; ours is packed, without their marks."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    theirs, tokenizer = tokenizers(MARKED, size=CONFIG.vocab)
    said = [
        [
            {**one, 'content': one['content'].encode('ascii', 'ignore').decode()[:20] or 'x'}
            for one in m
        ]
        for m in chats()
    ]
    said = [
        [{**one, 'content': one['content'].replace('<|im_end|>', 'end')} for one in messages]
        for messages in said
    ]
    trainer = SFTTrainer(
        model=peer(CONFIG),
        args=SFTConfig(
            **settings(tmp_path) | {'per_device_train_batch_size': 2}, assistant_only_loss=True
        ),
        train_dataset=Dataset.from_list([{'messages': messages} for messages in said]),
        processing_class=theirs,
    )
    batches = list(trainer.get_train_dataloader())
    n_items = sum((batch['labels'][:, 1:] != -100).sum() for batch in batches)
    loss = sum(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=n_items) for batch in batches
    )
    loss.backward()

    unmarked = re.sub(r'{% (end)?generation %}', '', MARKED)
    records = [
        Chat(tuple(messages), tuple(float(m['role'] == 'assistant') for m in messages))
        for messages in said
    ]
    objective = InstructionTuning()
    batch = batch_of(
        objective,
        [records[:2], records[2:]],
        tokenizer,
        chat=Template(unmarked, TOKENS),
        seq_len=256,
    )
    assert batch['weights'].sum() == n_items.item() > 40
    own, (gradients, _) = ours(CONFIG, objective, batch, {})
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    assert_gradients_equal(gradients, trainer.model, CONFIG)


@pytest.mark.parametrize('weighted', [False, True])
def test_classification_head_equals_transformers(weighted):
    import torch

    labels = ('a', 'b', 'c')
    class_weights = {'balance': 'given', 'class_weights': (0.5, 1.0, 3.0)} if weighted else {}
    objective = Classification(labels=labels, **class_weights)
    _, tokenizer = tokenizers('', size=CONFIG.vocab)
    records = [
        Labelled(text, labels[i % 3])
        for i, text in enumerate(['the answer', 'user is the', 'a', 'system system is', 'assist'])
    ]
    alone = batch_of(objective, [[record] for record in records], tokenizer, seq_len=64)
    head = np.random.default_rng(7).normal(size=(3, CONFIG.dim)).astype(np.float32)
    model = peer(CONFIG, head=head, num_labels=3)
    n_B = alone['segments'].sum(1)
    logits = torch.cat(  # one by one, without padding
        [
            model(torch.tensor(row[None, :n], dtype=torch.int64)).logits
            for row, n in zip(alone['inputs'], n_B, strict=True)
        ]
    )
    cross_entropy = torch.nn.CrossEntropyLoss(torch.tensor((0.5, 1.0, 3.0)) if weighted else None)
    loss = cross_entropy(logits, torch.tensor([labels.index(r.label) for r in records]))
    loss.backward()

    packed = batch_of(objective, [records[:2], records[2:]], tokenizer, seq_len=96)
    placed = jax.device_put({'head_DC': head.T}, layout.shardings({'head_DC': head.T}, devices()))
    own, (gradients, extra) = ours(CONFIG, objective, packed, placed)
    np.testing.assert_allclose(own, loss.item(), rtol=1e-5)
    theirs = model.score.weight.grad.numpy().T
    assert np.linalg.norm(extra['head_DC'] - theirs) < 1e-5 * np.linalg.norm(theirs)
    assert_gradients_equal(gradients, model, CONFIG)
