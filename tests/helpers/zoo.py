"""A model with every kind of parameter, its layouts, and gradients that a seed decides.

Optimizers are compared on the same *full* gradients, of which each rank gets its part without
communication: what forward and backward round differently in every layout stays out of it.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

DIM, HIDDEN, EXPERTS, VOCAB, LENGTH = 12, 18, 4, 20, 5


class Experts(nn.Module):
    """Four small feed-forward networks, stacked as E x out x in, and mixed by given weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, 16, DIM))
        self.down = nn.Parameter(torch.empty(EXPERTS, DIM, 8))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,emd->btem", x, self.gate_up).chunk(2, -1)
        y = torch.einsum("btem,edm->bted", nn.functional.silu(gate) * up, self.down)
        return torch.einsum("bte,bted->btd", weights, y)


class Block(nn.Module):
    """Attention with a fused QKV projection, a convolution over time, 18 hidden rows, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM, bias=False)
        self.conv = nn.Conv2d(DIM, DIM, (3, 1), padding=(1, 0))
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj((q @ k.mT / DIM**0.5).softmax(-1) @ v)
        x = x + self.conv(x.mT.unsqueeze(-1)).squeeze(-1).mT
        h = self.norm2(x)
        mixed = self.experts(h, self.router(h).softmax(-1))
        return x + self.down(nn.functional.gelu(self.up(h))) + mixed


class Zoo(nn.Module):
    """Tokens `(B, T)` -> a loss: a tied head's cross-entropy and the square of a one-row score."""

    def __init__(self, seed: int = 0, blocks: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(DIM)
        self.score = nn.Linear(DIM, 1)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        if self.embed.weight.device.type != "meta":
            self.fill(seed)

    @torch.no_grad()
    def fill(self, seed: int = 0) -> None:
        """Draw all parameters, each by its name and the seed; of DTensors the rank's own part."""
        for name, p in self.named_parameters():
            noise = full_random(name, p.shape, seed) / p.shape[-1] ** 0.5
            part_of(p).copy_(local_part(noise if p.ndim > 1 else 1 + 0.1 * noise, p))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits = self.head(x[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        return loss + self.score(x).square().mean()


def tokens(batch: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, LENGTH), generator=generator)


VIEWS = {
    "qkv.weight": "split(rows=3)",
    "proj.weight": "matrix",
    "conv.weight": "flatten",
    "up.weight": "matrix",
    "down.weight": "matrix",
    "score.weight": "matrix",
    "router.weight": "matrix",
    "experts.gate_up": "experts > split(rows=2)",
    "experts.down": "experts",
}


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Every matrix to Muon, the one-row score too; tied embedding, gains and biases to AdamW.

    Among the matrices are 18 rows, which no even number of ranks but 2 shares evenly.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        view = next((v for end, v in VIEWS.items() if name.endswith(end)), None)
        kind = {"algorithm": "muon", "view": view} if view else {"algorithm": "adamw", "lr": 0.01}
        groups.setdefault(view or "adamw", {"params": [], **kind})["params"].append((name, p))
    return list(groups.values())


# --- parts of tensors, by definition and without communication ---------------------------------


def full_random(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Standard normal, decided by name and seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.randn(shape, generator=generator)


def part_of(tensor: Tensor) -> Tensor:
    """The memory of this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, laid out as `like`: shares memory with `full`."""
    if not isinstance(like, DTensor):
        return full
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    return cut(full, tuple(like.device_mesh.shape), tuple(coordinate), like.placements)


def cut(
    full: Tensor,
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> Tensor:
    """The part at a coordinate of a mesh.

    A dim is cut by one mesh axis after the other as `torch.chunk` cuts (ranks beyond the chunks
    have nothing), from left to right, except that `_StridedShard(split_factor=s)` is cut after the
    axes to its right have cut the same dim s-fold: FSDP2 shards what TP left. That is its meaning,
    written here apart from torch's arithmetic on strides. Where no other axis cuts the dim, it is a
    packed one: s tensors one after the other, of each of which every rank has its part.
    """
    order: list[int] = []
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, _StridedShard) and _shares_its_dim(axis, placements):
            factor, after = 1, 0
            while factor < placement.split_factor:
                right = order[after]
                if placements[right].dim == placement.dim:
                    factor *= mesh_shape[right]
                after += 1
            assert factor == placement.split_factor
            order.insert(after, axis)
        elif placement.is_shard() or isinstance(placement, _StridedShard):
            order.insert(0, axis)
        else:
            assert placement.is_replicate(), placement
    for axis in order:
        dim = placements[axis].dim
        if isinstance(placements[axis], _StridedShard) and not _shares_its_dim(axis, placements):
            packed = full.chunk(placements[axis].split_factor, dim)
            full = torch.cat(
                [t.chunk(mesh_shape[axis], dim)[coordinate[axis]] for t in packed], dim
            )
            continue
        chunks = full.chunk(mesh_shape[axis], dim)
        mine = coordinate[axis]
        full = chunks[mine] if mine < len(chunks) else full.narrow(dim, full.shape[dim], 0)
    return full


def _shares_its_dim(axis: int, placements: tuple[Placement, ...]) -> bool:
    dims = [getattr(placement, "dim", None) for placement in placements]
    return dims.count(dims[axis]) > 1


def set_gradients(model: nn.Module, step: int, skip: tuple[str, ...] = ()) -> None:
    """Each parameter's gradient, in its own layout: the rank's part of one full gradient."""
    for name, p in model.named_parameters():
        if name in skip:
            p.grad = None
            continue
        full = full_random(f"gradient of {name}", p.shape, step).to(p.dtype)
        p.grad = laid_out(full, p)


def laid_out(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, the same on all ranks, in the layout of `like`."""
    part = local_part(full, like).clone(memory_format=torch.contiguous_format)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=full.contiguous().stride(),
    )


def assemble(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors from the parts of all ranks of the world (every rank has to call it).

    Raises:
        AssertionError: two ranks hold the same element with different bits, or none holds it.
    """
    mine = {name: _part_and_place(name, tensor) for name, tensor in tensors.items()}
    ranks: list[Any] = [mine]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    return {
        name: _join(name, tensor, [parts[name] for parts in ranks])
        for name, tensor in tensors.items()
    }


def _part_and_place(name: str, tensor: Tensor) -> tuple[bytes, Any]:
    """Elements and their indices: as bytes and numpy's array, since tensors are slow to pickle."""
    place = local_part(torch.arange(tensor.numel()).view(tensor.shape), tensor)
    part = part_of(tensor.detach()).cpu()
    assert part.shape == place.shape, f"{name}: got {part.shape}, expected {place.shape}"
    return part.reshape(-1).view(torch.uint8).numpy().tobytes(), place.reshape(-1).numpy()


def _join(name: str, like: Tensor, parts: list[tuple[bytes, Any]]) -> Tensor:
    full = torch.zeros(like.numel(), dtype=like.dtype)
    known = torch.zeros(like.numel(), dtype=torch.bool)
    for rank, (elements, indices) in enumerate(parts):
        if not elements:
            continue
        part = torch.frombuffer(bytearray(elements), dtype=like.dtype)
        place = torch.from_numpy(indices)
        same = (full[place] == part) | (full[place].isnan() & part.isnan())
        assert bool((same | ~known[place]).all()), f"{name}: rank {rank} differs from one before it"
        full[place], known[place] = part, True
    assert bool(known.all()), f"{name}: elements that no rank holds"
    return full.view(like.shape)


def assemble_parameters(model: nn.Module) -> dict[str, Tensor]:
    return assemble(dict(model.named_parameters()))


def deviation(got: Tensor, expected: Tensor) -> float:
    """The largest deviation over the largest magnitude."""
    return float((got - expected).abs().max() / expected.abs().max())


# --- layouts ------------------------------------------------------------------------------------


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh on the CPU ranks; cached, since each makes groups of its own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@dataclass(frozen=True)
class Layout:
    """How to lay out a `Zoo`: changes it in place, returns the optimizer's arguments for it."""

    apply: Callable[[nn.Module], dict[str, Any]]
    trains: bool = True  # whether forward and backward of the laid out model compute the loss


def build(name: str, seed: int = 0, blocks: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a layout of `LAYOUTS` over all ranks, and what the optimizer is told of it."""
    model = Zoo(seed, blocks)
    return model, LAYOUTS[name].apply(model)


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """(module, attribute, full name, parameter) for each parameter, tied ones once per place."""
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            yield module, attribute, f"{prefix}.{attribute}".lstrip("."), p


def distribute(
    model: nn.Module, on: DeviceMesh, placements: Callable[[str, nn.Parameter], list[Placement]]
) -> None:
    """Make parameters DTensors (where `placements` gives a list that is not empty); ties stay."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, attribute, name, p in list(owners(model)):
        if p not in made:
            where = placements(name, p)
            if not where:
                continue
            local = distribute_tensor(p.detach(), on, where, src_data_rank=None)
            made[p] = nn.Parameter(local)
        setattr(module, attribute, made[p])


def _single(model: nn.Module) -> dict[str, Any]:
    return {}


def _ddp(model: nn.Module) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD}


def _zero1(model: nn.Module) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD, "zero": 1}


def fsdp(model: nn.Module, on: DeviceMesh, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=on, **options)
    fully_shard(model, mesh=on, **options)


def _fsdp2(model: nn.Module) -> dict[str, Any]:
    fsdp(model, mesh((dist.get_world_size(),), ("dp",)))
    return {}


def _hsdp(model: nn.Module) -> dict[str, Any]:
    fsdp(model, mesh((2, dist.get_world_size() // 2), ("replicate", "shard")))
    return {}


def _colwise_or_rowwise(name: str, p: nn.Parameter) -> list[Placement]:
    """Megatron's choice; what it does not shard is replicated."""
    if name.endswith(("qkv.weight", "qkv.bias", "up.weight", "up.bias", "embed.weight")):
        return [Shard(0)]
    if name.endswith(("proj.weight", "down.weight")):
        return [Shard(1)]
    return [Replicate()]


def _any_dim(name: str, p: nn.Parameter) -> list[Placement]:
    """Some dim of every parameter, another one for each: rows, columns, kernels, experts."""
    return [Shard(zlib.crc32(name.encode()) % p.ndim)]


def _tp(model: nn.Module) -> dict[str, Any]:
    distribute(model, mesh((dist.get_world_size(),), ("tp",)), _colwise_or_rowwise)
    return {}


def _tp_any_dim(model: nn.Module) -> dict[str, Any]:
    distribute(model, mesh((dist.get_world_size(),), ("tp",)), _any_dim)
    return {}


def _packed(name: str, p: nn.Parameter) -> list[Placement]:
    """As transformers shards fused projections: every rank has its rows of q, of k and of v. Of a
    matrix that is one it has several parts then, as of what AdamW trains.
    """
    if name.endswith("qkv.weight"):
        return [_StridedShard(0, split_factor=3)]
    if name.endswith("experts.gate_up"):
        return [_StridedShard(1, split_factor=2)]
    if name.endswith("experts.down"):
        return [_StridedShard(2, split_factor=2)]
    if name.endswith(("proj.weight", "embed.weight")):
        return [_StridedShard(p.ndim - 1, split_factor=3)]
    return _any_dim(name, p)


def _tp_packed(model: nn.Module) -> dict[str, Any]:
    distribute(model, mesh((dist.get_world_size(),), ("tp",)), _packed)
    return {}


def _dp_tp_packed_zero1(model: nn.Module) -> dict[str, Any]:
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    distribute(model, both["tp"], _packed)
    return {"process_group": both["dp"].get_group(), "zero": 1}


def tensor_parallel(model: nn.Module, on: DeviceMesh) -> None:
    """`parallelize_module` such that the model computes the same function."""
    for block in model.blocks:
        plan = {
            "qkv": ColwiseParallel(output_layouts=Replicate()),
            "proj": RowwiseParallel(input_layouts=Replicate()),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
        }
        parallelize_module(block, on, plan)


def _fsdp2_tp(model: nn.Module) -> dict[str, Any]:
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    tensor_parallel(model, both["tp"])
    fsdp(model, both["dp"])
    return {}


def _hsdp_tp(model: nn.Module) -> dict[str, Any]:
    all_three = mesh((2, dist.get_world_size() // 4, 2), ("replicate", "shard", "tp"))
    tensor_parallel(model, all_three["tp"])
    fsdp(model, all_three["replicate", "shard"])
    return {}


def _dp_tp_zero1(model: nn.Module) -> dict[str, Any]:
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    distribute(model, both["tp"], _any_dim)
    return {"process_group": both["dp"].get_group(), "zero": 1}


def _dp_tp_zero1_one_mesh(model: nn.Module) -> dict[str, Any]:
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    distribute(model, both, lambda name, p: [Replicate(), *_any_dim(name, p)])
    return {"zero": 1}


def _stacked(name: str, p: nn.Parameter) -> list[Placement]:
    return [Shard(0)] if p.ndim == 3 else []


def _ep_ddp(model: nn.Module) -> dict[str, Any]:
    distribute(model, mesh((dist.get_world_size(),), ("ep",)), _stacked)
    return {"process_group": dist.group.WORLD}


def _ep_fsdp2(model: nn.Module) -> dict[str, Any]:
    distribute(model, mesh((dist.get_world_size(),), ("ep",)), _stacked)
    stacked = {p for p in model.parameters() if p.ndim == 3}
    fsdp(model, mesh((dist.get_world_size(),), ("dp",)), ignored_params=stacked)
    return {}


def _ep_fsdp2_of_experts(model: nn.Module) -> dict[str, Any]:
    """Experts on the axis ep, each expert's rows on the axis dp; the rest on both."""
    size = dist.get_world_size()
    both = mesh((size // 2, 2), ("dp", "ep"))
    distribute(model, both["ep"], _stacked)
    for block in model.blocks:
        fully_shard(block.experts, mesh=both["dp"], shard_placement_fn=lambda p: Shard(1))
    fsdp(model, mesh((size,), ("dp",)))
    return {}


@functools.cache
def _flat(on: DeviceMesh) -> DeviceMesh:
    return on._flatten("all")


def _ep_submesh(model: nn.Module) -> dict[str, Any]:
    """Experts on the axis ep of a mesh, the rest on all of its ranks as one axis."""
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "ep"))
    distribute(model, both["ep"], _stacked)
    stacked = {p for p in model.parameters() if p.ndim == 3}
    fsdp(model, _flat(both), ignored_params=stacked)
    return {}


@functools.cache
def _pair() -> DeviceMesh:
    """Two ranks, on a mesh that was cut from no other."""
    first = dist.get_rank() // 2 * 2
    group = dist.new_group([first, first + 1], use_local_synchronization=True)
    return DeviceMesh.from_group(group, "cpu")


def ep_apart(model: nn.Module) -> dict[str, Any]:
    """Experts on a mesh of their own, of which the others' knows nothing."""
    distribute(model, _pair(), _stacked)
    stacked = {p for p in model.parameters() if p.ndim == 3}
    fsdp(model, mesh((dist.get_world_size(),), ("dp",)), ignored_params=stacked)
    return {}


LAYOUTS: dict[str, Layout] = {
    "single": Layout(_single),
    "ddp": Layout(_ddp),
    "zero1": Layout(_zero1),
    "fsdp2": Layout(_fsdp2),
    "hsdp": Layout(_hsdp),
    "tp": Layout(_tp, trains=False),
    "tp_any_dim": Layout(_tp_any_dim, trains=False),
    "tp_packed": Layout(_tp_packed, trains=False),
    "fsdp2_tp": Layout(_fsdp2_tp),
    "hsdp_tp": Layout(_hsdp_tp),
    "dp_tp_zero1": Layout(_dp_tp_zero1, trains=False),
    "dp_tp_packed_zero1": Layout(_dp_tp_packed_zero1, trains=False),
    "dp_tp_zero1_one_mesh": Layout(_dp_tp_zero1_one_mesh, trains=False),
    "ep_ddp": Layout(_ep_ddp, trains=False),
    "ep_fsdp2": Layout(_ep_fsdp2, trains=False),
    "ep_fsdp2_of_experts": Layout(_ep_fsdp2_of_experts, trains=False),
    "ep_submesh": Layout(_ep_submesh, trains=False),
}
