"""Penalties, bias and least lengths against a loop."""

import jax
import numpy as np

from llama_jax.generate.controls import Controls
from llama_jax.generate.settings import History, history_of, rows_of, shaped

V = 40
CONTROLS = (
    Controls(repetition_penalty=1.7),
    Controls(presence_penalty=0.6, frequency_penalty=0.25),
    Controls(repetition_penalty=0.5, presence_penalty=-1.0, logit_bias={3: 4.5, 39: -100.0}),
    Controls(min_tokens=4, stop_ids=(5, 6)),
    Controls(min_tokens=4, stop_ids=(5, 6), ignore_end=True),
    Controls(),
)
ENDS = (1, 2)


def test_logits_are_shaped_as_a_loop_shapes_them():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, 7).tolist() for _ in CONTROLS]
    texts = [rng.integers(0, V, 12).tolist() for _ in CONTROLS]
    n = len(CONTROLS)
    logits = rng.normal(size=(n, V)).astype(np.float32) * 3
    history = history_of(prompts, rows=n, vocab=V)
    counts = np.stack([np.bincount(text, minlength=V) for text in texts]).astype(np.int32)
    rows = rows_of(CONTROLS, lengths=[7] * n, rows=n, end_ids=ENDS, vocab=V, bias=True)
    shape = jax.jit(shaped)
    for place in (7, 10, 11):  # the first, the fourth and the fifth token of a text
        found = shape(logits, rows, History(history.prompt_BV, counts), np.full(n, place))
        expected = logits.astype(np.float64)
        for row, one in enumerate(CONTROLS):
            for token in range(V):
                x = expected[row, token]
                if token in prompts[row] or token in texts[row]:
                    x = x / one.repetition_penalty if x > 0 else x * one.repetition_penalty
                x -= one.frequency_penalty * texts[row].count(token)
                x -= one.presence_penalty * (token in texts[row])
                x += one.logit_bias.get(token, 0)
                ends = {*(() if one.ignore_end else ENDS), *one.stop_ids}
                early = place - 7 < one.min_tokens
                expected[row, token] = -np.inf if token in ends and early else x
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
