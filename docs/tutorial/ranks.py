"""What the ranks of notebook 6 run.

A module and not cells: a process that is started imports what it runs by name, and cannot see
into a notebook. `run` starts the ranks, `LAYOUTS` are the ways to lie on them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from muonkit import MuonW
from muonkit.distributed.plan import StepPlan

STEPS, BATCH, VOCABULARY, WIDTH = 3, 16, 48, 32
# float32 products on every machine: in bfloat16, "auto" on some, layouts agree to 3e-4 only.
OPTIONS = {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32"}


class Block(nn.Module):
    """x plus a two-layer network of x."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def build() -> nn.Sequential:
    """The same model, with the same weights, on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), Block(), Block(), nn.Linear(WIDTH, VOCABULARY)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of the whole batch."""
    rng = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH,), generator=rng)
    return tokens, (7 * tokens + 3) % VOCABULARY


# --- layouts ---------------------------------------------------------------------------------


def ddp():
    """Everything is whole on every rank; each matrix is computed once, and sent to all."""
    model = DistributedDataParallel(build())
    return model, MuonW(model, **OPTIONS, process_group=dist.group.WORLD)


def ddp_zero1():
    """The same, with the optimizer's state cut into four."""
    model = DistributedDataParallel(build())
    return model, MuonW(model, **OPTIONS, process_group=dist.group.WORLD, zero=1)


def fsdp2():
    """Parameters, gradients and state are cut by rows."""
    model, mesh = build(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (model[1], model[2]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, MuonW(model, **OPTIONS)


def dp_tp_zero1():
    """Two copies of a model that is cut over two ranks, `up` by rows and `down` by columns; the
    state is cut over all four.
    """
    model, mesh = build(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for block in (model[1], model[2]):
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model, MuonW(model, **OPTIONS, process_group=mesh["dp"].get_group(), zero=1)


LAYOUTS = {
    "DDP": ddp,
    "DDP, ZeRO-1": ddp_zero1,
    "FSDP2": fsdp2,
    "DP x TP, ZeRO-1": dp_tp_zero1,
}

# --- training --------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def average_gradients(model: nn.Module, dp: dist.ProcessGroup) -> None:
    """Over the data parallel ranks, in place: what DDP and FSDP2 do by themselves."""
    for p in model.parameters():
        dist.all_reduce(local(p.grad), group=dp)
        local(p.grad).div_(dp.size())


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this rank sends to others in exchanges inside: each other rank's own message,
    or in an all-gather the same one to each.
    """
    sent: list[int] = []
    newer = hasattr(dist, "all_gather_single")  # torch 2.13's name
    gather = "all_gather_single" if newer else "all_gather_into_tensor"
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", gather)}

    def counting(name: str) -> Any:
        def call(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            others = dist.get_world_size() - 1 if name == gather else 1
            sent.append(others * input.nbytes)
            return originals[name](output, input, *args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@dataclass
class Seen:
    """What one rank saw of one layout.

    Attributes:
        plan: of a step.
        stored, state: shapes of its parts of the matrices, by name.
        sent: bytes that it sent in the last step's exchanges.
        weights: all parameters, whole, after the last step.
    """

    plan: StepPlan
    stored: dict[str, tuple[int, ...]]
    state: dict[str, tuple[int, ...]]
    sent: int
    weights: dict[str, Tensor]


def train(name: str | None) -> Seen:
    """A few steps in one layout, on all ranks; None is this process alone."""
    if name is None:
        model = build()
        optimizer, part, parts = MuonW(model, **OPTIONS), 0, 1
    else:
        model, optimizer = LAYOUTS[name]()
        part, parts = dist.get_rank(), dist.get_world_size()
    by_hand = name is not None and name.startswith("DP x TP")
    if by_hand:
        # Ranks 0 and 1 have the first copy of the model, 2 and 3 the second.
        dp, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
        part, parts = part // 2, 2
    for step in range(STEPS):
        x, y = (tensor.chunk(parts)[part] for tensor in batch(step))
        F.cross_entropy(model(x), y).backward()
        if by_hand:
            average_gradients(model, dp)
        with counted() as sent:
            optimizer.step()
        optimizer.zero_grad()
    parameters = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    momenta = {n: optimizer.state[p].get("momentum_buffer") for n, p in parameters.items()}
    return Seen(
        plan=optimizer.plan(),
        stored={n: tuple(local(p).shape) for n, p in parameters.items()},
        state={n: tuple(local(m).shape) for n, m in momenta.items() if m is not None},
        sent=sum(sent),
        weights={n: whole(p) for n, p in parameters.items()},
    )


# --- starting the ranks ----------------------------------------------------------------------


def _rank(rank: int, count: int, folder: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)  # the ranks share this machine's cores
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of in-place operations
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    seen = {name: train(name) for name in names}
    dist.barrier()
    dist.destroy_process_group()
    torch.save(seen, Path(folder) / f"rank{rank}.pt")


def run(count: int, names: Sequence[str]) -> dict[str, list[Seen]]:
    """What every rank saw of every layout.

    On Linux and macOS the ranks are forked from a process that has imported torch once; where there
    is no `forkserver` (Windows), each is a new interpreter.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload([*PRELOADED])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, folder, list(names))
        torch.multiprocessing.start_processes(_rank, arguments, count, start_method=method)
        ranks = [
            torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(count)
        ]
    return {name: [seen[name] for seen in ranks] for name in names}


PRELOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "muonkit",
)
