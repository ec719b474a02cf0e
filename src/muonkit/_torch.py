"""Every private or young name of torch that muonkit uses, with what stands in for it where a torch
that `pyproject.toml` admits has it not. Nothing else in the package touches such a name: a test
holds that.

Not here: `torch._foreach_*`, which torch's manual documents and every admitted torch has.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "CONSTANT_MARK",
    "FLAT_MARK",
    "FLAT_PARAMETER",
    "FUNCTIONAL_COLLECTIVES",
    "OUTSIDE_MARKS",
    "WRAPPERS",
    "all_gather",
    "cpu_capabilities",
    "default_store",
    "dispatch_mode",
    "has_float64",
    "held_parameters",
    "inner_optimizer",
    "is_part_of_vmap",
    "is_unsharded",
    "is_watched_by_func",
    "local_box",
    "local_tensor",
    "measurable",
    "never_begin_a_graph",
    "onednn_is_on",
    "own_modules",
    "own_parameters",
    "reduce_scatter",
    "root_mesh",
    "strided_shard",
    "timeout_of",
    "whole_tensor",
]

# The attribute that `torch.compiler.assume_constant_result` sets on a function, as
# `_compile.constant_result` does.
CONSTANT_MARK = "_dynamo_marked_constant"

# torch.compile's, FSDP1's and activation checkpointing's wrappers put these into every name below
# them, and change nothing else.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

# The attribute that FSDP1 sets on the vector into which it packs several parameters.
FLAT_MARK = "_is_flat_param"

# The name that FSDP1 gives to that vector.
FLAT_PARAMETER = "_flat_param"

# The attribute of a plain parameter that was a DTensor before DDP wrapped its module.
DTENSOR_BEFORE_DDP = "_st_info"


# The attributes that `torch.compiler.disable` sets on a function.
OUTSIDE_MARKS = {
    "_torchdynamo_disable": True,
    "_torchdynamo_disable_msg": None,
    "_torchdynamo_disable_recursive": True,
}


def never_begin_a_graph(function: Callable[..., object]) -> None:
    """torch.compile traces this function only as a part of its caller's graph; where it is called
    outside of one, it and all that it calls run as they are.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):  # a build of torch without torch.compile
        return


def has_float64(device: torch.device) -> bool:
    """Whether this device has float64: Apple's GPUs have not, nor have some of Intel's."""
    if device.type != "xpu":
        return device.type != "mps"
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def measurable(tensor: Tensor) -> Tensor:
    """The tensor where it can be measured in float64: itself, or its copy on the CPU."""
    return tensor if has_float64(tensor.device) else tensor.cpu()


# Asked here: torch 2.11 cannot compile the question.
_MACHINE = platform.machine().lower()


def _onednn_may_use(instructions: str) -> bool:
    """Whether oneDNN's own variable, in either of its names, leaves it these instructions."""
    limits = (os.environ.get(f"{name}_MAX_CPU_ISA", "").upper() for name in ("ONEDNN", "DNNL"))
    return all(limit in ("", "ALL", "DEFAULT") or instructions in limit for limit in limits)


def onednn_is_on() -> bool:
    """Whether products may be oneDNN's: `torch.backends.mkldnn.enabled`, which may change."""
    return bool(torch.backends.mkldnn.enabled)


def cpu_capabilities() -> dict[str, bool]:
    """What decides in which dtype this CPU multiplies fastest, by torch's names.

    - "amx_bf16", "avx512_bf16": of x86; AMX if oneDNN may use it, which alone has products for it.
    - "amx_held_back": AMX that oneDNN may not use.
    - "arm_bf16": BFMMLA.
    - "onednn_acl": this torch has oneDNN with the Arm Compute Library, whose products use BFMMLA
      (those of a torch without it, on macOS, do not).
    """
    arm = _MACHINE in ("aarch64", "arm64")
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 has it
    if ask is not None:
        have = ask()
        found = {name: bool(have.get(name)) for name in ("amx_bf16", "avx512_bf16")}
        found["arm_bf16"] = arm and bool(have.get("bf16"))
    else:
        cpu = torch.cpu
        # Every CPU that has AMX tiles has its bf16 products.
        found = {
            "amx_bf16": bool(cpu._is_amx_tile_supported()),
            "avx512_bf16": bool(cpu._is_avx512_bf16_supported()),
            "arm_bf16": arm and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        }
    mkldnn: Any = torch.backends.mkldnn
    free = bool(mkldnn.is_available()) and onednn_is_on() and _onednn_may_use("AMX")
    found["amx_held_back"] = found["amx_bf16"] and not free
    found["amx_bf16"] &= free
    acl = getattr(mkldnn, "is_acl_available", lambda: torch.ops.mkldnn._is_mkldnn_acl_supported())
    found["onednn_acl"] = arm and bool(mkldnn.is_available()) and bool(acl())
    return found


