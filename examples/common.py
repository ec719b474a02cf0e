"""What the examples share: the options, the lab's gpt task, the loop, and whole checkpoints.

A global batch is cut over the data-parallel ranks, so the losses are those of one process.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from muonkit.lab.data import Batch, generator
from muonkit.lab.models import GPT, Attention
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import BETAS, SCALE, WEIGHT_DECAY
from muonkit.lab.tasks import get_task
from muonkit.lab.train import lr_factor

TASK = get_task("gpt")
#: What ``muonkit compare`` gives its optimizers beside the learning rate, with the scale that this
#: rate is for; and the dtype of the products, so that losses are the same to the fifth decimal at
#: every number of ranks, on any CPU. Leave it out to get what the hardware multiplies fastest.
SHARED = {
    "weight_decay": WEIGHT_DECAY,
    "adamw_betas": BETAS,
    "adjust_lr_fn": SCALE,
    "ns_dtype": "float32",
}

# --- the command line and the ranks ----------------------------------------------------------


def at_least_one(text: str) -> int:
    """The type of an option that is a number of things.

    Raises:
        argparse.ArgumentTypeError: it is no whole number, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--steps",
        type=at_least_one,
        default=200,
        help="length of the run and of its schedule (200)",
    )
    add(
        "--batch",
        type=at_least_one,
        default=TASK.batch_size,
        help="windows per step, all ranks (16)",
    )
    add("--seed", type=int, default=0, help="decides weights and batches (0)")
    add("--lr", type=float, default=TASK.lr["muonw"], help="peak learning rate (the lab's)")
    add("--every", type=at_least_one, default=10, help="steps between printed losses (10)")
    add("--checkpoint", type=Path, metavar="DIR", help="keep the last two checkpoints in DIR")
    add("--save-every", type=at_least_one, default=50, help="steps between checkpoints (50)")
    add("--resume", action="store_true", help="go on from DIR's last checkpoint, if it has one")
    add("--timeout", type=float, default=60, help="seconds to wait for another rank (60)")
    return parser


@contextmanager
def ranks(timeout: float, backend: str = "gloo") -> Iterator[tuple[int, int]]:
    """(this rank, number of ranks); without ``torchrun`` (0, 1) and no process group."""
    # Of in-place operations on a model's output, there are none here; and of a checkpoint without a
    # process group, which is meant.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield dist.get_rank(), dist.get_world_size()
    # Not in a `finally`: with a rank gone, taking leave of it could wait for the timeout again.
    dist.destroy_process_group()


def mesh_2d(count: int, tp: int, timeout: float) -> DeviceMesh:
    """``count`` ranks as axes ``dp`` x ``tp``, ``tp`` the inner one."""
    if count % tp:
        raise SystemExit(f"{count} ranks cannot be cut into groups of --tp {tp}")
    grid = torch.arange(count).view(-1, tp)
    # init_device_mesh would make the same groups, but let them wait for half an hour.
    dp_group, tp_group = (
        dist.new_subgroups_by_enumeration(rows.tolist(), timedelta(seconds=timeout))[0]
        for rows in (grid.T, grid)
    )
    return DeviceMesh.from_group(
        [dp_group, tp_group], "cpu", mesh=grid, mesh_dim_names=("dp", "tp")
    )


# --- the model -------------------------------------------------------------------------------


def gpt(seed: int) -> GPT:
    """The model of ``muonkit compare gpt``, with that command's initial weights on every rank."""
    torch.manual_seed(generator("weights", seed).initial_seed())
    model = TASK.build()
    assert isinstance(model, GPT)
    return model


class SeparateAttention(nn.Module):
    """The same attention with one projection each for queries, keys and values.

    Cut by rows over two ranks, the fused projection would leave one with all queries and half of
    the keys. Cut in three first, each rank gets whole heads of all three. The mathematics stay:
    a fused projection is orthogonalized as three matrices anyway.
    """

    def __init__(self, fused: Attention) -> None:
        super().__init__()
        width = fused.qkv.in_features
        self.head_width = width // fused.heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        with torch.no_grad():
            for linear, rows in zip(
                (self.q, self.k, self.v), fused.qkv.weight.chunk(3), strict=True
            ):
                linear.weight.copy_(rows)
        self.out = fused.out

    def forward(self, x: Tensor) -> Tensor:
        # -1 heads: under tensor parallelism a rank computes its own heads only.
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged


def separate(model: GPT) -> GPT:
    """``model`` with ``SeparateAttention``, in place."""
    for block in model.blocks:
        block.attention = SeparateAttention(block.attention)
    return model


def tensor_parallel(model: GPT, mesh: DeviceMesh) -> GPT:
    """Cut every matrix of a ``separate`` model over a 1-D mesh, in place.

    Between the matrices activations are cut along time (dim 1), so that the norms' work is divided
    too; their gains, like everything else, are DTensors on the mesh.
    """
    blocks = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate()
        ),  # gathered once for all three
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        # Its input is (time,), without a batch: time is dim 0.
        "positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        **{f"blocks.*.{name}": style for name, style in blocks.items()},
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


# --- checkpoints -----------------------------------------------------------------------------


