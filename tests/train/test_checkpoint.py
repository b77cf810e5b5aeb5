"""Checkpoints: which are kept, and what happens to damaged ones."""

import gc
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from llama_jax import layout, mesh
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.train.checkpoint import Checkpoints, checksum, difference

# Orbax leaves tasks behind when it meets a file that it cannot read.
pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)

SHAPES = {'embed_VD': (64, 32), 'norm': {'scale_D': (32,)}}


def items(value, devices=None):
    """A parameter tree full of `value` and 0, 1, 2, ...; with a random key beside it."""
    devices = devices or mesh.make(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(
        lambda shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + value,
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tree = {'params': params, 'rest': {'step': np.int32(value), 'key': jax.random.key(value)}}
    replicated = NamedSharding(devices, jax.sharding.PartitionSpec())
    placed = {
        'params': layout.shardings(params, devices),
        'rest': jax.tree.map(lambda _: replicated, tree['rest']),
    }
    return jax.tree.map(jax.device_put, tree, placed)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def host(tree):
    return jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, host(got), host(wanted))


@pytest.fixture(autouse=True)
def nothing_left_for_the_next_test():
    yield
    gc.collect()


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of the steps 1, 2 and 3."""
    directory = tmp_path / 'run' / 'checkpoints'
    checkpoints = Checkpoints(directory, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, items(step), metadata={'step': step})
    checkpoints.close()
    return directory


def restore(directory, **settings):
    checkpoints = Checkpoints(directory, keep=3)
    try:
        return checkpoints.restore_newest(abstract(items(0)), **settings)
    finally:
        checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
    """A score is known only when its checkpoint is on disk, and some have none."""
    directory = tmp_path / 'checkpoints'
    checkpoints = Checkpoints(directory, keep=2)
    for step, score in enumerate([3.0, 1.0, None, 2.0, 4.0, 5.0], start=1):
        checkpoints.save(step, items(step), metadata={})
        if score is not None:
            checkpoints.validated(step, score)
    checkpoints.validated(99, 0.0)  # no such checkpoint
    assert checkpoints.steps() == [2, 5, 6]
    checkpoints.close()
    # A later process knows the best by the file.
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.best() == 2
    assert checkpoints.has_score(5) and not checkpoints.has_score(1)
    checkpoints.save(7, items(7), metadata={})
    checkpoints.validated(7, 1.0)  # of equals the newest
    assert checkpoints.best() == 7
    checkpoints.save(8, items(8), metadata={})
    assert checkpoints.steps() == [7, 8]
    checkpoints.close()


def test_scores_of_checkpoints_that_are_gone_do_not_count(tmp_path):
    """A run that begins anew in the directory must not lose its best to a score of before."""
    directory = tmp_path / 'checkpoints'
    (tmp_path / 'checkpoint-scores.json').write_text('{"2": 0.5}')
    checkpoints = Checkpoints(directory, keep=1)
    assert checkpoints.best() is None
    checkpoints.save(1, items(1), metadata={})
    checkpoints.validated(1, 3.0)
    checkpoints.save(2, items(2), metadata={})
    assert checkpoints.best() == 1 and checkpoints.steps() == [1, 2]
    checkpoints.close()


@pytest.mark.parametrize(
    ('before', 'now', 'kept'),
    [('a', 'a', True), ('a', 'b', False), ('a', None, True), (None, 'a', False)],
)
def test_scores_of_another_validation_do_not_count(tmp_path, before, now, kept):
    directory = tmp_path / 'checkpoints'
    checkpoints = Checkpoints(directory, keep=1, validated_on=before)
    checkpoints.save(1, items(1), metadata={})
    checkpoints.validated(1, 0.5)
    checkpoints.close()
    checkpoints = Checkpoints(directory, keep=1, validated_on=now)
    assert checkpoints.has_score(1) == kept and checkpoints.forgotten == (() if kept else (1,))
    checkpoints.save(2, items(2), metadata={})
    checkpoints.validated(2, 3.0)
    checkpoints.save(3, items(3), metadata={})
    assert checkpoints.best() == (1 if kept else 2)
    assert checkpoints.steps() == [checkpoints.best(), 3]
    checkpoints.close()
    checkpoints = Checkpoints(directory, keep=1, validated_on=now)
    assert checkpoints.forgotten == ()
    checkpoints.close()


def test_scores_of_an_earlier_version_count_where_nothing_is_validated(saved):
    """Its file does not say of what they are."""
    (saved.parent / 'checkpoint-scores.json').write_text('{"3": 0.5}')
    for of, best in ((None, 3), ('a', None)):
        checkpoints = Checkpoints(saved, keep=3, validated_on=of, read_only=True)
        assert checkpoints.best() == best
        checkpoints.close()


@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', '{"3": null}', '{"scores": [1]}'])
def test_a_damaged_file_of_scores_is_no_file(saved, text):
    (saved.parent / 'checkpoint-scores.json').write_text(text)
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.best() is None
    checkpoints.close()


def test_every_kth_is_kept_for_ever(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=1, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(step, items(step), metadata={})
    assert checkpoints.steps() == [3, 6, 8]
    checkpoints.close()


def test_restores_values_metadata_and_keys(saved):
    restored = restore(saved)
    assert restored.step == 3 and restored.metadata['step'] == 3 and restored.damaged == []
    assert_equal(restored.items, items(3))
    assert jnp.issubdtype(restored.items['rest']['key'].dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize('config', [MeshConfig(), MeshConfig(fsdp=2, tensor=4)])
def test_restores_onto_another_mesh(saved, config):
    wanted = items(3, mesh.make(config))
    checkpoints = Checkpoints(saved, keep=3)
    restored = checkpoints.restore_newest(abstract(wanted))
    checkpoints.close()
    assert_equal(restored.items, wanted)
    for got, expected in zip(jax.tree.leaves(restored.items), jax.tree.leaves(wanted), strict=True):
        assert got.sharding == expected.sharding


def test_one_item_can_be_read_without_the_others(saved):
    checkpoints = Checkpoints(saved, keep=3, read_only=True)
    restored = checkpoints.restore_newest(abstract({'params': items(0)['params']}))
    checkpoints.close()
    assert_equal(restored.items, {'params': items(3)['params']})


def largest_file(directory):
    return max((p for p in directory.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def cut(directory):
    path = largest_file(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(directory):
    path = largest_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def remove_a_file(directory):
    largest_file(directory).unlink()


def remove_the_metadata(directory):
    (directory / '_CHECKPOINT_METADATA').unlink()


def empty_the_metadata(directory):
    (directory / '_CHECKPOINT_METADATA').write_text('{}')


@pytest.mark.parametrize(
    'damage', [cut, flip_a_byte, remove_a_file, remove_the_metadata, empty_the_metadata]
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(saved, damage, caplog):
    damage(saved / '3')
    restored = restore(saved, set_aside=True)
    assert restored.step == 2
    assert_equal(restored.items, items(2))
    (message,) = restored.damaged
    assert message.startswith('checkpoint 3 is damaged') and message in caplog.text
    # It is kept aside, so that step 3 can be saved again, and damaged again.
    assert (saved.parent / 'damaged-checkpoint-3').is_dir()
    for _ in range(2):
        checkpoints = Checkpoints(saved, keep=3)
        checkpoints.save(3, items(33), metadata={})
        checkpoints.close()
        assert_equal(restore(saved).items, items(33))
        damage(saved / '3')
        assert restore(saved, set_aside=True).step == 2


def test_a_half_written_checkpoint_is_no_checkpoint(saved):
    """What kill -9 during a save leaves: a directory under another name."""
    shutil.copytree(saved / '3', saved / '4.orbax-checkpoint-tmp')
    (saved / '4.orbax-checkpoint-tmp' / 'commit_success.txt').unlink(missing_ok=True)
    restored = restore(saved)
    assert restored.step == 3 and restored.damaged == []


def test_when_all_are_damaged_none_is_lost(saved):
    for step in (1, 2, 3):
        cut(saved / str(step))
    for _ in range(2):  # the second start is told the same: nothing was renamed
        with pytest.raises(UserError, match='no checkpoint in .* can be read, of steps 3, 2, 1: '):
            restore(saved, set_aside=True)


def test_no_checkpoint_is_no_error(tmp_path):
    assert restore(tmp_path / 'checkpoints') is None


@pytest.mark.parametrize(
    'error', [PermissionError(13, 'Permission denied'), ValueError('RESOURCE_EXHAUSTED: memory')]
)
def test_what_cannot_be_read_now_is_no_damage(saved, monkeypatch, error):
    before = sorted(path.name for path in saved.iterdir())

    def fail(self, step, *arguments):
        raise error

    monkeypatch.setattr(ocp.training.Checkpointer, 'load_checkpointables', fail)
    with pytest.raises(UserError, match='checkpoint 3 in .* cannot be read .*: mend that'):
        restore(saved, set_aside=True)
    checkpoints = Checkpoints(saved, keep=3)
    with pytest.raises(UserError, match='checkpoint 2 in .* cannot be read .*: mend that'):
        checkpoints.restore_step(2, abstract(items(0)))
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == before


def test_a_refusal_is_no_damage(saved):
    def check(metadata):
        raise UserError(f'not {metadata["step"]}')

    with pytest.raises(UserError, match='not 3'):
        restore(saved, check=check, set_aside=True)


def test_saving_does_not_wait_for_the_disk_nor_see_later_changes(tmp_path):
    devices = mesh.make(MeshConfig(), jax.devices()[:1])
    placed = NamedSharding(devices, layout.param('VD'))
    large = jax.device_put(np.ones((4096, 4096), np.float32), placed)  # 64 MiB
    checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=1)
    checkpoints.save(1, {'params': {'w_VD': large}}, metadata={})
    assert not (tmp_path / 'checkpoints' / '1').exists()  # still being written
    large = jax.jit(lambda x: x + 1, donate_argnums=0)(large)
    checkpoints.wait()
    assert (tmp_path / 'checkpoints' / '1').exists()
    restored = checkpoints.restore_newest(abstract({'params': {'w_VD': large}}))
    checkpoints.close()
    assert (np.asarray(restored.items['params']['w_VD']) == 1).all()


@pytest.fixture
def full_disk():
    """Limits the size of files, so that writing fails midway as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_one_line_and_loses_nothing(tmp_path, full_disk):
    directory = tmp_path / 'checkpoints'
    large = {'params': {'w_VD': jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)))}}
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(1, large, metadata={})
    checkpoints.wait()
    full_disk(100_000)
    with pytest.raises(UserError) as raised:
        checkpoints.save(2, large, metadata={})
        checkpoints.wait()
    full_disk(resource.RLIM_INFINITY)
    message = str(raised.value)
    assert str(directory) in message and 'resumes from step 1' in message and '\n' not in message
    checkpoints.close()
    checkpoints = Checkpoints(directory, keep=2)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh.make(MeshConfig(), jax.devices()[:1]), layout.param('VD')),
        ),
        large,
    )
    restored = checkpoints.restore_newest(placed, set_aside=True)
    assert restored.step == 1 and restored.damaged == []
    checkpoints.save(2, restored.items, metadata={})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_checksum_notices_any_bit_and_exchanged_arrays():
    one_bit = np.zeros((64, 32), np.float32)
    assert checksum([jnp.asarray(one_bit)]) == 0
    one_bit[3, 4] = -0.0
    assert checksum([jnp.asarray(one_bit)]) == 2**31
    for narrow in ('bfloat16', 'int8', 'float16'):
        array = jnp.zeros(8, narrow)
        assert checksum([array]) == 0 != checksum([array.at[3].set(1)])
    a, b = jnp.arange(4.0), jnp.ones(4)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum(items(5)['params']) == checksum(items(5, mesh.make(MeshConfig()))['params'])


def test_difference_names_fields():
    saved = {'model': {'dim': 4, 'layers': 2}, 'files': ['a', 'b'], 'same': None}
    wanted = {'model': {'dim': 8, 'layers': 2}, 'files': ('a', 'c'), 'same': None, 'new': 1}
    assert difference(saved, wanted) == [
        "files.1: 'b' -> 'c'",
        'model.dim: 4 -> 8',
        'new: None -> 1',
    ]
