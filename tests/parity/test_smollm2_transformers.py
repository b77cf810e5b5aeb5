"""The real SmolLM2-135M-Instruct beside transformers, which reads the GGUF file by itself."""

import inspect
import textwrap

import numpy as np
import pytest

from llama_jax.generate.generator import Generator
from llama_jax.model.config import Compute
from tests.data.corpus import CHINESE
from tests.parity.smollm2 import logits_of, one, ours, theirs

pytestmark = pytest.mark.parity

PROMPTS = (
    *('The capital of France is', 'Once upon a time', 'Water boils at', 'In 1984, George Orwell'),
    *('Photosynthesis is the process by which', 'My favourite recipe:\n1.', '2 + 2 =', 'Q: Why'),
    *('def fibonacci(n):\n', 'import numpy as np\n\nx = ', '<html>\n<head>\n', 'SELECT name FROM'),
    *('for (int i = 0; i <', 'La capitale de la France est', 'Die Hauptstadt von Deutschland ist'),
    *('El perro y el gato', 'Москва — столица', '中国的首都是', '滾滾長江東逝水，', 'こんにちは、'),
)
N = 12
"""Tokens that each prompt is continued by."""


def test_logits_equal_transformers():
    import torch

    text = inspect.getsource(textwrap) + '\n'.join(CHINESE)
    token_T = ours().vocabulary.encode(text)[:512]
    with torch.no_grad():
        expected_BTV = theirs()(torch.tensor(token_T[None], dtype=torch.long)).logits.numpy()
    # Logits reach 30; float32 has 7 digits and 30 layers to lose three of them in.
    logits_TV = logits_of(ours().params, token_T)
    assert np.abs(logits_TV - expected_BTV[0]).max() < 5e-3


def test_greedy_text_equals_transformers():
    """Each token is the one that transformers finds likeliest after all before it, which is what
    its greedy decoding would have written: by induction, token by token, in one call."""
    import torch

    model = ours()
    prompts = [model.prompt(text) for text in PROMPTS]
    generator = Generator(
        model.config,
        model.params,
        mesh=one(),
        compute=Compute(),
        eos_ids=model.end_ids,
        pad_id=model.pad_id,
    )
    completions = generator(prompts, max_tokens=N, temperature=0.0)
    rows = [p + c.tokens for p, c in zip(prompts, completions, strict=True)]
    # Padding at the end is seen by no token before it.
    token_BT = torch.full((len(rows), max(map(len, rows))), model.pad_id)
    for i, row in enumerate(rows):
        token_BT[i, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        likeliest_BT = theirs()(token_BT).logits.argmax(-1).tolist()
    for text, prompt, completion, row in zip(PROMPTS, prompts, completions, rows, strict=True):
        expected = likeliest_BT.pop(0)[len(prompt) - 1 : len(row)]
        if completion.finish_reason == 'stop':
            assert expected.pop() in model.end_ids, text
        else:
            assert len(completion.tokens) == N
        assert completion.tokens == expected[: len(completion.tokens)], text
    assert len(PROMPTS) == 20 and sum(len(c.tokens) for c in completions) >= 200
