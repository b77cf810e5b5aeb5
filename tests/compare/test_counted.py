"""The text that counts are made of is what an arm reads."""

import argparse
import difflib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.compare import baselines, fair
from llama_jax.compare.baselines import _read
from llama_jax.compare.grid import FINISHED, Arm
from llama_jax.data.config import Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.sources import open_sources
from llama_jax.objectives.block_diffusion import BlockDiffusion
from llama_jax.objectives.causal import CausalLM
from tests.compare import tiny


def experiment(tmp_path, steps):
    """A third of one module, two thirds of another."""
    files = [
        tiny.write_text(tmp_path / f'{module.__name__}.jsonl', module)
        for module in (argparse, difflib)
    ]
    sources = tuple(
        Source('text_files', files=(str(path),), weight=weight)
        for path, weight in zip(files, (1.0, 2.0), strict=True)
    )
    made = tiny.experiment(files[0])
    data = replace(made.data, sources=sources, validation_split='train[:2]')
    return replace(made, data=data, train=replace(made.train, steps=steps))


def test_it_is_mixed_as_for_an_arm_and_as_long(tmp_path):
    of = experiment(tmp_path, steps=20)
    tokenizer = load_tokenizer(of.data)
    positions = of.train.steps * of.train.batch * of.train.seq_len
    found = list(_read(of, fair.text_of(of.data), positions))
    read = [tokenizer.decode(ids) for ids in found]
    assert positions <= sum(map(len, found)) < positions + 4 * of.train.seq_len + len(read)
    whole = [
        ''.join(source[i] for i in range(len(source)))
        for source in open_sources(of.data, 'train').sources
    ]
    lengths = [sum(len(text) for text in read if text.strip() in one) for one in whole]
    assert 0.25 < lengths[0] / sum(lengths) < 0.42


def test_what_is_read_again_is_counted_once_and_documents_begin_and_end(tmp_path):
    of = experiment(tmp_path, steps=2000)
    tokenizer = load_tokenizer(of.data)
    positions = of.train.steps * of.train.batch * of.train.seq_len
    read = list(_read(of, fair.text_of(of.data), positions))
    texts = [
        source[i] for source in open_sources(of.data, 'train').sources for i in range(len(source))
    ]
    joined = np.concatenate(read)
    assert np.count_nonzero(joined == tokenizer.bos_id) == len(texts)
    assert np.count_nonzero(joined == tokenizer.eos_id) == len(texts)
    n = sum(len(tokenizer.encode(text)) for text in texts)
    assert len(joined) == n + 2 * len(texts)
    whole = [ids for ids in read if ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id]
    told = {tokenizer.decode(ids[1:-1]) for ids in whole}
    assert told and told <= set(texts)


def test_it_is_as_much_as_the_arm_has_room_for(tmp_path, monkeypatch):
    """Block diffusion has each text in a row twice, and so reads half as much."""
    grid = tiny.grid(tiny.write_text(tmp_path / 'text.jsonl'))
    seen = []

    def counts(found, tokenizer, training):
        seen.append(sum(map(len, training)))
        return {}

    monkeypatch.setattr(baselines.baselines, 'counts', counts)
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    for objective in (CausalLM(), BlockDiffusion(block=4)):
        of = replace(grid.arms[0].experiment, objective=objective)
        of = replace(of, train=replace(of.train, steps=4))
        counted = baselines.at_place(Arm('it', of), 'baselines/counts/seed-0')
        baselines.run(counted, grid.suite, tmp_path, mesh)
    assert 0.4 < seen[1] / seen[0] < 0.6


@pytest.mark.slow
def test_it_is_measured_on_the_texts_of_the_arms(tmp_path):
    """By their hash, which a report compares."""
    grid = tiny.grid(tiny.write_text(tmp_path / 'text.jsonl'))
    of = grid.arms[0].experiment
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    counts = baselines.at_place(grid.arms[0], 'baselines/counts/seed-0')
    baselines.run(counts, grid.suite, tmp_path, mesh)
    found = json.loads((tmp_path / FINISHED).read_text('utf-8'))
    assert found['examples'] == baselines.untrained(of, grid.suite, mesh)['examples']
    other = replace(grid.suite, window=24)
    assert found['examples'] != baselines.untrained(of, other, mesh)['examples']
