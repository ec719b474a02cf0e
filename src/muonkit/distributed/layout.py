"""Layouts: where each parameter and its state lie, read from DTensors and process groups.

This is where placements, plain arithmetic, meet torch.distributed.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonkit._torch import local_tensor, root_mesh, strided_shard
from muonkit.distributed.meshes import (
    ascends,
    axis_of_group,
    group_of,
    is_cut_from,
    listed,
    make_domain,
    mesh_of_group,
    other_ranks,
    ranks_of,
    whole_mesh,
)
from muonkit.distributed.param_layout import Layout, cuts_experts_only, with_state
from muonkit.distributed.placement import Axis, Placement, replicated
from muonkit.groups import parameter_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from muonkit.distributed.exchange import Domain

__all__ = [
    "Layouts",
    "dtensor_placements",
    "is_a_part",
    "is_dtensor",
    "like_dtensor",
    "local",
    "own_layout",
]


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
                f"zero should be 0 (state on every rank that has the parameter) or 1 (sharded), "
                f"but is: {zero!r}; parameters are sharded by fully_shard, gradients by "
                "muonkit.ddp_reduce_scatter_hook"
            )
        group = group_of(process_group)
        self._asked = group is not None
        self.group: ProcessGroup | None = None if group is None or group.size() == 1 else group
        self.zero: int = zero
        self.domain: Domain | None = None
        self._ranks: list[int] = []
        self.scattered = False  # whether gradients are averaged only on the ranks with the state
        # By a parameter's id, what ddp_reduce_scatter_hook knows of its gradient.
        self.averaged: dict[int, Any] = {}
        self.mesh: DeviceMesh | None = None  # the mesh of which all DTensors' meshes are part
        self._layouts: dict[Tensor, Layout] = {}
        # Where the parts of Muon's parameters are that other ranks share, and a name for each.
        self._devices: dict[torch.device, str] = {}
        self._parts: dict[Tensor, tuple[slice, ...]] = {}
        # For a parameter and what its stages keep, see `state.check_parts`.
        self.state_shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    def anew(self) -> Layouts:
        """For other parameters, with what was asked for here."""
        other = Layouts(self.group, self.zero)
        other._asked, other.scattered = self._asked, self.scattered
        other.averaged = self.averaged  # the hook goes on
        return other

    def with_more(self, groups: Sequence[Mapping[str, Any]]) -> Layouts:
        """These, and those of more parameters; nothing is changed here.

        Raises:
            ValueError: as `add`.
        """
        other = copy.copy(self)
        other._layouts = dict(self._layouts)
        other.add(groups)
        return other

    def __bool__(self) -> bool:
        """Whether a parameter has one."""
        return bool(self._layouts)

    def __getitem__(self, p: Tensor) -> Layout:
        return self._layouts[p]

    def get(self, p: Tensor) -> Layout | None:
        """The parameter's layout; None for a plain tensor that no process group repeats.

        A DTensor has one, whatever its mesh.
        """
        return self._layouts.get(p)

    def add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Find the parameters' layouts.

        Raises:
            ValueError: an unsupported placement, or a parameter on other ranks than the rest, or
                than this one.
        """
        named = [
            (name, p, group)
            for group in groups
            for name, p in zip(parameter_names(group), group["params"], strict=True)
        ]
        meshes = {p.device_mesh: name for name, p, _ in named if is_dtensor(p)}
        for mesh, name in meshes.items():
            _check_mesh(name, mesh)
        if self.mesh is None and meshes:
            self.mesh = whole_mesh(list(meshes), self.group)
        for name, p, group in named:
            if is_dtensor(p):
                self._keep(p, _of_dtensor(self, name, p, group))
        for _, p, _ in named:  # these may lie on the DTensors' mesh
            if not is_dtensor(p):
                self._keep(p, _of_plain(self, p))
        if self.domain is None and self.group is not None and self.mesh is None:
            # The others wait for this rank, whatever it has to train.
            ranks = torch.distributed.get_process_group_ranks(self.group)
            self.enter("process_group", self.group, ranks, "cpu", torch.device("cpu"))
        self._check_devices([(name, p) for name, p, g in named if g["algorithm"] == "muon"])
        if self.zero and self.domain is None and not self._asked and other_ranks():
            raise ValueError(
                "zero=1 shards the state over the ranks that have copies of a parameter, but "
                "no parameter says which: pass process_group=torch.distributed.group.WORLD (the "
                "ranks of DDP), or shard the model with fully_shard, which shards the state too"
            )

    def _check_devices(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse what other ranks share and this rank has on several devices: what arrives for
        matrices that travel together lies on one.
        """
        first = dict(self._devices)
        for name, p in named:
            layout = self.get(p)
            if layout is not None and not layout.alone:
                first.setdefault(local(p).device, name)
        if len(first) > 1:
            got = ", ".join(f"{name} on {device}" for device, name in first.items())
            raise ValueError(
                f"this rank has Muon's parameters on several devices ({got}), and other ranks "
                "share them: keep those of one optimizer on one device, or make an optimizer for "
                "each device"
            )
        self._devices = first

    def _keep(self, p: Tensor, layout: Layout | None) -> None:
        if layout is not None:
            self._layouts[p] = layout

    def enter(
        self,
        name: str,
        group: ProcessGroup | None,
        ranks: Sequence[int],
        kind: str,
        device: torch.device,
    ) -> None:
        """Make these the optimizer's ranks, or see that they are.

        Args:
            kind: of the devices of the parameter's mesh.
            device: where this rank's part of it is.
        """
        if self.domain is None:
            self.domain = make_domain(group, ranks, kind, device)
            self._ranks = sorted(ranks)
        elif sorted(ranks) != self._ranks:
            raise ValueError(
                f"{name} lies on ranks {listed(sorted(ranks))}, others of this optimizer on "
                f"{listed(self._ranks)}: all parameters of one optimizer share one set of ranks; "
                "distribute them over meshes of the same ranks, or make an optimizer for each set"
            )

    def positions(self, mesh: DeviceMesh) -> range | tuple[int, ...]:
        """The positions of the mesh's ranks, in row-major order."""
        order = {rank: position for position, rank in enumerate(self._ranks)}
        positions = tuple(order[rank] for rank in ranks_of(mesh))
        together = range(len(positions))
        return together if positions == tuple(together) else positions

    def new_state(
        self, p: Tensor, dtype: torch.dtype, shape: tuple[int, ...], placement: Placement
    ) -> Tensor:
        """Zeros of a logical shape on the parameter's ranks, lying as `placement` says."""
        layout = self._layouts[p]
        if placement == layout.param_placement and is_dtensor(p) and shape == tuple(p.shape):
            return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        own = torch.zeros(
            placement.local_shape(shape, layout.at), dtype=dtype, device=local(p).device
        )
        if layout.mesh is None:
            return own
        return _as_dtensor(own, layout.mesh, placement, shape)

    def copies(self, p: Tensor, of_state: bool = False) -> int:
        """How many of the ranks have each entry of the parameter's gradient, or of its state."""
        assert self.domain is not None
        layout = self._layouts.get(p)
        if layout is None:
            return self.domain.size
        placement = layout.state_placement if self.scattered or of_state else layout.param_placement
        copies = math.prod(placement.mesh[axis] for axis in placement.copies())
        # A parameter whose mesh is a part of the ranks is there once in each such part.
        return copies * (self.domain.size // len(placement.positions))

    def part(self, p: Tensor, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, for which this rank keeps state; a view."""
        layout = self._layouts.get(p)
        mine = local(tensor)
        if layout is None or layout.state_placement == layout.param_placement:
            return mine
        if p not in self._parts:
            self._parts[p] = layout.state_placement.slices_within(
                layout.param_placement, tuple(p.shape), layout.at
            )
        return mine[self._parts[p]]


_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: Tensor) -> bool:
    """Without an import of DTensor where nobody has made one."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_a_part(tensor: Any) -> bool:
    """Whether a rank has only a part of a tensor."""
    if not is_dtensor(tensor):
        return False
    axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(n > 1 and not placement.is_replicate() for n, placement in axes)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank has, sharing its memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    return local_tensor(tensor)


def _check_mesh(name: str, mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} lies on ranks {listed(ranks_of(mesh))}, and this is rank "
            f"{torch.distributed.get_rank()}, which has no part of it: give the optimizer of a "
            "rank the parameters of that rank's own meshes (of pipeline stages, those of its stage)"
        )
    if not ascends(mesh):
        raise ValueError(
            f"{name} lies on ranks {listed(ranks_of(mesh))} in this order, but torch's process "
            "groups have ranks in ascending order, so that its shards are not where the mesh says: "
            "make a mesh whose ranks ascend along every axis"
        )


def _of_dtensor(layouts: Layouts, name: str, p: Any, group: Mapping[str, Any]) -> Layout:
    own, full = p.device_mesh, layouts.mesh
    axes = tuple(_axis(name, placement) for placement in p.placements)
    assert full is not None
    if full.size() == 1:
        return _alone(name, p, axes)
    implied: tuple[int, ...] = ()
    if own != full and not is_cut_from(own, full):
        root = root_mesh(own)
        # The others may be on an axis made by flattening this one's among others.
        if is_cut_from(own, root) and set(ranks_of(root)) == set(ranks_of(full)):
            full = root
    if own != full and is_cut_from(own, full):
        named = dict(zip(own.mesh_dim_names, axes, strict=True))
        axes = tuple(named.get(axis, Axis(None)) for axis in full.mesh_dim_names or ())
        implied = tuple(i for i, axis in enumerate(full.mesh_dim_names or ()) if axis not in named)
    elif own != full:
        if set(ranks_of(own)) != set(ranks_of(full)) and _needs_nobody(
            axes, p, group, layouts.zero
        ):
            return _alone(name, p, axes)
        full = own
    ranks, device = ranks_of(full), local(p).device
    layouts.enter(
        name, full.get_group() if full.ndim == 1 else None, ranks, full.device_type, device
    )
    axis = axis_of_group(full, layouts.group)
    given = () if axis is None or axes[axis].dim is not None else (axis,)
    implied = tuple(i for i in implied if i not in given)
    assert layouts.domain is not None
    placement, at = _placed(full, axes, layouts.positions(full)), layouts.domain.position
    _check_parts(name, p, placement, at)
    layout = with_state(placement, tuple(p.shape), layouts.zero, given, implied)
    return layout._replace(mesh=full, at=at)


def _placed(
    mesh: DeviceMesh, axes: Sequence[Axis], positions: range | tuple[int, ...]
) -> Placement:
    sizes = tuple(mesh.shape)
    # Cut along an axis of one rank is not cut.
    cut = tuple(Axis(None) if n == 1 else axis for n, axis in zip(sizes, axes, strict=True))
    return Placement(sizes, cut, positions)


def _alone(name: str, p: Any, axes: Sequence[Axis]) -> Layout:
    """On the ranks of the parameter's own mesh, counted in its order."""
    mesh = p.device_mesh
    placement = _placed(mesh, axes, range(mesh.size()))
    at = ranks_of(mesh).index(torch.distributed.get_rank())
    _check_parts(name, p, placement, at)
    return Layout(placement, placement, mesh=mesh, at=at, alone=True)


def own_layout(name: str, p: Any) -> Layout:
    """Where a DTensor lies on the ranks of its own mesh.

    Raises:
        ValueError: an unsupported placement.
    """
    return _alone(name, p, [_axis(name, placement) for placement in p.placements])


def _needs_nobody(axes: tuple[Axis, ...], p: Tensor, group: Mapping[str, Any], zero: int) -> bool:
    """Whether a DTensor is computed where it is: then it may be on any mesh."""
    if zero and any(axis.dim is None for axis in axes):
        return False
    return group["algorithm"] == "adamw" or cuts_experts_only(axes, p.ndim, group["view"])


def _of_plain(layouts: Layouts, p: Tensor) -> Layout | None:
    group, mesh = layouts.group, layouts.mesh
    if group is None:
        return None
    ranks = torch.distributed.get_process_group_ranks(group)
    axis = None if mesh is None else axis_of_group(mesh, group)
    implied: tuple[int, ...] = ()
    if mesh is not None and axis is not None:
        sizes = tuple(mesh.shape)
        placement = Placement(sizes, (Axis(None),) * len(sizes), layouts.positions(mesh))
        implied = tuple(i for i in range(len(sizes)) if i != axis)
    else:
        layouts.enter("a plain tensor", group, ranks, p.device.type, p.device)
        placement, axis, mesh = replicated(len(ranks)), 0, None
    assert layouts.domain is not None
    at = layouts.domain.position
    layout = with_state(placement, tuple(p.shape), layouts.zero, (axis,), implied)
    mesh = (mesh or mesh_of_group(group, p.device.type)) if layouts.zero else None
    return layout._replace(mesh=mesh, at=at)


def _axis(name: str, placement: Any) -> Axis:
    if placement.is_replicate():
        return Axis(None)
    if placement.is_partial():
        raise ValueError(
            f"{name} has the placement {placement}: a parameter is sharded or replicated along "
            "every mesh axis; redistribute it before the optimizer is made"
        )
    return Axis(placement.dim, getattr(placement, "split_factor", 1))


def _check_parts(name: str, p: Any, placement: Placement, at: int) -> None:
    """Refuse what our arithmetic does not describe, before anything is planned on it."""
    shape = tuple(p.shape)
    try:
        placement.check_order(shape)
    except ValueError as error:
        raise ValueError(f"{name} {shape} with placements {p.placements}: {error}") from None
    expected, got = placement.local_shape(shape, at), tuple(local(p).shape)
    if expected != got and (0 not in expected or local(p).numel()):
        raise ValueError(
            f"{name} {shape} with placements {p.placements} should have a local shape of "
            f"{list(expected)} on this rank, but has {list(got)}; distribute it with "
            "distribute_tensor or fully_shard"
        )


def dtensor_placements(axes: Sequence[Axis]) -> list[Any]:
    """DTensor's placements for these axes: the inverse of `_axis`."""
    from torch.distributed.tensor import Replicate, Shard

    return [
        Replicate()
        if axis.dim is None
        else Shard(axis.dim)
        if axis.split == 1
        else strided_shard(axis.dim, axis.split)
        for axis in axes
    ]


def like_dtensor(own: Tensor, like: Any) -> Tensor:
    """A DTensor of which this rank has `own`, as it has its part of `like`."""
    mesh, placements, shape = like.device_mesh, like.placements, like.shape
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=shape, stride=like.stride()
    )


def _as_dtensor(
    own: Tensor, mesh: DeviceMesh, placement: Placement, shape: Sequence[int]
) -> Tensor:
    from torch.distributed.tensor import DTensor

    placements = dtensor_placements(placement.axes)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
