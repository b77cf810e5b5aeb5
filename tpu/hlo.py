"""What an optimized HLO program moves between chips: read from its text.

The text is that of `compiled.as_text()`: computations in braces, one instruction a line, scheduled.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

KINDS = (
    'all-gather',
    'all-reduce',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'collective-broadcast',
    'ragged-all-to-all',
)


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = result opcode(operands), attributes`."""

    name: str
    result: str
    """Type, such as `bf16[8,128]{1,0}`, or a tuple of them."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def calls(self, attribute: str) -> str | None:
        """The computation that `attribute` (`calls`, `body`, `condition`) names."""
        found = re.search(rf'\b{attribute}=%([\w.\-]+)', self.attributes)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """Where in the source program it comes from, without the transformations around it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        parts = found[1].split('/') if found else []
        return '/'.join(part for part in parts if '(' not in part and part not in _WRAPPERS)


_WRAPPERS = {'while', 'body', 'closed_call', 'checkpoint', 'rematted_computation', 'eval_jaxpr'}


@dataclass
class Program:
    """Computations by name, each a list of instructions in the order of their execution."""

    entry: str
    computations: dict[str, list[Instruction]]
    users: dict[str, dict[str, list[Instruction]]] = field(default_factory=dict)
    """By computation and name of an instruction: the instructions that read it."""


@dataclass(frozen=True)
class Collective:
    """One movement of data, as often as one run of the program executes it."""

    kind: str
    shapes: tuple[str, ...]
    """Whole arrays of one chip, such as `bf16[8192,22016]`: what an all-gather gives, what a
    reduction takes."""
    n_bytes: int
    """Bytes of these arrays, unpadded."""
    count: int
    op_name: str
    group: int
    """Chips that exchange with one another."""
    rewritten: bool = False
    """A reduce-scatter that the text writes as an all-reduce of which only slices are used."""
    gathers: bool = False
    """An all-reduce that adds up pieces which each chip put into zeros: a slow all-gather."""
    inexact: bool = False
    """Within a loop whose number of turns the text does not tell: counted once."""


_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%([\w.\-]+) \(.*\{\s*$')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')


def parse(text: str) -> Program:
    """Read the text of an optimized module."""
    program = Program('', {})
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            program.computations[name] = []
            program.users[name] = defaultdict(list)
            if header[1]:
                program.entry = name
            continue
        found = _INSTRUCTION.match(line)
        if found and program.computations:
            instruction = _instruction(found[1], found[2])
            program.computations[name].append(instruction)
            for operand in instruction.operands:
                program.users[name][operand].append(instruction)
    if not program.entry:
        raise ValueError('no ENTRY computation: this is not the text of an HLO module')
    return program


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index('(')
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    operands = tuple(re.findall(r'%([\w.\-]+)', inside))
    # A constant's value and a parameter's number stand where operands do.
    attributes = rest[end + 1 :] if operands else f'{inside}{rest[end + 1 :]}'
    return Instruction(name, result, rest[:start], operands, attributes)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f'unbalanced parentheses: {text[:80]}')


def collectives(program: Program) -> list[Collective]:
    """All collectives of one run, equal ones counted together, most bytes first.

    An all-reduce of several arrays is counted by what becomes of each.
    """
    counts: dict[Collective, int] = defaultdict(int)
    chains = set()
    for computation, instruction, count, exact in _executed(program, program.entry, 1, True):
        kind = instruction.opcode.removesuffix('-start')
        if kind not in KINDS:
            continue
        # Overlapped with computation, it stands in each fusion that starts, carries on or ends it.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        arrays = _moved(instruction, kind)
        roles = [(False, False)] * len(arrays)
        if kind == 'all-reduce':
            roles = [
                (
                    _only_sliced(program, computation, instruction, i),
                    _is_piece_in_zeros(program, computation, operand),
                )
                for i, operand in enumerate(instruction.operands)
            ]
        for rewritten, gathers in sorted(set(roles)):
            part = [
                a for a, role in zip(arrays, roles, strict=True) if role == (rewritten, gathers)
            ]
            key = Collective(
                kind='reduce-scatter' if rewritten else kind,
                shapes=tuple(array for array, _ in part),
                n_bytes=sum(n_bytes for _, n_bytes in part),
                count=0,
                op_name=instruction.op_name,
                group=_group_size(instruction.attributes),
                rewritten=rewritten,
                gathers=gathers,
                inexact=not exact,
            )
            counts[key] += count
    found = [replace(collective, count=count) for collective, count in counts.items()]
    return sorted(found, key=lambda c: (-c.n_bytes * c.count, c.kind, c.shapes, c.op_name))


def estimated_cycles(program: Program) -> int:
    """Cycles of one run by the TPU compiler's cost model.

    Fusions and copies carry an estimate; kernels (attention) and collectives do not.
    """
    total = 0
    for _, instruction, count, _ in _executed(program, program.entry, 1, True, fusions=False):
        total += count * (_number(r'"estimated_cycles":"(\d+)"', instruction.attributes) or 0)
    return total


def kernels(program: Program) -> dict[str, int]:
    """Custom kernels of one run by name, and how often they run."""
    counts: dict[str, int] = defaultdict(int)
    for _, instruction, count, _ in _executed(program, program.entry, 1, True):
        if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
            counts[re.sub(r'\.\d+$', '', instruction.name)] += count
    return dict(counts)