class Progress:
    """All that a checkpoint holds: model, optimizer, steps done, and the random state.

    Nothing but the initial weights is drawn, the same on every rank, so one random state serves
    for all ranks. A model with dropout needs one for each.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step": torch.tensor(self.step),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = int(state["step"])
        torch.set_rng_state(state["random"])


class Checkpoints:
    """Folders ``step-NNNNNN`` below ``path``; one with that name is whole.

    Every rank writes its part of a checkpoint into ``step-NNNNNN.part``; when all have, rank 0
    renames it. Before a checkpoint is deleted, it loses its name too.

    Beside the parts lie their SHA-256 (``sha256sum -c SHA256SUMS``), since loading checks none: a
    checkpoint in which a bit is another one is refused.
    """

    KEEP = 2
    SUMS = "SHA256SUMS"

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank

    def latest(self) -> Path | None:
        """The last whole checkpoint: rank 0 looks, so that all ranks take the same."""
        whole = self._whole() if self.rank == 0 else []
        found: Path | None = self._from_first(whole[-1] if whole else None)
        return found

    @staticmethod
    def _from_first(value: Any) -> Any:
        """What rank 0 has, on every rank."""
        found = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def save(self, progress: Progress) -> None:
        name = f"step-{progress.step:06}"
        part = self.path / f"{name}.part"
        if self.rank == 0:
            self._delete(*self.path.glob("*.part"))
            part.mkdir(parents=True, exist_ok=True)  # another rank may be here first
        # Returns on rank 0 when every rank has written its part to the disk.
        dcp.save(progress.state_dict(), checkpoint_id=part, no_dist=not dist.is_initialized())
        if self.rank == 0:
            (part / self.SUMS).write_text(self._sums(part))
            part.replace(self.path / name)
            for old in self._whole()[: -self.KEEP]:
                self._delete(old.replace(old.with_suffix(".part")))
        # A rank that goes on, or ends without an error, may rely on the checkpoint's name.
        if dist.is_initialized():
            dist.barrier()

    def load(self, progress: Progress, folder: Path) -> None:
        """Into tensors as they lie now: under whatever layout and number of ranks.

        Raises:
            SystemExit: on every rank, where a file is not the one that was saved.
        """
        if damage := self._from_first(self._damage(folder) if self.rank == 0 else None):
            raise SystemExit(f"{damage}: delete {folder}, to go on from the one before it")
        state = progress.state_dict()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        progress.load_state_dict(state)

    def _sums(self, folder: Path) -> str:
        lines = []
        for path in sorted(p for p in folder.iterdir() if p.name != self.SUMS):
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
        return "".join(lines)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with the files of a checkpoint; None if they are those that were saved."""
        sums = folder / self.SUMS
        if not sums.exists():
            return f"{sums} is missing"
        kept, found = (
            text.splitlines() for text in (sums.read_text("utf-8", "replace"), self._sums(folder))
        )
        wrong = sorted({line.partition("  ")[2] for line in {*kept} ^ {*found}})
        return f"{folder} is damaged ({', '.join(wrong)})" if wrong else None

    def _whole(self) -> list[Path]:
        found = [p for p in self.path.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    @staticmethod
    def _delete(*folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder)


def open_checkpoints(
    options: argparse.Namespace, progress: Progress, rank: int
) -> Checkpoints | None:
    """What ``--checkpoint`` asks for; ``progress`` is that of its last one, if there is one.

    Raises:
        SystemExit: there is one, and ``--resume`` was not given.
    """
    if not options.checkpoint:
        return None
    checkpoints = Checkpoints(options.checkpoint, rank)
    if latest := checkpoints.latest():
        if not options.resume:
            raise SystemExit(f"{latest} exists: add --resume, or choose another --checkpoint")
        checkpoints.load(progress, latest)
        if rank == 0:
            print(f"going on from {latest}", flush=True)
    return checkpoints


# --- training --------------------------------------------------------------------------------


def part_of(batch: Batch, index: int, count: int) -> Batch:
    """Part ``index`` of ``count`` equal ones: then the mean of their means is the whole's."""
    x, y = batch
    if len(x) % count:
        raise SystemExit(f"--batch {len(x)} cannot be cut over {count} data-parallel ranks evenly")
    return x.chunk(count)[index], y.chunk(count)[index]


def mean_over_ranks(value: Tensor) -> float:
    """The mean over all ranks; those of one tensor-parallel group hold the same value."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def train(
    options: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    part: int = 0,
    parts: int = 1,
    after_backward: Any = None,
) -> None:
    """Train to the end, with the schedule and the batches of ``muonkit compare gpt``.

    Args:
        options: what ``parser`` read.
        model: wrapped or cut as its layout wants it.
        optimizer: over the parameters of ``model``.
        part: which part of every batch is this rank's: its data-parallel rank.
        parts: how many data-parallel ranks there are.
        after_backward: called between backward and the step, if given.
    """
    data = TASK.load()
    rank = dist.get_rank() if dist.is_initialized() else 0
    peaks = [group["lr"] for group in optimizer.param_groups]
    progress = Progress(model, optimizer)
    checkpoints = open_checkpoints(options, progress, rank)
    while progress.step < options.steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(progress.step, options.steps)
        batch = data.batch(options.seed, progress.step, options.batch)
        loss, _ = loss_of(model, *part_of(batch, part, parts))
        loss.backward()
        if after_backward:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        last = progress.step == options.steps
        if last or progress.step % options.every == 0:
            mean = mean_over_ranks(loss)
            if rank == 0:
                print(f"step {progress.step:5}  loss {mean:.6f}", flush=True)
        if checkpoints and (last or progress.step % options.save_every == 0):
            checkpoints.save(progress)
