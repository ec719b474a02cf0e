"""Layouts: where each parameter and its state lie, read from DTensors and process groups.

This is where placements, plain arithmetic, meet torch.distributed.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from muonkit._groups import parameter_names
from muonkit.exchange import Domain
from muonkit.placement import Axis, Placement, box_size, replicated, shared_out, slices, whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Layout", "Layouts", "is_dtensor", "local", "ranks_per_node"]


class Layout(NamedTuple):
    """Where one parameter of several ranks lies.

    Attributes:
        stored, lives: of the parameter and of its state.
        given: mesh axes along which plain tensors, or DTensors of a smaller mesh, are repeated by
            `process_group`, not by a placement.
        mesh: of `lives`; None where the state is a plain tensor.
    """

    stored: Placement
    lives: Placement
    given: tuple[int, ...]
    mesh: DeviceMesh | None


class Layouts:
    """The layouts of an optimizer's parameters, and the one set of ranks that they share.

    Args:
        process_group: over which plain tensors are repeated (and DTensors, beside the axes of
            their own mesh); a 1-D DeviceMesh will do.
        zero: 1 shards the state over the ranks that would have copies of it.

    Raises:
        ValueError, TypeError: not a group that this rank belongs to; zero out of range, or without
            anything to share over.
    """

    def __init__(self, process_group: Any = None, zero: int = 0) -> None:
        if zero not in (0, 1) or isinstance(zero, bool):
            raise ValueError(
                f"zero should be 0 (state on every rank that has the parameter) or 1 (shared out), "
                f"but is: {zero!r}; parameters are sharded by fully_shard, gradients by "
                "muonkit.ddp_reduce_scatter_hook"
            )
        self.group: ProcessGroup | None = _group_of(process_group)
        self.zero: int = zero
        self.domain: Domain | None = None
        self._ranks: list[int] = []
        self._layouts: dict[Tensor, Layout] = {}
        self._full_meshes: dict[DeviceMesh, DeviceMesh] = {}

    def __getitem__(self, p: Tensor) -> Layout:
        return self._layouts[p]

    def get(self, p: Tensor) -> Layout | None:
        """The parameter's layout, or None where it is whole on this rank alone."""
        return self._layouts.get(p)

    def add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Find the parameters' layouts; those that are whole on this rank alone have none.

        Raises:
            ValueError: an unsupported placement, or another set of ranks than the others'.
        """
        named = [
            (name, p)
            for group in groups
            for name, p in zip(parameter_names(group), group["params"], strict=True)
        ]
        for name, p in named:
            if is_dtensor(p):
                self._keep(p, _of_dtensor(self, name, p))
        for _, p in named:  # these may lie on the others' mesh
            if not is_dtensor(p):
                self._keep(p, _of_plain(self, p))
        if self.zero and self.domain is None and _other_ranks():
            raise ValueError(
                "zero=1 shares the state out over the ranks that have copies of a parameter, but "
                "no parameter says which: pass process_group=torch.distributed.group.WORLD (the "
                "ranks of DDP), or shard the model with fully_shard, which shards the state too"
            )

    def _keep(self, p: Tensor, layout: Layout | None) -> None:
        if layout is not None:
            self._layouts[p] = layout

    def enter(
        self, name: str, group: ProcessGroup | None, ranks: Sequence[int], device: str
    ) -> None:
        """Make these the optimizer's ranks, or see that they are."""
        if self.domain is None:
            self.domain = _make_domain(group, ranks, device)
            self._ranks = sorted(ranks)
        elif sorted(ranks) != self._ranks:
            raise ValueError(
                f"{name} lies on ranks {_listed(sorted(ranks))}, others of this optimizer on "
                f"{_listed(self._ranks)}: all parameters of one optimizer share one set of ranks; "
                "distribute them over meshes of the same ranks, or make an optimizer for each set"
            )

    def positions(self, mesh: DeviceMesh) -> range | tuple[int, ...]:
        """Of the mesh's ranks, in row-major order."""
        order = {rank: position for position, rank in enumerate(self._ranks)}
        positions = tuple(order[rank] for rank in mesh.mesh.flatten().tolist())
        together = range(len(positions))
        return together if positions == tuple(together) else positions

    def new_state(
        self, p: Tensor, dtype: torch.dtype, shape: tuple[int, ...], lives: Placement
    ) -> Tensor:
        """Zeros of a logical shape on the parameter's ranks, lying as `lives` says."""
        assert self.domain is not None
        box = lives.box(shape, self.domain.position)
        own = torch.zeros([b - a for a, b in box], dtype=dtype, device=local(p).device)
        layout = self._layouts[p]
        if lives == layout.stored and is_dtensor(p) and shape == tuple(p.shape):
            return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if layout.mesh is None:
            return own
        return _as_dtensor(own, layout.mesh, lives, shape)

    def part(self, p: Tensor, tensor: Tensor) -> Tensor:
        """What this rank's state is for, of the parameter or its gradient; a view of its memory."""
        layout = self._layouts.get(p)
        mine = local(tensor)
        if layout is None or layout.lives == layout.stored:
            return mine
        assert self.domain is not None
        shape = tuple(p.shape)
        inside = layout.stored.box(shape, self.domain.position)
        return mine[slices(layout.lives.box(shape, self.domain.position), inside)]


