"""Layouts: where one parameter and its optimizer state lie. Pure Python, no tensors.

`muonkit.distributed.layout` reads them from DTensors; a simulation writes them down.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from muonkit.distributed.placement import Axis, Placement, cells, replicated, shard_over
from muonkit.views import View

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ONE_RANK",
    "Layout",
    "computed_in_place",
    "cuts_experts_only",
    "scale_placement",
    "stage_placement",
    "with_state",
]


class Layout(NamedTuple):
    """Where one parameter of several ranks lies.

    Attributes:
        param_placement: of the parameter, and of its gradient.
        state_placement: of its momentum, or of AdamW's moments: on the same mesh, and on every rank
            within what that stores of the parameter.
        given: the mesh axis of `process_group`, where the tensor is repeated along it.
        implied: mesh axes that are missing from this parameter's own mesh (it is on a smaller
            mesh, or plain, as what a tensor parallel plan leaves out). Each rank along them keeps
            and trains an independent copy.
        mesh: the DeviceMesh of the state; None where the state is a plain tensor.
        at: this rank's position among those of `param_placement`.
        alone: whether these are positions of the parameter's own mesh: its matrices are whole where
            they are, so it may lie on other ranks than the optimizer's other parameters.
    """

    param_placement: Placement
    state_placement: Placement
    given: tuple[int, ...] = ()
    implied: tuple[int, ...] = ()
    mesh: Any = None
    at: int = 0
    alone: bool = False


#: Of a parameter that no other rank has anything to do with.
ONE_RANK = Layout(replicated(1), replicated(1), alone=True)


def with_state(
    placement: Placement,
    shape: tuple[int, ...],
    zero: int,
    given: tuple[int, ...] = (),
    implied: tuple[int, ...] = (),
) -> Layout:
    """The layout of a parameter that is placed like this.

    Args:
        shape: of the parameter.
        zero: 0 keeps the state where the parameter is; 1 (ZeRO-1) shards it over the mesh axes
            along which the parameter is replicated, except `implied` ones.
    """
    if not zero:
        return Layout(placement, placement, given, implied)
    axes = tuple(axis for axis in placement.copies() if axis not in implied)
    return Layout(placement, shard_over(placement, shape, axes), given, implied)


def stage_placement(
    layout: Layout, shape: tuple[int, ...], stage_shape: tuple[int, ...]
) -> Placement:
    """Where the stage's state lies: as the momentum, and repeated along the mesh axes that cut a
    dim of which the stage's state has one value only.
    """
    axes = tuple(
        Axis(None) if axis.dim is not None and stage_shape[axis.dim] != shape[axis.dim] else axis
        for axis in layout.state_placement.axes
    )
    return layout.state_placement._replace(axes=axes)


def scale_placement(layout: Layout, shape: tuple[int, ...], scales: tuple[int, ...]) -> Placement:
    """Where the scales of a momentum in int8 lie: cut as the momentum, each with its block.

    Args:
        scales: their logical shape.

    Raises:
        ValueError: a rank has a part of a block.
    """
    placement = layout.state_placement
    for dim, (length, count) in enumerate(zip(shape, scales, strict=True)):
        if length == count:
            continue
        extent = -(-length // count)
        parts = cells(placement, length, dim)
        blocks = [((a // extent, -(-b // extent)), at) for (a, b), at in parts]
        whole = all(a % extent == 0 and (b % extent == 0 or b == length) for (a, b), _ in parts)
        if not whole or blocks != cells(placement, count, dim):
            raise ValueError(
                f"momentum_dtype='int8' keeps a scale for each {extent} neighbours along dim "
                f"{dim}, and {placement.described()} cuts that dim of {length} in parts of "
                f"{', '.join(sorted({str(b - a) for (a, b), _ in parts}))}: shard another dim, or "
                f"over a number of ranks that shares {count} such blocks evenly, or give it "
                "another momentum_dtype in its group (Rule(..., options={'momentum_dtype': "
                "'bfloat16'}))"
            )
    return placement


def cuts_experts_only(axes: Sequence[Axis], ndim: int, view: str) -> bool:
    """Whether the matrices of a parameter that is cut so are all whole."""
    cut = [axis.dim for axis in axes if axis.dim is not None]
    return not cut or (View.parse(view).steps[0] == "experts" and max(cut) < ndim - 2)


@functools.lru_cache(maxsize=1024)
def _is_whole(placement: Placement, shape: tuple[int, ...]) -> bool:
    """Whether every rank stores all of a tensor of this shape."""
    return all(placement.local_shape(shape, at) == shape for at in placement.positions)


def computed_in_place(
    layout: Layout, shape: tuple[int, ...], view: str | None, replicas: str
) -> bool:
    """Whether a rank computes what it stores of a parameter as if it were alone: every matrix is
    whole where it lies, and no rank waits for another's work.

    Args:
        view: None for a parameter of AdamW's.
        replicas: the option of Muon's groups.
    """
    if layout.state_placement != layout.param_placement:
        return False
    if view is None:
        return True
    copies = layout.param_placement.copies()
    if any(axis in layout.given for axis in copies):
        return False
    if not cuts_experts_only(layout.param_placement.axes, len(shape), view):
        return _is_whole(layout.param_placement, shape)
    # Copies along mesh axes: each computes the same, or the plan divides the work among them.
    others = [axis for axis in copies if axis not in layout.implied]
    return not others or replicas == "recompute"
