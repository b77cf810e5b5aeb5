"""The architecture, read from the source: imports point downwards, the step stays light, and the
names of mesh axes stay in two files."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax.mesh import AXES
from llama_jax.train.code import TRAINS

ROOT = Path(__file__).parents[1]

FLOORS = (
    (
        'llama_jax.errors',
        'llama_jax.installed',
        'llama_jax.keys',
        'llama_jax.convert.gguf_header',
        'llama_jax.mesh',
        'llama_jax.layout',
        'llama_jax.paths',
        'llama_jax.precision',
        'llama_jax.runtime',
        'llama_jax.trees',
        'llama_jax.units',
    ),
    ('llama_jax.text',),
    ('llama_jax.model', 'llama_jax.data'),
    ('llama_jax.objectives', 'llama_jax.optim', 'llama_jax.generate', 'llama_jax.convert'),
    ('llama_jax.engine',),
    ('llama_jax.train',),
    ('llama_jax.evaluate',),
    ('llama_jax.report', 'llama_jax.serve'),
    ('llama_jax.compare',),
    ('configs',),
    ('experiments',),
    ('tpu', 'benchmarks', 'llama_jax.__main__'),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOPS = sorted({room.split('.')[0] for room in FLOOR})

# What has to run on a bare accelerator machine, and all that is installed there.
BARE = (
    'llama_jax.model',
    'llama_jax.objectives',
    'llama_jax.optim',
    'llama_jax.generate',
    'llama_jax.engine',
    'llama_jax.train.step',
)
BARE_PACKAGES = {'jax', 'flax', 'optax', 'numpy', 'jaxtyping'}

# These are English words as well: only where JAX expects an axis are they taken for one.
WORDS = {'slice', 'data', 'sequence', 'expert'}
TAKES_AXES = {
    *('P', 'PartitionSpec', 'NamedSharding', 'Mesh', 'AbstractMesh', 'make_mesh'),
    *('reshard', 'shard_map', 'auto_axes', 'explicit_axes', 'axis_index', 'axis_size'),
    *('psum', 'pmean', 'pmax', 'pmin', 'psum_scatter', 'all_gather', 'all_to_all', 'ppermute'),
    *('pcast', 'pvary'),
}


def sources() -> dict[str, Path]:
    """Every module of the house but the tests: dotted name -> file."""
    found = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


SOURCES = sources()


def room_of(module: str) -> str | None:
    """The room of FLOORS that `module` stands in."""
    return next((room for room in FLOOR if within(module, room)), None)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + '.')


def imports(tree: ast.AST, module: str, *, at_load: bool = False) -> Iterator[str]:
    """Dotted names that `module` imports; `at_load` leaves out those in functions and for types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                package = module if is_package(module) else module.rpartition('.')[0]
                above = package.split('.')[: len(package.split('.')) - node.level + 1]
                base = '.'.join([*above, base] if base else above)
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                yield inner if inner in SOURCES or room_of(inner) else base
        elif at_load and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test))
        ):
            continue
        else:
            yield from imports(node, module, at_load=at_load)


def is_package(module: str) -> bool:
    return module in SOURCES and SOURCES[module].name == '__init__.py'


def upward(tree: ast.AST, module: str) -> Iterator[str]:
    """Imports of `module` that do not point to its own room or to a floor below."""
    room = room_of(module)
    assert room, f'{module} stands on no floor: give it one in FLOORS'
    for target in imports(tree, module):
        if target.split('.')[0] not in TOPS:
            continue
        there = room_of(target)
        if there is None or not (
            there == room or FLOOR[there] < FLOOR[room] or FLOOR[there] == FLOOR[room] == 0
        ):
            yield f'{module} imports {target}'


def heavy(names: Iterator[str]) -> Iterator[str]:
    """Those of the imported `names` that a bare accelerator machine does not have."""
    for name in names:
        top = name.split('.')[0]
        if top not in BARE_PACKAGES | sys.stdlib_module_names | {'llama_jax'}:
            yield name


