"""Joining the processes of a run, and where compiled programs are kept."""

import jax
import pytest

from llama_jax import runtime


@pytest.fixture
def settings(monkeypatch):
    """What would be set, in place of setting it."""
    told = {}
    monkeypatch.setattr(jax.config, 'update', lambda name, value: told.update({name: value}))
    return told


@pytest.fixture
def joined(settings, monkeypatch):
    """What JAX is asked, which joins nobody here."""
    calls = []
    for name in (runtime.COORDINATOR, runtime.PROCESSES, runtime.PROCESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *given: calls.append(given))
    return calls


def test_without_a_coordinator_there_are_no_others(joined, settings, monkeypatch):
    runtime.initialize()
    monkeypatch.setenv(runtime.COORDINATOR, '')
    runtime.initialize()
    assert joined == [] and settings == {}


def test_auto_leaves_it_to_jax(joined, settings, monkeypatch):
    """Numbers of another way to start are not read then."""
    monkeypatch.setenv(runtime.COORDINATOR, 'auto')
    monkeypatch.setenv(runtime.PROCESSES, 'two')
    runtime.initialize()
    assert joined == [()] and settings == {'jax_cpu_collectives_implementation': 'gloo'}


def test_an_address_comes_with_numbers(joined, monkeypatch):
    monkeypatch.setenv(runtime.COORDINATOR, 'first:1234')
    monkeypatch.setenv(runtime.PROCESSES, '16')
    monkeypatch.setenv(runtime.PROCESS, '3')
    runtime.initialize()
    assert joined == [('first:1234', 16, 3)]
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    runtime.initialize()
    assert len(joined) == 1


def test_programs_are_kept_in_the_directory(settings, monkeypatch, tmp_path):
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    runtime.keep_programs(tmp_path)
    assert settings['jax_compilation_cache_dir'] == str(tmp_path)
    # Most programs of a small model compile in less than JAX's own second.
    assert settings['jax_persistent_cache_min_compile_time_secs'] < 0.1


def test_the_environment_names_another_place(settings, monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
    runtime.keep_programs(tmp_path)
    assert 'jax_compilation_cache_dir' not in settings
