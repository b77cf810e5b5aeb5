"""Names and sizes of leaves."""

import jax
import jax.numpy as jnp

from llama_jax import trees

TREE = {
    'blocks': [{'q_DNH': jnp.zeros((2, 3, 4))}, {'q_DNH': jnp.ones((2, 3, 4), jnp.bfloat16)}],
    'norm': {'scale_D': jax.ShapeDtypeStruct((5,), jnp.float32)},
}


def test_names_are_dotted_paths():
    names = [name for name, _ in trees.named(TREE)]
    assert names == ['blocks.0.q_DNH', 'blocks.1.q_DNH', 'norm.scale_D']
    assert trees.map_named(lambda name, leaf: name, TREE)['blocks'][1]['q_DNH'] == names[1]


def test_sizes_count_elements_and_bytes_of_arrays_and_shapes():
    assert trees.size(TREE) == 24 + 24 + 5
    assert trees.n_bytes(TREE) == 24 * 4 + 24 * 2 + 5 * 4
