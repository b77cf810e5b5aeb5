"""Which files of a directory are the model: what the index names, else the one file of the usual
name. Copies, adapters and states of an optimizer beside them are left alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llama_jax.convert import safetensor_files, torch_files
from llama_jax.convert.stored import (
    Place,
    Stored,
    damaged,
    in_one,
    missing_files,
    read_object,
    unfinished,
)
from llama_jax.errors import UserError

log = logging.getLogger(__name__)

_READERS: Mapping[str, Callable[[Path], dict[str, Place]]] = {
    '.safetensors': safetensor_files.places,
    '.bin': torch_files.places,
    '.pth': torch_files.places,
}
_USUAL = (
    ('model.safetensors.index.json', 'model.safetensors'),
    ('pytorch_model.bin.index.json', 'pytorch_model.bin'),
)
"""An index and the file that stands alone, best first."""
_ADAPTERS = ('adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin')
_STRAY = re.compile(
    r'adapter|consolidated|optimizer|scheduler|training|random_states|rng_state|(^|[._-])ema([._-]|$)'
)
"""In the names of files that are no model on their own."""
_ELSEWHERE = {
    'params.json': "it has params.json of Meta's layout: fetch consolidated.00.pth as well",
    'consolidated.*': "it has weights in Meta's layout: fetch params.json as well",
    '*.gguf': 'name that file: {path}',
    'snapshots/*/config.json': 'it is a cache, name the model within: {parent}',
    'original/params.json': 'name the directory within: {parent}',
    'checkpoint-*/config.json': 'name one of the checkpoints within, such as {parent}',
    '*/config.json': 'name the directory within: {parent}',
    'pytorch_model-*.bin': 'the index of the files is missing: fetch pytorch_model.bin.index.json',
    'run.json': 'it is a run of this project: give --checkpoint {parent}',
    'lit_model.pth': 'it is of LitGPT: convert it (litgpt convert_from_litgpt)',
    'tf_model.h5': 'it has the weights for TensorFlow: fetch model.safetensors',
    'flax_model.msgpack': 'it has the weights for Flax: fetch model.safetensors',
    '*.onnx': 'it has a program in ONNX: fetch model.safetensors',
    'zero_to_fp32.py': 'it is a state of DeepSpeed: run zero_to_fp32.py, which writes the model',
    '*/*.distcp': 'it is a distributed state: write the model in one piece first',
}
"""What else may be in a directory without weights -> what to do then."""

_QUANTISED = (
    (r'\.(qweight|qzeros|g_idx)$', 'GPTQ or AWQ'),
    (
        r'\.(weight_scale|weight_scale_inv|input_scale|weight_packed|weight_zero_point)$',
        'fp8 or int',
    ),
    (r'\.(SCB|weight_format|absmax|quant_map|nested_\w+|quant_state\..+)$', 'bitsandbytes'),
    (r'\.(W_q|quant_scale)$', 'HQQ'),
    (r'\.(scales|biases)$', 'MLX, GPTQ or AWQ'),
)
"""Names of tensors that only quantised models have -> the method."""
UNQUANTISED = 'take the repository with the weights that are not quantised, or a GGUF file'


def is_huggingface(directory: Path) -> bool:
    """Whether the directory has weights by the names of Hugging Face, and config.json."""
    return _any_of(directory, *_USUAL) and os.path.lexists(directory / 'config.json')


def _any_of(directory: Path, *groups: Iterable[str]) -> bool:
    return any(os.path.lexists(directory / name) for names in groups for name in names)


def weights(directory: Path) -> Stored:
    """The tensors of a Hugging Face model; the headers of all files are read and no numbers.

    Raises UserError when it is not plain which files are the model, when one is missing or damaged,
    when two hold the same tensor, and for tensors that are quantised.
    """
    if _any_of(directory, _ADAPTERS) and _any_of(directory, *_USUAL):
        log.warning('%s holds an adapter (PEFT) beside the model: it is not applied', directory)
    for index, alone in _USUAL:
        if os.path.lexists(directory / index):
            return indexed(directory, index, beside=alone)
        if os.path.lexists(directory / alone):
            return of_files([directory / alone])
    files = sorted(directory.glob('*.safetensors'))
    candidates = [path for path in files if not _STRAY.search(path.name)]
    if len(candidates) == 1:
        return of_files(candidates)
    if candidates:
        names = ', '.join(path.name for path in candidates[:4])
        more = ', ...' if len(candidates) > 4 else ''
        raise UserError(
            f'{directory}: nothing says which of {names}{more} is the model: fetch '
            'model.safetensors.index.json, or keep one of them'
        )
    if files and not _any_of(directory, _ADAPTERS):
        raise UserError(
            f'{directory} has no model.safetensors, and {files[0].name} is none by its name: fetch '
            'it, or rename the file if it is the model'
        )
    raise nothing_in(directory, 'model.safetensors')


def of_files(paths: list[Path]) -> Stored:
    """The tensors of these files together. Raises UserError as `weights` does."""
    return plain(in_one((path, _READERS[path.suffix](path)) for path in paths))


def plain(places: Mapping[str, Place]) -> Stored:
    """The tensors at these places. Raises UserError when one of them is quantised."""
    for name, place in places.items():
        for pattern, method in _QUANTISED:
            if re.search(pattern, name):
                raise UserError(
                    f'{place.path}: tensor {name!r} is of weights quantised by {method}: '
                    f'{UNQUANTISED}'
                )
        if place.dtype is None:
            raise UserError(
                f'{place.path}: tensor {name!r} is of type {place.kind}, and weights are of F32, '
                f'F16 or BF16: if they are quantised, {UNQUANTISED}'
            )
    return Stored(places)


def nothing_in(directory: Path, lacks: str) -> UserError:
    """For the user, who named a directory that lacks something: what is there, and what to do."""
    if any((directory / name).exists() for name in _ADAPTERS):
        base = ''
        if (directory / _ADAPTERS[0]).is_file():
            name = read_object(directory / _ADAPTERS[0]).get('base_model_name_or_path')
            base = f' of {name}' if name else ''
        return UserError(
            f'{directory} holds an adapter{base} (PEFT) and no model: name the model before it, '
            f'MODEL+{directory}'
        )
    for pattern, remedy in _ELSEWHERE.items():
        path = min(directory.glob(pattern), default=None)
        if path is not None:
            said = remedy.format(path=path, parent=path.parent)
            return UserError(f'{directory} has no {lacks}: {said}')
    return UserError(f'{directory} has no {lacks}{unfinished(directory / lacks)}: fetch it')


def indexed(directory: Path, name: str, *, beside: str = '') -> Stored:
    """The tensors of the files that the index of that name says. Raises UserError as `weights`.

    `beside` is the file that some programs prefer to the index: it is told of where it is there and
    not among its files.
    """
    index = directory / name
    homes = read_object(index).get('weight_map')
    if not isinstance(homes, dict) or not homes:
        raise damaged(index, "it has no 'weight_map'")
    for tensor, home in homes.items():
        if not isinstance(home, str) or home != Path(home).name or not home:
            raise damaged(index, f'the file of {tensor!r} is {home!r}')
        if Path(home).suffix not in _READERS:
            raise UserError(f'{index}: {home} is of no kind that is read: give safetensors')
    files = sorted(set(homes.values()))
    if beside and beside not in files and os.path.lexists(directory / beside):
        log.warning(
            '%s: %s names %s and others, which are read; %s is there as well, which transformers '
            'would read: remove %s, or %s if it is the older one',
            *(directory, name, files[0], beside, beside, name),
        )
    absent = [file for file in files if not os.path.lexists(directory / file)]
    if absent:
        raise missing_files(directory, absent, name)
    stored = of_files([directory / file for file in files])
    for tensor, home in homes.items():
        place = stored.places.get(tensor)
        if place is None or place.path.name != home:
            raise UserError(
                f'{index}: tensor {tensor!r} is not in {home}: index and files are of different '
                'models, fetch both again'
            )
    return stored
