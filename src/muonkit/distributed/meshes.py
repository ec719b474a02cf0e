"""Meshes and process groups: which ranks an optimizer's parameters lie on, and how these talk."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from muonkit._torch import root_mesh, timeout_of
from muonkit.distributed.exchange import Domain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ascends",
    "axis_of_group",
    "group_of",
    "is_cut_from",
    "listed",
    "make_domain",
    "mesh_of_group",
    "other_ranks",
    "ranks_of",
    "whole_mesh",
]


def other_ranks() -> bool:
    """Whether this process is one of several."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_of(given: Any) -> ProcessGroup | None:
    """The process group that was given, or that of a 1-D mesh.

    Raises:
        ValueError, TypeError: neither of them, or this rank does not belong to it.
    """
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


def whole_mesh(meshes: Sequence[DeviceMesh], group: ProcessGroup | None) -> DeviceMesh:
    """The mesh of which the meshes given are part, with the process group's axis.

    Raises:
        ValueError: the process group is no axis of it.
    """
    full = max(meshes, key=lambda mesh: mesh.size())
    root = root_mesh(full)
    if group is not None and axis_of_group(full, group) is None:
        axis = axis_of_group(root, group)
        if axis is None or not root.mesh_dim_names:
            ranks = torch.distributed.get_process_group_ranks(group)
            raise ValueError(
                f"parameters are on {full}, of which process_group (ranks {listed(ranks)}) is no "
                "axis, nor of the mesh that it was cut from: make one mesh with named axes, "
                'init_device_mesh(..., mesh_dim_names=("dp", "tp")), shard over mesh["tp"], and '
                'pass process_group=mesh["dp"]; or leave process_group out if the placements say '
                "all (fully_shard, TP alone)"
            )
        name = root.mesh_dim_names[axis]
        whole = _union(root, [full], {name})
        if axis_of_group(whole, group) is None:
            raise ValueError(
                f"parameters are on {full}, which was flattened, or cut from another mesh than the "
                f"process group's axis {name!r}: give the mesh that they are sharded over its own "
                "axis in init_device_mesh"
            )
        full = whole
    outside = [m for m in meshes if m != full and not is_cut_from(m, full)]
    same_root = [m for m in outside if root_mesh(m) == root and m.mesh_dim_names]
    if same_root and len(same_root) == len(outside):
        return _union(root, [full, *outside], set())
    return full


def _union(root: DeviceMesh, meshes: Sequence[DeviceMesh], more: set[str]) -> DeviceMesh:
    """The part of the root that has all axes of these meshes; the first mesh if it has not them."""
    names = root.mesh_dim_names or ()
    wanted = more.union(*(mesh.mesh_dim_names or () for mesh in meshes))
    if not wanted <= set(names):
        return meshes[0]
    kept = tuple(name for name in names if name in wanted)
    return root if len(kept) == len(names) else root[kept]


def is_cut_from(mesh: DeviceMesh, full: DeviceMesh) -> bool:
    """Whether the axes of a mesh are axes of the full one."""
    names, others = mesh.mesh_dim_names, full.mesh_dim_names
    return (
        names is not None
        and others is not None
        and set(names) <= set(others)
        and root_mesh(mesh) == root_mesh(full)
    )


def ranks_of(mesh: DeviceMesh) -> list[int]:
    """The global ranks of a mesh, in row-major order."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def ascends(mesh: DeviceMesh) -> bool:
    """Whether ranks ascend along every axis of a mesh."""
    ranks, behind = ranks_of(mesh), 1
    for size in reversed(mesh.shape):
        at_end = behind * (size - 1)
        for i, rank in enumerate(ranks):
            if i % (behind * size) < at_end and ranks[i + behind] <= rank:
                return False
        behind *= size
    return True


def axis_of_group(mesh: DeviceMesh, group: ProcessGroup | None) -> int | None:
    """The mesh axis whose ranks, from this rank's place, are the group's."""
    if group is None:
        return None
    ranks = torch.distributed.get_process_group_ranks(group)
    for axis in range(mesh.ndim):
        if torch.distributed.get_process_group_ranks(mesh.get_group(axis)) == ranks:
            return axis
    return None


_meshes: dict[tuple[ProcessGroup, str], DeviceMesh] = {}


def mesh_of_group(group: ProcessGroup, device: str) -> DeviceMesh:
    """One mesh for each group: DTensors on two equal ones would not be on the same."""
    from torch.distributed.device_mesh import DeviceMesh

    if (group, device) not in _meshes:
        _meshes[group, device] = DeviceMesh.from_group(group, device)
    return _meshes[group, device]


_groups: dict[tuple[Any, ...], ProcessGroup] = {}


def make_domain(
    group: ProcessGroup | None, ranks: Sequence[int], kind: str, device: torch.device
) -> Domain:
    """The ranks that exchange: those of the group if it has exactly these, else of a new group.

    Args:
        kind: of the devices that they exchange on, unless the group's backend says otherwise.
        device: where this rank has its parameters. It need not be the current device: DDP asks for
            `device_ids` and not for `set_device`.
    """
    dist = torch.distributed
    if group is None or dist.get_process_group_ranks(group) != sorted(ranks):
        group = _new_group(sorted(ranks))
    backend = dist.get_backend(group)
    # gloo moves tensors of other devices for some collectives only.
    kind = "cpu" if backend == "gloo" else "cuda" if backend == "nccl" else kind
    # A rank that skips a step would meet DDP's or FSDP's own collectives in the group that these
    # use, and gloo ends a process that receives what it does not expect. Backends that only
    # pretend have no others to meet.
    control = group
    if backend not in _PRETENDING and dist.is_gloo_available():
        control = _new_group(sorted(ranks), "gloo", timeout_of(group))
    if device.type != kind:  # parameters that are kept on the CPU
        device = torch.device(kind)
        if kind != "cpu":
            device = torch.device(kind, torch.accelerator.current_device_index())
    return Domain(group, group.rank(), group.size(), device, control, _ranks_per_node(control))


# torch's backends for tests: one process that stands for many, or threads.
_PRETENDING = ("fake", "threaded")


_nodes: dict[ProcessGroup, int] = {}


def _ranks_per_node(control: ProcessGroup) -> int:
    """As torchrun told the first rank; all ranks are on one node where nobody did.

    One rank's answer for all of them: on nodes of unequal size each has its own, and they would
    plan different steps. It is asked for once: what one rank alone settles anew (a layer that it
    unfroze) is for `check_ranks_agree` to tell.
    """
    if control not in _nodes:
        node = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", sys.maxsize)), device="cpu")
        torch.distributed.broadcast(node, group=control, group_src=0)
        _nodes[control] = int(node)
    return _nodes[control]


def _new_group(ranks: list[int], backend: str | None = None, timeout: Any = None) -> ProcessGroup:
    """A group of these ranks; all of them, and nobody else, have to call this."""
    dist = torch.distributed
    world = dist.group.WORLD
    assert world is not None
    if backend is None and dist.get_process_group_ranks(world) == ranks:
        return world
    timeout = timeout or timeout_of(world)
    key = (world, *ranks, backend, timeout)
    if key not in _groups:
        _groups[key] = dist.new_group(
            ranks, timeout=timeout, backend=backend, use_local_synchronization=True
        )
    return _groups[key]


def listed(ranks: Sequence[int]) -> str:
    """The first eight ranks, for messages."""
    return f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
