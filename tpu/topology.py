"""TPU slices by name, such as `v4:8x16x16`, and what their chips can hold and do."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from llama_jax.errors import UserError
from llama_jax.train.peak import datasheet


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    name: str
    compiler_name: str
    """What the compiler calls it."""
    hbm_bytes: float
    """Decimal gigabytes: the 7% to the binary ones are left to the runtime."""
    clock_hz: float | None
    """Of the compiler's cycles; None: not known. The peak divided by FLOPs per cycle: a core has
    four matrix units of 128 x 128 multiply-adds, a v4 or v5p chip two cores."""
    torus: bool
    """Three dimensions, two cores a chip that work as one (megacore)."""

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s."""
        peak = datasheet(f'TPU {self.name}')
        assert peak is not None, self.name
        return peak


CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v4', 'v4', 32e9, clock_hz=1.05e9, torus=True),
        Chip('v5e', 'v5e', 16e9, clock_hz=1.5e9, torus=False),
        Chip('v5p', 'v5', 95e9, clock_hz=1.75e9, torus=True),
        Chip('v6e', 'v6e', 32e9, clock_hz=None, torus=False),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips joined by fast links."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension: three, or two for v5e and v6e."""

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> Sequence[Any]:
        """Devices to compile for, none of which is there. Raises UserError if no such slice exists.

        Described as the pod is: v4 and v5p count one device per chip, and the links of a full torus
        wrap around (from 4x4x4 up, 16x16 on v5e and v6e). Without the wrap the compiler moves
        weights by all-reduce.
        """
        # The compiler's library looks for a TPU when it loads, over the network too, and lets one
        # process in at a time: none of that is wanted. The host type is any, or it warns.
        os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
        os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
        os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v4-8')
        os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
        from jax.experimental import topologies

        name = f'{self.chip.compiler_name}:{"x".join(map(str, self.shape))}'
        options: dict[str, Any] = {}
        if self.chip.torus:
            options['chip_config_name'] = 'megacore'
            options['chips_per_host_bounds'] = (2, 2, 1)
            if all(size % 4 == 0 for size in self.shape):
                options['wrap'] = (True, True, True)
        elif self.shape == (16, 16):
            options['wrap'] = (True, True, False)
        try:
            return topologies.get_topology_desc(
                platform='tpu', topology_name=name, **options
            ).devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            if not reason.startswith('INVALID_ARGUMENT'):
                raise
            raise UserError(
                f'the compiler knows no slice {self.chip.name}:{name.split(":")[1]} ({reason}); '
                'take a size that can be rented, such as v4:4x4x4 or v5e:4x4'
            ) from None
        except (RuntimeError, OSError) as error:
            raise UserError(
                f'the TPU compiler does not load ({str(error).splitlines()[0]}): '
                "pip install 'jax[tpu]' (Linux)"
            ) from None


def parse(name: str) -> Slice:
    """The slice called `name`, such as 'v4:8x16x16' or 'v5e:4x4'. Raises UserError."""
    chip, _, shape = name.partition(':')
    chip = 'v5p' if chip == 'v5' else chip
    if chip not in CHIPS:
        near = difflib.get_close_matches(chip, CHIPS, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'known are {", ".join(CHIPS)}'
        raise UserError(f'--topology {name!r}: no chip is called {chip!r}: {hint}')
    dimensions = 3 if CHIPS[chip].torus else 2
    sizes = shape.split('x')
    if len(sizes) != dimensions or not all(size.isdecimal() and int(size) for size in sizes):
        example = 'x'.join('4' * dimensions)
        raise UserError(
            f'--topology {name!r}: a {chip} slice has {dimensions} dimensions, '
            f'as in {chip}:{example}'
        )
    return Slice(CHIPS[chip], tuple(map(int, sizes)))
