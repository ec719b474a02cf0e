"""Nodes: a result enters each node once, and is passed on within it. Pure Python, no tensors.

Links between nodes are slower than those within one. Of the ranks of another node that store the
same part of a parameter one, the *relay*, receives it from the owner, and sends it to the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from muonkit.distributed.placement import Box, Piece

__all__ = ["Hop", "count_hops", "hops", "share_nodes"]


class Hop(NamedTuple):
    """A part of a result on its way from one rank to another.

    Attributes:
        source, to: positions; equal where the owner stores the part itself.
        box: the part.
        late: sent by a relay, once it has it.
    """

    source: int
    to: int
    box: Box
    late: bool


def _by_node(positions: Iterable[int], node: int) -> dict[int, list[int]]:
    """The positions of each node of so many ranks."""
    found: dict[int, list[int]] = {}
    for position in positions:
        found.setdefault(position // node, []).append(position)
    return found


def relay(holders: Sequence[int], index: int, node: int) -> int:
    """Which of a node's ranks receives a part from an owner that is number `index` of its own node:
    the rank of that number, so that owners share the links out, if it stores the part.
    """
    same = holders[0] // node * node + index
    return same if same in holders else holders[index % len(holders)]


def hops(pieces: Iterable[Piece], owner: int, node: int) -> list[Hop]:
    """How the parts of an owner's result come to all who store them."""
    found = []
    for box, positions in pieces:
        for number, holders in _by_node(positions, node).items():
            first = owner if number == owner // node else relay(holders, owner % node, node)
            if first != owner:
                found.append(Hop(owner, first, box, late=False))
            for to in holders:
                if to != first or first == owner:
                    found.append(Hop(first, to, box, late=first != owner))
    return found


def share_nodes(pieces: Iterable[Piece], node: int) -> bool:
    """Whether any node has a part on several of its ranks; if none has, no owner needs a relay."""
    return any(
        len({position // node for position in positions}) < len(positions)
        for _, positions in pieces
    )


def count_hops(
    pieces: Sequence[tuple[int, Sequence[int]]],
    owners: Mapping[int, int],
    node: int,
    within: bool,
) -> tuple[dict[int, int], dict[int, int]]:
    """The elements that ranks send and receive for results of one kind, as all their `hops` have
    them together.

    Args:
        pieces: for each part its number of elements, and the positions that store it.
        owners: how many results each of these positions has.
        within: count what stays in a node, too.
    """
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    by_index: dict[tuple[int, int], int] = {}  # results by node of the owner, and its number in it
    for owner, count in owners.items():
        key = owner // node, owner % node
        by_index[key] = by_index.get(key, 0) + count
    indices: dict[int, int] = {}
    for (_, index), count in by_index.items():
        indices[index] = indices.get(index, 0) + count

    def add(sums: dict[int, int], position: int, elements: int) -> None:
        sums[position] = sums.get(position, 0) + elements

    for size, positions in pieces:
        nodes = _by_node(positions, node)
        for number, holders in nodes.items():
            for index, all_of_it in indices.items():
                count = all_of_it - by_index.get((number, index), 0)  # of owners in other nodes
                if not count:
                    continue
                first = relay(holders, index, node)
                add(received, first, size * count)
                if within and len(holders) > 1:
                    add(sent, first, size * count * (len(holders) - 1))
                    for to in holders:
                        if to != first:
                            add(received, to, size * count)
        for owner, count in owners.items():
            own = nodes.get(owner // node, [])
            add(sent, owner, size * count * (len(nodes) - bool(own)))
            if within:
                others = [to for to in own if to != owner]
                add(sent, owner, size * count * len(others))
                for to in others:
                    add(received, to, size * count)
    return sent, received