def _executed(
    program: Program, computation: str, count: int, exact: bool, *, fusions: bool = True
) -> Iterator[tuple[str, Instruction, int, bool]]:
    """(computation, instruction, executions, whether these are known), through loops and calls."""
    for instruction in program.computations[computation]:
        yield computation, instruction, count, exact
        if instruction.opcode == 'while':
            turns = trip_count(program, computation, instruction)
            known = exact and turns is not None
            body = instruction.calls('body')
            assert body
            yield from _executed(program, body, count * (turns or 1), known, fusions=fusions)
        elif instruction.opcode == 'conditional':
            branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
            names = re.findall(r'%([\w.\-]+)', branches[1]) if branches else []
            names += [instruction.calls(f'{way}_computation') for way in ('true', 'false')]
            for branch in filter(None, names):
                yield from _executed(program, branch, count, exact, fusions=fusions)
        elif fusions or instruction.opcode != 'fusion':
            called = instruction.calls('calls')
            if called is None and instruction.opcode == 'call':
                called = instruction.calls('to_apply')
            if called:
                yield from _executed(program, called, count, exact, fusions=fusions)


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """Turns of a `while` that counts from 0 up to a constant, as a scan does; None: not told."""
    known = _number(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known is not None:
        return known
    condition = loop.calls('condition')
    assert condition
    by_name = {instruction.name: instruction for instruction in program.computations[condition]}
    test = next((i for i in by_name.values() if 'direction=LT' in i.attributes), None)
    if test is None or len(test.operands) != 2:
        return None
    first, limit = (
        _constant(program, computation, loop, by_name[operand]) for operand in test.operands
    )
    return None if limit is None or first != 0 else limit


def _constant(program: Program, outer: str, loop: Instruction, value: Instruction) -> int | None:
    """Value of a constant in a loop's condition, or of one that enters the loop."""
    while value.opcode == 'get-tuple-element':
        index = _number(r'index=(\d+)', value.attributes)
        by_name = {instruction.name: instruction for instruction in program.computations[outer]}
        entering = by_name.get(loop.operands[0])
        if index is None or entering is None or entering.opcode != 'tuple':
            return None
        value = by_name[entering.operands[index]]
        while value.opcode in ('copy', 'bitcast'):
            value = by_name[value.operands[0]]
        if value.opcode == 'get-tuple-element':
            return None
    return _number(r'^(-?\d+)', value.attributes) if value.opcode == 'constant' else None


def _moved(instruction: Instruction, kind: str) -> list[tuple[str, int]]:
    """Each array that moves and its bytes."""
    arrays = []
    for dtype, dims in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', instruction.result)):
        sizes = [int(size) for size in dims.split(',') if size]
        bits = _number(r'(\d+)', dtype) or 8  # pred
        arrays.append((f'{dtype}[{dims}]', math.prod(sizes) * bits // 8))
    if instruction.opcode.endswith('-start') and kind != 'all-reduce':
        # (operands, results, and for a permute two flags)
        n = len(instruction.operands)
        arrays = arrays[n : 2 * n]
    if kind == 'reduce-scatter':
        group = _group_size(instruction.attributes)
        arrays = [(f'{group} x {array}', n_bytes * group) for array, n_bytes in arrays]
    return arrays


def _group_size(attributes: str) -> int:
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', attributes)
    if listed:
        return listed[1].count(',') + 1
    iota = _number(r'replica_groups=\[\d+,(\d+)\]', attributes)
    if iota is not None:
        return iota
    grid = re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', attributes)
    if grid:
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", grid[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", grid[2]))
    return 1


_SAME_DATA = {
    *('bitcast', 'convert', 'copy', 'copy-start', 'copy-done'),
    *('get-tuple-element', 'reshape', 'transpose'),
}


def _only_sliced(
    program: Program, computation: str, value: Instruction, element: int | None = None
) -> bool:
    """Whether every use of `value` is a dynamic slice, within fusions as well.

    `element` is that of a tuple; a value that is no tuple has one only.
    """
    users = program.users[computation][value.name]
    if value.result.startswith('(') and element is not None:
        taken = f'index={element}'
        users = [user for user in users if taken in re.split(r'[,\s]+', user.attributes)]
    return bool(users) and all(_slices(program, computation, value, user) for user in users)


def _slices(program: Program, computation: str, value: Instruction, user: Instruction) -> bool:
    if user.opcode == 'dynamic-slice':
        return user.operands[0] == value.name
    if user.opcode in _SAME_DATA:
        return _only_sliced(program, computation, user)
    called = user.calls('calls')
    if user.opcode != 'fusion' or not called:
        return False
    places = [i for i, operand in enumerate(user.operands) if operand == value.name]
    return all(
        _only_sliced(program, called, parameter)
        for parameter in program.computations[called]
        if parameter.opcode == 'parameter' and _number(r'^(\d+)', parameter.attributes) in places
    )


def _is_piece_in_zeros(program: Program, computation: str, name: str) -> bool:
    """Whether `name` is a dynamic update of a constant array, within a fusion as well."""
    by_name = {instruction.name: instruction for instruction in program.computations[computation]}
    value = by_name.get(name)
    while value and value.opcode in _SAME_DATA:
        value = by_name.get(value.operands[0])
    if value is None or value.opcode not in ('dynamic-update-slice', 'fusion'):
        return False
    if value.opcode == 'dynamic-update-slice':
        target = by_name.get(value.operands[0])
        return target is not None and target.opcode in ('broadcast', 'constant', 'parameter')
    called = value.calls('calls')
    assert called
    return _is_piece_in_zeros(program, called, program.computations[called][-1].name)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
