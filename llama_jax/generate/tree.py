"""A tree of token sequences, in which every common beginning stands once (host, numpy)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Asked = dict[int, list[tuple[int, int]]]
"""Tokens whose log-probability is asked for at one place, each with who asks: (number of the
sequence, number of the token among those that it asks for)."""


@dataclass
class Node:
    """A run of tokens that its sequences share, from `depth` on."""

    tokens: np.ndarray
    depth: int
    children: list[Node] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    """By offset: what is asked for after that token of the run."""
    size: int = 0
    """Tokens of the run and of all below it."""

    @property
    def end(self) -> int:
        """Depth of what follows the run."""
        return self.depth + len(self.tokens)


def grow(sequences: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[Node]:
    """The trees of `sequences`, none of which is empty. Of each, targets[i] are asked for: the last
    of them after its last token, the one before after the token before, and so on."""
    # As arrays of one type, whose bytes sort and compare fast.
    rows = [np.asarray(sequence, '>u4') for sequence in sequences]
    order = sorted(range(len(rows)), key=lambda i: rows[i].tobytes())
    roots: list[Node] = []
    # Ranges of `order` that agree up to a depth, and the list that their node joins.
    open_: list[tuple[int, int, int, list[Node], tuple[Node, ...]]] = []
    if order:
        open_.append((0, len(order), 0, roots, ()))
    while open_:
        low, high, depth, siblings, path = open_.pop()
        parts: list[tuple[int, int]] = []
        start = low
        for i in range(low + 1, high + 1):
            if i == high or rows[order[i]][depth] != rows[order[start]][depth]:
                parts.append((start, i))
                start = i
        for low_, high_ in parts:
            first, last = rows[order[low_]], rows[order[high_ - 1]]
            end = depth + _common(first[depth:], last[depth:])
            node = Node(first[depth:end].astype(np.int32), depth)
            siblings.append(node)
            above: tuple[Node, ...] = (*path, node)
            # Those that end here sort first.
            while low_ < high_ and len(rows[order[low_]]) == end:
                _ask(above, order[low_], end, targets[order[low_]])
                low_ += 1
            if low_ < high_:
                open_.append((low_, high_, end, node.children, above))
    for node in reversed(list(_all(roots))):
        node.size = len(node.tokens) + sum(child.size for child in node.children)
    return roots


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _ask(path: tuple[Node, ...], owner: int, length: int, targets: Sequence[int]) -> None:
    """Note what sequence `owner` asks for, along the nodes that spell it."""
    place, at = length - len(targets), len(path) - 1
    while at and path[at].depth > place:
        at -= 1
    for number, target in enumerate(targets):
        while place >= path[at].end:
            at += 1
        asked = path[at].asked.setdefault(place - path[at].depth, {})
        asked.setdefault(int(target), []).append((owner, number))
        place += 1


def _all(roots: Sequence[Node]) -> Iterator[Node]:
    """Every node, parents first."""
    todo = list(roots)
    while todo:
        node = todo.pop()
        yield node
        todo.extend(node.children)


def chain(root: Node) -> tuple[list[Node], list[Node]]:
    """The nodes from `root` on up to the first that branches, and its branches."""
    nodes = [root]
    while len(nodes[-1].children) == 1:
        nodes += nodes[-1].children
    return nodes, nodes[-1].children


@dataclass
class Strip:
    """Subtrees written one after the other, each branch behind the one before."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    untils: list[int] = field(default_factory=list)
    """Of each token the first place of the strip that does not go on from it."""
    asked: list[tuple[int, Asked]] = field(default_factory=list)
    """(place in the strip, what is asked for there)."""

    def write(self, root: Node) -> None:
        """Put a subtree behind all else."""
        todo: list[tuple[Node, bool]] = [(root, False)]
        begins: list[int] = []
        while todo:
            node, done = todo.pop()
            if done:
                start, end = begins.pop(), len(self.tokens)
                self.untils[start : start + len(node.tokens)] = [end] * len(node.tokens)
                continue
            start = len(self.tokens)
            begins.append(start)
            self.tokens.extend(node.tokens.tolist())
            self.depths.extend(range(node.depth, node.end))
            self.untils.extend([0] * len(node.tokens))
            self.asked.extend((start + offset, what) for offset, what in node.asked.items())
            todo.append((node, True))
            todo.extend((child, False) for child in reversed(node.children))


def packed(nodes: Sequence[Node], capacity: int) -> list[list[Node]]:
    """Subtrees, none of which is larger than `capacity`, into few bins of that size: the largest
    first, each where least room is left over."""
    bins: list[list[Node]] = []
    rooms: list[tuple[int, int]] = []  # (room, number of the bin), sorted
    for node in sorted(nodes, key=lambda node: -node.size):
        at = bisect.bisect_left(rooms, (node.size, -1))
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(at)
        bins[number].append(node)
        bisect.insort(rooms, (room - node.size, number))
    return bins