def is_watched_by_func(tensor: Tensor) -> bool:
    """Whether a transformation of torch.func wraps the tensor."""
    watched: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return watched


def is_part_of_vmap(tensor: Tensor) -> bool:
    """Whether the tensor is one of a batch under torch.vmap, in whatever else wraps it."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_unsharded(module: nn.Module) -> bool:
    """Whether FSDP2 has other tensors in the place of a module's shards: whole parameters, as
    between forward and backward, and for the root after every forward; or shards on fewer ranks, as
    after a forward where `reshard_after_forward` is a number.
    """
    ask = getattr(module, "_get_fsdp_state", None)
    if ask is None:
        return False
    state = ask()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; before it there is one
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return any(not group.is_sharded for group in groups)


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The module's own, without its children's; shared ones under each of their names, and None
    where a name has none.
    """
    own: Any = module._parameters
    return own if isinstance(own, dict) else dict(own.items())  # TorchScript's has no more of one


def held_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters, without the names that have none."""
    return {name: p for name, p in own_parameters(module).items() if p is not None}


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate, Fabric and Lightning, whose classes are the
    optimizer's own or extend torch's, and whose hooks nobody calls.
    """
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, torch.optim.Optimizer) and inner is not optimizer:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def own_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The module's children; shared ones under each of their names, None where a name has none."""
    own: Any = module._modules
    return own if isinstance(own, dict) else dict(own.items())


def local_tensor(tensor: Any) -> Tensor:
    """The part of a DTensor that this rank has, sharing its memory, unknown to autograd."""
    own: Tensor = tensor._local_tensor
    return own


def local_box(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of what this rank has of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return tuple(size), tuple(offset)


def strided_shard(dim: int, split_factor: int) -> Any:
    """The placement of a dim that is cut by another mesh axis after this one."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=split_factor)


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one was cut from, or itself."""
    ask = getattr(mesh, "_get_root_mesh", None)
    if ask is None:  # torch 2.9
        from torch.distributed import device_mesh

        ask = functools.partial(vars(device_mesh)["_mesh_resources"].get_root_mesh, mesh)
    root: DeviceMesh = ask()
    return root


def whole_tensor(tensor: Any) -> Tensor:
    """All of a DTensor, on every rank of its mesh: all of them call this.

    `full_tensor` puts rows in the wrong places where a dim that two mesh axes cut does not divide
    by both (10 rows over 2 x 2 ranks): torch 2.13's where the mesh was flattened, since it takes
    the flat mesh for these axes, and torch 2.9's where a placement is strided.
    """
    cuts: dict[int, list[int]] = {}  # the mesh axes' sizes, for each dim
    for ranks, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if not placement.is_replicate():
            cuts.setdefault(placement.dim, []).append(ranks)
    strided = any(hasattr(placement, "split_factor") for placement in tensor.placements)
    uneven = any(
        len(ranks) > 1 and tensor.shape[dim] % math.prod(ranks) for dim, ranks in cuts.items()
    )
    if not uneven or (strided and _VERSION >= (2, 11)):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    size, offset = local_box(tensor.shape, tensor.device_mesh, tensor.placements)
    own = local_tensor(tensor).detach()
    found = own.new_zeros(tensor.shape)
    found[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))] = own
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            # Each entry is on one rank of the axis, and zero on its others.
            torch.distributed.all_reduce(found, group=tensor.device_mesh.get_group(axis))
    return found


def timeout_of(group: ProcessGroup) -> Any:
    """How long a group waits for its ranks."""
    return group._get_backend(group._device_types[0]).options._timeout


def all_gather(output: Tensor, input: Tensor, group: ProcessGroup) -> Any:
    """Start to bring every rank's `input` to all ranks, one after the other in `output`."""
    dist: Any = torch.distributed
    # Renamed in torch 2.13, which warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, input, group=group, async_op=True)


def reduce_scatter(output: Tensor, input: Tensor, group: ProcessGroup) -> Any:
    """Start summing over the ranks, so that each rank gets its part of the sum."""
    dist: Any = torch.distributed
    # Renamed in torch 2.13, which warns of the old name.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, input, group=group, async_op=True)


def default_store() -> Any:
    """The store that the ranks of the default process group met at; None where it has none."""
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store()
    except (RuntimeError, ValueError, KeyError):
        return None


def dispatch_mode() -> Any:
    """The class whose `__torch_dispatch__` sees every operation in its `with`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


# The operations that DTensors communicate by.
FUNCTIONAL_COLLECTIVES = "_c10d_functional"
