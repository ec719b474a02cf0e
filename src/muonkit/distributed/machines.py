"""Machines: the rates that costs are reckoned with. Pure Python, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from muonkit.distributed.placement import Placement

__all__ = ["MACHINES", "Machine", "cheaper_repeated", "machine"]


class Machine(NamedTuple):
    """Rates of one rank, for choices of cost and for predictions.

    Attributes:
        flops: products, FLOP/s.
        intra: bytes/s that it sends within its node.
        inter: bytes/s that it sends to other nodes.
        node: ranks in a node.
    """

    flops: float
    intra: float
    inter: float
    node: int

    def rate(self, positions: Iterable[int]) -> float:
        """Bytes/s between these ranks."""
        nodes = {position // self.node for position in positions}
        return self.intra if len(nodes) <= 1 else self.inter


# Round figures for the choice between computing again and sending: half of what data sheets say.
# GPUs as an H100 with NVLink and 400 Gbit/s a rank, bf16 products; CPUs two cores and Ethernet.
MACHINES = {"cpu": (1e11, 2e9, 1e9), "cuda": (4e14, 2e11, 2.5e10)}


def machine(device: str, node: int) -> Machine:
    """The rates assumed for a type of device."""
    return Machine(*MACHINES.get(device, MACHINES["cuda"]), node)


def cheaper_repeated(
    rates: Machine, placement: Placement, axes: Sequence[int], flops: int, size: int
) -> bool:
    """Whether ranks that have copies along these axes had better compute the same, each set of
    shards among itself, than divide the matrices among all copies.

    Shared out, a rank computes less, and every result crosses the copies; it enters a node once,
    and is passed on within it.

    Args:
        flops: of all matrices.
        size: bytes that all matrices have when they travel.
    """
    copies = 1
    for axis in axes:
        copies *= placement.mesh[axis]
    ranks = len(placement.positions)
    shards = ranks // copies
    others = [axis for axis in range(len(placement.mesh)) if axis not in axes]
    one_set = placement.replicas(placement.positions[0], others)
    repeated = flops / shards / rates.flops
    repeated += 2 * (shards - 1) / shards**2 * size / rates.rate(one_set)
    shared = flops / ranks / rates.flops
    shared += (shards - 1) / shards * size / ranks / rates.rate(one_set)  # a set's own parts
    received = (ranks - 1) / ranks * size / shards
    holders = placement.replicas(placement.positions[0], axes)
    in_node = len(holders) / len({position // rates.node for position in holders})
    if in_node == len(holders):
        shared += received / rates.rate(placement.positions)
    else:
        shared += received / in_node / rates.inter
        shared += received / rates.intra if in_node > 1 else 0
    return repeated <= shared
