"""Adapters as the library PEFT keeps them: adapter_config.json and adapter_model.safetensors, both
ways (https://huggingface.co/docs/peft, Checkpoint format).

They are of Hugging Face's layout, whatever files the base is in: its order of rows is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import directory as directories
from llama_jax.convert import whole
from llama_jax.convert.export_huggingface import KINDS, Dtype, write_json, write_shard
from llama_jax.convert.huggingface import HUGGING_FACE
from llama_jax.convert.params import finite
from llama_jax.convert.stored import FLOATS, read_object
from llama_jax.convert.tensors import Tensors, sizes_of
from llama_jax.convert.values import count, number, short, unsupported
from llama_jax.errors import UserError
from llama_jax.model.adapted import Adapted
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.tune import INPUTS, LoRA
from llama_jax.model.unread import Unread
from llama_jax.trees import map_named

CONFIG = 'adapter_config.json'
_FILES = ('adapter_model.safetensors', 'adapter_model.bin')
_PREFIX = 'base_model.model.'
_TENSOR = re.compile(re.escape(_PREFIX) + r'(.+)\.lora_([AB])(?:\.default)?\.weight')

_READ = {'peft_type', 'r', 'lora_alpha', 'use_rslora', 'alpha_pattern', 'rank_pattern'}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    'bias': ('none',),
    'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'),  # others change the base
    **dict.fromkeys(('use_dora', 'use_qalora', 'lora_bias', 'fan_in_fan_out'), (False,)),
    **dict.fromkeys(('modules_to_save', 'alora_invocation_tokens', 'target_parameters'), ([],)),
    **dict.fromkeys(('trainable_token_indices', 'layer_replication'), ([], {})),
    **dict.fromkeys(('use_bdlora', 'arrow_config', 'kasa_config', 'monteclora_config'), (False,)),
}
"""Keys with an effect -> the values that have none here. Null is one of them."""
_WITHOUT_EFFECT = {
    *('auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode', 'task_type'),
    *('peft_version', 'lora_dropout', 'runtime_config', 'ensure_weight_tying'),
    # Of which weights, which the tensors say; and of how they begin.
    *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'),
    *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config', 'velora_config'),
    *('megatron_config', 'megatron_core', 'qalora_group_size'),
}


def is_adapters(path: Path) -> bool:
    """Whether a directory holds adapters, and no model beside them."""
    return path.is_dir() and (path / CONFIG).is_file() and not directories.is_huggingface(path)


def base_of(path: Path) -> str:
    """What the adapters say that their base is. Raises UserError where they say nothing."""
    name = read_object(path / CONFIG).get('base_model_name_or_path')
    if not isinstance(name, str) or not name:
        raise UserError(f'{path / CONFIG} names no base: name it before them, BASE+{path}')
    return name


def upon(directory: Path, params: Params, config: ModelConfig) -> Params:
    """`params`, which have layers apart and are to be read, with the adapters of a directory upon
    their weights.

    Raises UserError for adapters of another model, of a kind that is not supported, and for files
    that are damaged.
    """
    settings = read_object(directory / CONFIG)
    _check(settings)
    tensors = _tensors(directory)
    factors = _paired(tensors, directory)
    homes = _homes(config)
    for module in factors:
        if module not in homes:
            raise UserError(
                f'{directory}: {module} is no weight of this model that adapters can be put upon: '
                'they are of another model'
            )
    _check_targets(settings, factors, directory)
    paths = {homes[module]: module for module in factors}

    def leaf(path: str, w: Unread) -> Unread | Adapted:
        if path not in paths:
            return w
        module = paths[path]
        a, b = (_read(tensors, name) for name in factors[module])
        rank, scale = _rank_and_scale(settings, module)
        return _adapted(path, w, a, b, module, rank, scale, config, directory)

    return map_named(leaf, params)


def merged(params: Params) -> Params:
    """The same with weights and their adapters as one, summed in float32 when they are read."""

    def leaf(path: str, w: Unread | Adapted) -> Unread:
        if not isinstance(w, Adapted):
            return w
        base: Any = w.base

        def read() -> np.ndarray:
            added = np.tensordot(np.asarray(w.a), np.float32(w.scale) * np.asarray(w.b), 1)
            return base.read().astype(np.float32) + added

        return Unread(base.shape, np.dtype(np.float32), read)

    return map_named(leaf, params, is_leaf=lambda w: isinstance(w, Adapted))


def write(
    out: Path, params: Params, config: ModelConfig, tune: LoRA, *, base: str, dtype: Dtype
) -> int:
    """Write the adapters of `params`, layers apart and on the host, to a directory that PEFT loads
    upon `base`; how many numbers they have. Whole or not at all, see `whole.written`."""
    tensors = _Written(params, config)
    size = sum(math.prod(tensors.shape(name)) for name in tensors)
    settings = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': tune.rank,
        'lora_alpha': int(tune.alpha) if tune.alpha == int(tune.alpha) else tune.alpha,
        'lora_dropout': tune.dropout,
        'target_modules': sorted({name.removeprefix(_PREFIX).split('.')[-3] for name in tensors}),
        'bias': 'none',
        'fan_in_fan_out': False,
        'use_rslora': False,
        'use_dora': False,
        'modules_to_save': None,
        'inference_mode': True,
    }
    n_bytes = size * FLOATS[KINDS[dtype]].itemsize
    with whole.written(out, size=n_bytes, directory=True) as partial:
        write_shard(partial / _FILES[0], list(tensors), tensors, dtype)
        write_json(partial / CONFIG, settings)
    return size


class _Written(Tensors):
    """Factors by the names of PEFT, as it stores them: A [R, inputs], B [outputs, R]."""

    def __init__(self, params: Params, config: ModelConfig):
        leaves = dict(named_weights(params))
        self._factors: dict[str, np.ndarray] = {}
        for module, path in _homes(config).items():
            w = leaves[path]
            if isinstance(w, Adapted):
                R = w.a.shape[-1]
                a, b = np.asarray(w.a).reshape(-1, R).T, np.asarray(w.b).reshape(R, -1).T
                self._factors |= {_name(module, 'A'): a, _name(module, 'B'): b}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._factors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._factors[name].dtype


def named_weights(params: Params) -> list[tuple[str, Any]]:
    """Weights by their dotted paths, adapted ones as one."""
    found: list[tuple[str, Any]] = []
    map_named(
        lambda path, w: found.append((path, w)), params, is_leaf=lambda w: isinstance(w, Adapted)
    )
    return found


def _name(module: str, factor: str) -> str:
    return f'{_PREFIX}{module}.lora_{factor}.weight'


def _homes(config: ModelConfig) -> dict[str, str]:
    """Modules of Hugging Face's model that can have adapters -> our paths, layers in them."""
    return {
        theirs.format(i=i).removesuffix('.weight'): path.replace('blocks.', f'blocks.{i}.', 1)
        for path, (theirs, _) in HUGGING_FACE.table.items()
        if path.rsplit('.', 1)[-1] in INPUTS
        for i in range(config.layers)
    }


