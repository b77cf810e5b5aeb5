"""Where compiled programs are kept."""

import jax
import pytest

from llama_jax import runtime


@pytest.fixture
def settings(monkeypatch):
    """What would be set, in place of setting it."""
    told = {}
    monkeypatch.setattr(jax.config, 'update', lambda name, value: told.update({name: value}))
    return told


def test_programs_are_kept_in_the_directory(settings, monkeypatch, tmp_path):
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    runtime.keep_programs(tmp_path)
    assert settings['jax_compilation_cache_dir'] == str(tmp_path)


def test_the_environment_names_another_place(settings, monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
    runtime.keep_programs(tmp_path)
    assert 'jax_compilation_cache_dir' not in settings