def is_dtensor(tensor: Tensor) -> bool:
    """Without an import of DTensor where nobody has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank has, sharing its memory; any other tensor itself."""
    if type(tensor) is Tensor or not is_dtensor(tensor):
        return tensor
    own: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return own


def _other_ranks() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks_per_node() -> int:
    """As torchrun says; all ranks are on one node where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", sys.maxsize))


def _of_dtensor(layouts: Layouts, name: str, p: Any) -> Layout | None:
    own, axes = p.device_mesh, tuple(_axis(name, placement) for placement in p.placements)
    full: DeviceMesh = own
    given: tuple[int, ...] = ()
    if layouts.group is not None:
        full, given = _with_group(layouts, name, own)
        named = dict(zip(own.mesh_dim_names or (), axes, strict=False))
        if given:
            axes = tuple(named.get(axis, Axis(None)) for axis in full.mesh_dim_names or ())
    if full.size() == 1:
        return None
    layouts.enter(name, _group_of_mesh(full), full.mesh.flatten().tolist(), full.device_type)
    shape, sizes = tuple(p.shape), tuple(full.shape)
    stored = Placement(sizes, axes, layouts.positions(full))
    _check_box(layouts, name, p, stored)
    lives = shared_out(stored, shape, stored.copies()) if layouts.zero else stored
    return Layout(stored, lives, given, full)


def _of_plain(layouts: Layouts, p: Tensor) -> Layout | None:
    group = layouts.group
    if group is None or group.size() == 1:
        return None
    ranks = torch.distributed.get_process_group_ranks(group)
    mesh = next((m for m in layouts._full_meshes.values() if m.size() > len(ranks)), None)
    if mesh is not None:  # the others are DTensors on a mesh of which this group is one axis
        sizes = tuple(mesh.shape)
        axis = _axis_of_group(mesh, group)
        assert axis is not None
        stored = Placement(sizes, (Axis(None),) * len(sizes), layouts.positions(mesh))
        given: tuple[int, ...] = (axis,)
    else:
        layouts.enter("a plain tensor", group, ranks, p.device.type)
        stored, given = replicated(len(ranks)), (0,)
    if layouts.zero:
        lives = shared_out(stored, tuple(p.shape), given)
        return Layout(stored, lives, given, mesh or _mesh_of_group(group, p.device.type))
    return Layout(stored, stored, given, None)


def _axis(name: str, placement: Any) -> Axis:
    if placement.is_replicate():
        return Axis(None)
    if placement.is_partial():
        raise ValueError(
            f"{name} has the placement {placement}: a parameter is sharded or replicated along "
            "every mesh axis; redistribute it before the optimizer is made"
        )
    return Axis(placement.dim, getattr(placement, "split_factor", 1))


def _check_box(layouts: Layouts, name: str, p: Any, stored: Placement) -> None:
    """Refuse what our arithmetic does not describe, before anything is planned on it."""
    assert layouts.domain is not None
    shape = tuple(p.shape)
    try:
        boxes = [stored.box(shape, position) for position in stored.positions]
    except ValueError as error:
        raise ValueError(f"{name} {shape} with placements {p.placements}: {error}") from None
    box = boxes[stored.positions.index(layouts.domain.position)]
    expected, got = [b - a for a, b in box], list(local(p).shape)
    if expected != got and (box_size(box) or local(p).numel()):
        raise ValueError(
            f"{name} {shape} with placements {p.placements} should have a local shape of "
            f"{expected} on this rank, but has {got}; distribute it with distribute_tensor or "
            "fully_shard"
        )


def _as_dtensor(own: Tensor, mesh: DeviceMesh, lives: Placement, shape: Sequence[int]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = [
        Replicate()
        if axis.dim is None
        else Shard(axis.dim)
        if axis.split == 1
        else _StridedShard(axis.dim, split_factor=axis.split)
        for axis in lives.axes
    ]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _group_of(given: Any) -> ProcessGroup | None:
    if given is None:
        return None
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"process_group got a mesh of {given.ndim} axes {given.mesh_dim_names}: give the "
                'axis over which parameters are repeated, as mesh["dp"]'
            )
        given = given.get_group()
    if not isinstance(given, torch.distributed.ProcessGroup):
        raise TypeError(
            "process_group should be a torch.distributed.ProcessGroup or a 1-D DeviceMesh that "
            f"this rank belongs to, got {given!r:.80}; the group of all ranks is "
            "torch.distributed.group.WORLD, after init_process_group"
        )
    return given


def _with_group(layouts: Layouts, name: str, own: DeviceMesh) -> tuple[DeviceMesh, tuple[int, ...]]:
    """The mesh of a parameter with the axis of the process group, and that axis's number."""
    assert layouts.group is not None
    full = layouts._full_meshes.get(own, own)
    given: tuple[int, ...] = ()
    if full is not own:
        axis = _axis_of_group(full, layouts.group)
        return full, () if axis is None else (axis,)
    if _axis_of_group(own, layouts.group) is None:
        root = own._get_root_mesh()
        axis = _axis_of_group(root, layouts.group)
        names = root.mesh_dim_names or ()
        if axis is None or not names or not set(own.mesh_dim_names or ()) <= set(names):
            raise ValueError(
                f"{name} is on {own}, of which process_group (ranks "
                f"{_listed(torch.distributed.get_process_group_ranks(layouts.group))}) is no axis, "
                "nor of the mesh that it was cut from: make one mesh with named axes, "
                'init_device_mesh(..., mesh_dim_names=("dp", "tp")), shard over mesh["tp"], and '
                'pass process_group=mesh["dp"]'
            )
        wanted = {names[axis], *(own.mesh_dim_names or ())}
        kept = tuple(axis_name for axis_name in names if axis_name in wanted)
        full = root if len(kept) == len(names) else root[kept]
        given = (kept.index(names[axis]),)
    layouts._full_meshes[own] = full
    return full, given