def axis_literals(tree: ast.AST, *, expected: bool = False) -> Iterator[ast.Constant]:
    """String literals that name a mesh axis; `expected` where JAX expects one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Constant) and node.value in AXES:
            if expected or node.value not in WORDS:
                yield node
            continue
        inside = expected
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            inside |= (name.id if isinstance(name, ast.Name) else name) in TAKES_AXES
        elif isinstance(node, ast.Subscript):
            inside |= isinstance(node.value, ast.Attribute) and node.value.attr == 'shape'
        elif isinstance(node, ast.keyword):
            inside |= (node.arg or '').startswith('axis_name')
        yield from axis_literals(node, expected=inside)


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding='utf-8'))


def test_imports_point_downwards_only():
    modules = [module for module in SOURCES if module != 'llama_jax']
    assert not [line for module in modules for line in upward(parse(module), module)]


def test_package_root_imports_nothing():
    # Whoever imports one module loads the root as well.
    assert not list(imports(parse('llama_jax'), 'llama_jax'))


def test_code_that_trains_imports_nothing_that_its_hash_leaves_out():
    packages = {name.split('.')[1] for name in SOURCES if is_package(name) and '.' in name}
    assert packages.issuperset(TRAINS)
    others = [f'llama_jax.{name}' for name in packages.difference(TRAINS)]
    assert not [
        f'{module} imports {name}'
        for module in SOURCES
        if any(within(module, f'llama_jax.{name}') for name in TRAINS)
        for name in imports(parse(module), module)
        if any(within(name, other) for other in others)
    ]


@pytest.mark.parametrize('root', BARE)
def test_runs_on_a_bare_accelerator_machine(root):
    todo = [module for module in SOURCES if within(module, root)]
    assert todo, f'{root} is no module of this project'
    assert not [
        f'{module} imports {name}'
        for module in todo
        for name in heavy(imports(parse(module), module))
    ]

    # And what these load, they load: other modules of the house, and the packages around them.
    reached: dict[str, str] = {}
    while todo:
        module = todo.pop()
        for name in [*imports(parse(module), module, at_load=True), module.rpartition('.')[0]]:
            if name in SOURCES and name not in reached:
                reached[name] = module
                todo.append(name)
    assert not [
        f'{root} loads {module} (by {by}), which imports {name}'
        for module, by in reached.items()
        for name in heavy(imports(parse(module), module, at_load=True))
    ]


def test_mesh_axis_names_stand_in_mesh_and_layout_only():
    assert {'data', 'fsdp', 'tensor'} <= set(AXES)
    homes = {'llama_jax.mesh', 'llama_jax.layout'}
    assert not [
        f'{module}:{node.lineno} names the mesh axis {node.value!r}'
        for module in SOURCES.keys() - homes
        for node in axis_literals(parse(module))
    ]


@pytest.mark.parametrize(
    ('module', 'source', 'found'),
    [
        ('llama_jax.model.block', 'from llama_jax.train import step', 1),
        ('llama_jax.model.block', 'import llama_jax.data.packing', 1),
        ('llama_jax.model.block', 'from ..objectives import causal', 1),
        ('llama_jax.model.block', 'def f():\n  from llama_jax import generate', 1),
        ('llama_jax.train.loop', 'import experiments.pretrain', 1),
        ('llama_jax.mesh', 'from llama_jax.model import norm', 1),
        (
            'llama_jax.model.block',
            'from llama_jax import layout\nfrom . import norm\nimport jax',
            0,
        ),
        ('llama_jax.layout', 'from llama_jax.mesh import AXES', 0),
        ('experiments.pretrain', 'import configs.llama\nfrom llama_jax.report import html', 0),
    ],
)
def test_upward_import_is_seen(module, source, found):
    assert len(list(upward(ast.parse(source), module))) == found


def test_heavy_import_is_seen():
    source = 'import os, jax.numpy, grain\nfrom orbax import checkpoint\ndef f(): import rich'
    assert list(heavy(imports(ast.parse(source), 'llama_jax.optim.adamw'))) == [
        *('grain', 'orbax', 'rich')
    ]
    loaded = imports(ast.parse(source), 'llama_jax.optim.adamw', at_load=True)
    assert list(heavy(loaded)) == ['grain', 'orbax']


@pytest.mark.parametrize(
    ('source', 'found'),
    [
        ("P('data')", 1),
        ("jax.sharding.PartitionSpec(None, ('data', 'fsdp'))", 2),
        ("jax.lax.psum(x, axis_name='data')", 1),
        ("mesh.shape['slice']", 1),
        ("AXIS = 'tensor'", 1),
        ("Path('data') / name['data'] if kind == 'slice' else 'tensor core'", 0),
        ("act('BTD')", 0),
    ],
)
def test_axis_name_is_seen(source, found):
    assert len(list(axis_literals(ast.parse(source)))) == found
