"""Files that change while a run trains."""

import json

import jax
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import Source
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.train import run
from llama_jax.train.validate import Validation
from tests.data.corpus import CHINESE
from tests.train.conftest import MODEL, changed


@pytest.mark.slow
def test_files_may_change_while_a_run_trains(experiment, tmp_path):
    """A run validates on what was there when it began, and the next one sees the change."""
    path = tmp_path / 'notes.jsonl'
    path.write_text((json.dumps({'text': CHINESE[0]}) + '\n') * 40, 'utf-8')
    source = Source('text_files', files=(str(path),))
    one = changed(changed(experiment, 'data', validation=(source,)), 'evaluation', batches=0)
    tokenizer, mesh = load_tokenizer(one.data), meshes.make(MeshConfig(), jax.devices()[:1])
    params = layers.create(MODEL, jax.random.key(0), mesh)
    with jax.set_mesh(mesh):
        validation = Validation(one, tokenizer, mesh)
        first = validation(params)
        path.write_text(json.dumps({'text': CHINESE[1]}) + '\n', 'utf-8')
        assert validation(params) == first
        assert Validation(one, tokenizer, mesh).digest != validation.digest
        path.unlink()
        assert validation(params) == first


def test_processes_agree_on_what_is_validated(experiment, tmp_path, monkeypatch):
    """Before the first step: with other files they would wait for each other in the midst."""
    agreed = {}
    monkeypatch.setattr(
        run.agreement, 'same', lambda values, what, *_: agreed.update({what: values})
    )
    with run.prepare(experiment, tmp_path) as prepared:
        assert agreed['validation data'] == {'validation': prepared.validate.digest}