def _axis_of_group(mesh: DeviceMesh, group: ProcessGroup | None) -> int | None:
    """The mesh axis whose ranks, from this rank's place, are the group's."""
    assert group is not None
    ranks = torch.distributed.get_process_group_ranks(group)
    for axis in range(mesh.ndim):
        if torch.distributed.get_process_group_ranks(mesh.get_group(axis)) == ranks:
            return axis
    return None


_meshes: dict[tuple[ProcessGroup, str], DeviceMesh] = {}


def _mesh_of_group(group: ProcessGroup, device: str) -> DeviceMesh:
    """One mesh for each group: DTensors on two equal ones would not be on the same."""
    from torch.distributed.device_mesh import DeviceMesh

    if (group, device) not in _meshes:
        _meshes[group, device] = DeviceMesh.from_group(group, device)
    return _meshes[group, device]


_groups: dict[tuple[Any, ...], ProcessGroup] = {}


def _group_of_mesh(mesh: DeviceMesh) -> ProcessGroup | None:
    """The group of all the mesh's ranks if there is one already."""
    return mesh.get_group() if mesh.ndim == 1 else None


def _make_domain(group: ProcessGroup | None, ranks: Sequence[int], device: str) -> Domain:
    dist = torch.distributed
    if group is None or dist.get_process_group_ranks(group) != sorted(ranks):
        group = _new_group(sorted(ranks))
    backend = dist.get_backend(group)
    # gloo moves tensors of other devices for some collectives only.
    device = "cpu" if backend == "gloo" else "cuda" if backend == "nccl" else device
    control = group if backend != "nccl" else _new_group(sorted(ranks), "gloo")
    where = torch.device(device)
    if device != "cpu":
        where = torch.device(device, torch.accelerator.current_device_index())
    return Domain(group, group.rank(), group.size(), where, control)


def _new_group(ranks: list[int], backend: str | None = None) -> ProcessGroup:
    """A group of these ranks; all of them, and nobody else, have to call this."""
    dist = torch.distributed
    world = dist.group.WORLD
    assert world is not None
    if backend is None and dist.get_process_group_ranks(world) == ranks:
        return world
    key = (world, *ranks, backend)
    if key not in _groups:
        timeout = world._get_backend(world._device_types[0]).options._timeout
        _groups[key] = dist.new_group(
            ranks, timeout=timeout, backend=backend, use_local_synchronization=True
        )
    return _groups[key]


def _listed(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"


def is_whole(layout: Layout, shape: Sequence[int]) -> bool:
    """Whether every rank stores all of a tensor of this shape, and its state."""
    box = whole(shape)
    return all(
        placement.box(tuple(shape), position) == box
        for placement in (layout.stored, layout.lives)
        for position in placement.positions
    )
