"""Placements: what ranks store is DTensor's, and pieces cover every box exactly once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from muonkit.distributed.placement import (
    Axis,
    Box,
    Placement,
    box_size,
    cells,
    pieces,
    replicated,
    shard_over,
    slices,
    whole,
)

SHAPES = [(16, 8), (18, 5), (1, 7), (0, 4), (8, 6, 10), (50257, 3), (12,), ()]
MESHES: list[tuple[tuple[int, ...], list[tuple[int | None, int]]]] = [
    # mesh, and for each axis the dim that it cuts and DTensor's split factor
    ((4,), [(0, 1)]),
    ((8,), [(0, 1)]),
    ((3,), [(1, 1)]),
    ((5,), [(None, 1)]),
    ((2, 4), [(None, 1), (0, 1)]),
    ((4, 2), [(0, 1), (1, 1)]),
    ((2, 3), [(1, 1), (0, 1)]),
    ((2, 2), [(0, 1), (0, 1)]),
    ((3, 2), [(0, 1), (0, 1)]),
    ((4, 2), [(0, 2), (0, 1)]),
    ((2, 4), [(0, 4), (0, 1)]),
    ((2, 2, 2), [(None, 1), (0, 2), (0, 1)]),
    ((2, 2, 2), [(0, 1), (1, 1), (0, 1)]),
    ((2, 2, 2), [(0, 4), (0, 2), (0, 1)]),
    ((2, 2), [(2, 1), (0, 1)]),
]


def placed(mesh: tuple[int, ...], axes: Any) -> Placement:
    return Placement(mesh, tuple(Axis(*axis) for axis in axes), range(math.prod(mesh)))


def fits(mesh: tuple[int, ...], axes: list[tuple[int | None, int]], shape: tuple[int, ...]) -> bool:
    """Whether the shape has these dims, and what is strided divides: where it does not, torch's own
    offsets are not where FSDP2's shards are.
    """
    for dim in {dim for dim, _ in axes if dim is not None}:
        if dim >= len(shape):
            return False
        cuts = [(n, split) for n, (d, split) in zip(mesh, axes, strict=True) if d == dim]
        if any(split > 1 for _, split in cuts) and shape[dim] % math.prod(n for n, _ in cuts):
            return False
    return True


@pytest.mark.parametrize(
    ("mesh", "axes", "shape"),
    [(*laid, shape) for laid in MESHES for shape in SHAPES if fits(*laid, shape)],
)
def test_boxes_are_dtensors(
    mesh: tuple[int, ...], axes: list[tuple[int | None, int]], shape: tuple[int, ...]
) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = [
        Replicate() if d is None else Shard(d) if f == 1 else _StridedShard(d, split_factor=f)
        for d, f in axes
    ]
    placement = placed(mesh, axes)
    for position, at in enumerate(itertools.product(*map(range, mesh))):
        size, offset = _compute_local_shape_and_global_offset(
            torch.Size(shape), mesh, list(at), placements
        )
        box = placement.box(shape, position)
        assert [stop - start for start, stop in box] == list(size)
        if math.prod(size):
            assert [start for start, _ in box] == list(offset)
        assert placement.coordinates(position) == at
        assert placement.position(at) == position


def test_two_separate_parts_by_two_axes_are_refused() -> None:
    """50,257 rows over TP, then FSDP2: the last part of the first half is in the second half."""
    uneven = placed((8, 2), [(0, 2), (0, 1)])
    with pytest.raises(ValueError, match=r"2 separate parts .*: every rank has to store one"):
        uneven.check_order((50257, 4))
    uneven.check_order((50256, 4))
    # Rows packed for TP, then FSDP2 on the same dim: torch's placements do not say who has what.
    with pytest.raises(ValueError, match=r"2 separate parts .* in which order the axes cut"):
        placed((2, 2), [(0, 2), (0, 2)]).check_order((16, 4))
    # By one axis they are what the placement says.
    packed = placed((2, 2), [(1, 1), (0, 2)])
    packed.check_order((16, 4))
    with pytest.raises(ValueError, match=r"2 separate parts .* expected one rectangle"):
        packed.box((16, 4), 0)


@pytest.mark.parametrize("length", [16, 12, 7, 1])
@pytest.mark.parametrize(("ranks", "split"), [(2, 2), (4, 2), (2, 3), (3, 4)])
def test_strides_are_dtensors(length: int, ranks: int, split: int) -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    if length % (ranks * split) and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 splits uneven lengths otherwise than fully_shard lays them")
    full = torch.arange(3 * length).view(3, length)
    shards, _ = _StridedShard(1, split_factor=split)._split_tensor(full, ranks, with_padding=False)
    placement = placed((ranks,), [(1, split)])
    for position, shard in enumerate(shards):
        assert torch.equal(stored(placement, full, position), shard)


axes_of = st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from([1, 1, 2, 3]))


def stored(placement: Placement, full: torch.Tensor, position: int) -> torch.Tensor:
    """What a rank stores: the runs of every dim one after the other."""
    for dim, runs in enumerate(placement.runs(tuple(full.shape), position)):
        some = [full.narrow(dim, a, b - a) for a, b in runs]
        full = torch.cat(some, dim) if some else full.narrow(dim, 0, 0)
    return full


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return placed(mesh, [draw(axes_of) for _ in mesh])


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple((a, b) for a, b in ends)


shapes = st.tuples(st.integers(0, 9), st.integers(1, 7))


@given(placements(), shapes, st.data())
def test_pieces_cover_a_box_once_and_are_who_stores_them(
    placement: Placement, shape: tuple[int, ...], data: st.DataObject
) -> None:
    box = data.draw(boxes(shape))
    assume(box_size(box))
    count = torch.zeros(shape, dtype=torch.int64)
    found = pieces(placement, shape, box)
    for piece in found:
        assert box_size(piece.box) > 0
        count[slices(piece.box, whole(shape))] += 1
    expected = torch.zeros_like(count)
    expected[slices(box, whole(shape))] = 1
    assert torch.equal(count, expected)
    for position in placement.positions:
        mine = tuple(piece.box for piece in found if position in piece.positions)
        assert mine == placement.parts(shape, position, box)


@given(placements(), shapes, st.data())
def test_parts_lie_where_they_are_cut_from(
    placement: Placement, shape: tuple[int, ...], data: st.DataObject
) -> None:
    box = data.draw(boxes(shape))
    full = torch.arange(math.prod(shape)).view(shape)
    for position in placement.positions:
        mine = stored(placement, full, position)
        assert tuple(mine.shape) == placement.local_shape(shape, position)
        # A box of one run is one part; of several, each is found where the rank has it.
        for part in placement.parts(shape, position, box):
            cut = placement.slices(shape, position, part)
            assert torch.equal(mine[cut], full[slices(part, whole(shape))])
            there = tuple((some.start, some.stop) for some in cut)
            assert placement.origin(shape, position, there) == part


@given(placements(), shapes, st.data())
def test_pieces_within_a_place_along_the_copies_are_those_of_one_copy(
    placement: Placement, shape: tuple[int, ...], data: st.DataObject
) -> None:
    axes = (
        data.draw(st.lists(st.sampled_from(placement.copies()), unique=True))
        if (placement.copies())
        else []
    )
    me = data.draw(st.sampled_from(list(placement.positions)))
    where = placement.where(me, axes)
    alone = pieces(placement, shape, whole(shape), where)
    together = pieces(placement, shape, whole(shape))
    assert [piece.box for piece in alone] == [piece.box for piece in together]
    for one, every in zip(alone, together, strict=True):
        agreeing = tuple(p for p in every.positions if placement.where(p, axes) == where)
        assert one.positions == agreeing


@given(placements(), st.data())
def test_twins_differ_along_the_given_axes_only(placement: Placement, data: st.DataObject) -> None:
    me = data.draw(st.sampled_from(list(placement.positions)))
    axes = data.draw(st.sets(st.integers(0, len(placement.mesh) - 1)))
    twins = placement.replicas(me, sorted(axes))
    others = [i for i in range(len(placement.mesh)) if i not in axes]
    assert me in twins
    assert len(set(twins)) == math.prod(placement.mesh[axis] for axis in axes)
    assert {placement.where(twin, others) for twin in twins} == {placement.where(me, others)}
    # The same list for each of them, in the same order: the k-th of one is the k-th of all.
    assert all(placement.replicas(twin, sorted(axes)) == twins for twin in twins)


@given(placements(), shapes)
def test_a_shared_out_state_nests_and_covers_what_was_copied_once(
    placement: Placement, shape: tuple[int, ...]
) -> None:
    axes = placement.copies()
    shared = shard_over(placement, shape, axes)
    full = torch.arange(math.prod(shape)).view(shape)
    for at in placement.positions:
        before = stored(placement, full, at)
        cut = shared.slices_within(placement, shape, at)
        assert torch.equal(before[cut], stored(shared, full, at))
        if shared != placement:
            parts = [stored(shared, full, twin) for twin in placement.replicas(at, axes)]
            together = torch.cat([part.flatten() for part in parts])
            assert torch.equal(together.sort().values, before.flatten().sort().values)
    assert shared.copies() == (() if shared != placement else axes)


def test_what_is_shared_out_by_hand() -> None:
    # Rows, over two ranks that had all of it.
    assert shard_over(replicated(2), (5, 3), (0,)).box((5, 3), 1) == ((3, 5), (0, 3))
    # DP x TP on rows: within what TP left, not across it.
    tp = placed((2, 2), [(None, 1), (0, 1)])
    shared = shard_over(tp, (8, 3), (0,))
    assert shared.axes == (Axis(0, 2), Axis(0, 1))
    assert [shared.box((8, 3), at)[0] for at in range(4)] == [(0, 2), (4, 6), (2, 4), (6, 8)]
    # Where parts of rows would not nest, columns are cut.
    assert shard_over(tp, (6, 4), (0,)).axes[0].dim in (0, 1)
    uneven = shard_over(placed((8, 2), [(None, 1), (0, 1)]), (50257, 4), (0,))
    assert uneven.axes == (Axis(1, 1), Axis(0, 1))
    # A scalar stays where it was.
    assert shard_over(replicated(3), (), (0,)) == replicated(3)


@given(placements(), st.integers(0, 20))
def test_cells_are_the_boxes_edges(placement: Placement, length: int) -> None:
    found = [interval for interval, _ in cells(placement, length, 0)]
    assert found == sorted(found)
    assert sum(stop - start for start, stop in found) == length
    runs = [placement.runs((length, 1), at)[0] for at in placement.positions]
    assert set(found) == {run for some in runs for run in some}


def test_positions_need_not_be_in_order() -> None:
    placement = Placement((2, 2), (Axis(0), Axis(None)), (3, 1, 0, 2))
    assert placement.coordinates(0) == (1, 0)
    assert placement.box((4, 1), 3) == placement.box((4, 1), 1) == ((0, 2), (0, 1))
    assert placement.box((4, 1), 0) == placement.box((4, 1), 2) == ((2, 4), (0, 1))
    (first, second) = pieces(placement, (4, 1), whole((4, 1)))
    assert (first.positions, second.positions) == ((3, 1), (0, 2))
    assert placement.where(2, (1,)) == ((1, 1),)