def _check(settings: Mapping[str, Any]) -> None:
    if settings.get('peft_type') != 'LORA':
        raise UserError(
            f'{CONFIG}: peft_type is {short(settings.get("peft_type"))}, and LORA is supported'
        )
    for name, value in settings.items():
        if value is None or name in _READ | _WITHOUT_EFFECT:
            continue
        if name in _NEUTRAL:
            if not any(
                value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]
            ):
                raise unsupported(CONFIG, name, settings)
        elif value not in (False, [], {}, ''):
            raise UserError(f'{CONFIG}: {name} = {short(value)} is not known')


def _tensors(directory: Path) -> Tensors:
    for name in _FILES:
        if (directory / name).exists():
            return directories.of_files([directory / name])
    raise UserError(f'{directory} has no {_FILES[0]}: fetch it')


def _paired(tensors: Tensors, directory: Path) -> dict[str, tuple[str, str]]:
    """Module -> the names of its A and its B."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UserError(
                f'{directory}: tensor {name!r} is no factor of an adapter: only these can be read'
            )
        found.setdefault(match[1], {})[match[2]] = name
    for module, pair in found.items():
        if len(pair) != 2:
            raise UserError(
                f'{directory}: of {module} there is lora_{min(pair)} alone: fetch the file again'
            )
    if not found:
        raise UserError(f'{directory} holds no adapters: fetch the file again')
    return {module: (pair['A'], pair['B']) for module, pair in found.items()}


def _check_targets(
    settings: Mapping[str, Any], factors: Mapping[str, Any], directory: Path
) -> None:
    """Raise UserError for a target of which there is no tensor."""
    targets = settings.get('target_modules')
    for target in targets if isinstance(targets, list) else ():
        if not any(module == target or module.endswith(f'.{target}') for module in factors):
            raise UserError(
                f'{directory}: {CONFIG} targets {short(target)}, of which there are no factors: '
                'the two files are of different adapters, or they are of another model'
            )


def _rank_and_scale(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Of the adapter of a module: alpha / rank, or what patterns of its name say."""
    rank = _by_pattern(settings, 'rank_pattern', module, count)
    alpha = _by_pattern(settings, 'alpha_pattern', module, number)
    rank = count(settings, 'r', CONFIG, 8) if rank is None else rank
    alpha = number(settings, 'lora_alpha', CONFIG, 8) if alpha is None else alpha
    return rank, alpha / (math.sqrt(rank) if settings.get('use_rslora') else rank)


def _by_pattern(
    settings: Mapping[str, Any], name: str, module: str, read: Callable[..., Any]
) -> Any:
    """PEFT matches the end of a module's name, as a regular expression."""
    patterns = settings.get(name) or {}
    try:
        hits = (key for key in patterns if re.match(rf'(.*\.)?({key})$', module))
        key = next(hits, None)
    except (re.error, TypeError):
        raise UserError(f'{CONFIG}: {name} = {short(patterns)} holds no patterns') from None
    return None if key is None else read(patterns, key, f'{CONFIG}: {name}')


def _read(tensors: Tensors, name: str) -> np.ndarray:
    w = np.asarray(tensors[name])
    if not finite(w):
        raise UserError(
            f'tensor {name!r} holds numbers that are not finite: fetch the adapters again'
        )
    return w.astype(np.float32)


def _adapted(
    path: str,
    w: Unread,
    a: np.ndarray,
    b: np.ndarray,
    module: str,
    rank: int,
    scale: float,
    config: ModelConfig,
    directory: Path,
) -> Adapted:
    name = path.rsplit('.', 1)[-1]
    letters, inputs = name.rsplit('_', 1)[-1], INPUTS[name]
    sizes = sizes_of(config)
    read, made = ([sizes[c] for c in part] for part in (inputs, letters[len(inputs) :]))
    for factor, found, wanted in (
        ('A', a.shape, (rank, math.prod(read))),
        ('B', b.shape, (math.prod(made), rank)),
    ):
        if found != wanted:
            raise UserError(
                f'{directory}: lora_{factor} of {module} has shape {found}, and this model takes '
                f'{wanted}: the adapters are of another model, or {CONFIG} is of other adapters'
            )
    # Each weight may have a scale of its own there.
    a, b = a.T.reshape(*read, rank), np.float32(scale) * b.T.reshape(rank, *made)
    return Adapted(w, a, b)  # type: ignore[arg-type]
