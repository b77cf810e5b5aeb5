"""What the engine compiles, and that the KV cache stays in place."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.generate.speculative.draft import Lookup
from tests.engine.asking import GREEDY, MIXED, ask
from tests.generate.tiny import nothing_compiles, prompt_of


@pytest.mark.slow
def test_nothing_compiles_over_200_mixed_requests(engine):
    ours = engine(queue=300, warm=True)
    rng = np.random.default_rng(1)

    def run(n):
        kinds = [MIXED[i] for i in rng.integers(len(MIXED), size=n)]
        heard = [
            ask(
                ours,
                prompt_of(int(rng.integers(1, 60)), seed=int(rng.integers(9))),
                replace(controls, seed=int(rng.integers(99)), stop=('x',) * int(rng.integers(2))),
            )
            for _, controls in kinds
        ]
        return [one.wait() for one in heard]

    ask(ours, prompt_of(60)).wait()
    shared = [ask(ours, prompt_of(60), replace(GREEDY, prompt_logprobs=0)) for _ in range(4)]
    [one.wait() for one in shared]
    run(30)
    with nothing_compiles():
        assert all(one.finish.reason in ('length', 'stop') for one in run(200))


@pytest.mark.parametrize(('n', 'lookup'), [(2, None), (8, None), (8, Lookup(n_draft=5))])
def test_the_cache_stays_in_place(engine, n, lookup):
    ours = engine(length=256, rows=8, prefill_chunk=64, speculate=lookup)
    slots, place = ours._slots, ours.programs.place
    assert slots.sizes == (1, 2, 4, 8)
    slot_B = None if n == 8 else np.arange(n)
    with jax.set_mesh(ours.programs.mesh):
        given = (ours.programs.params, slots._caches[:n], slots._rest, slots._settings, slot_B)
        lowered = slots._on.steps.lower(*given, place(np.zeros(n, bool)), 4, True)
        memory = lowered.compile().memory_analysis()
    cache_bytes = ours.programs.cache_bytes(rows=n, slots=slots._room)
    assert memory.alias_size_in_bytes >= cache_bytes
    # Scores of every column; of the cache no second one.
    n_columns = 1 if lookup is None else 1 + lookup.n_draft
    assert memory.temp_size_in_bytes < n_columns * cache_bytes / 4
