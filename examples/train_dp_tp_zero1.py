"""Data x tensor parallelism with ZeRO-1, and what each rank sends for a step.

    torchrun --nproc-per-node 4 examples/train_dp_tp_zero1.py --tp 2
    python examples/train_dp_tp_zero1.py                # one process: the same losses

Parameters are cut over the tensor-parallel ranks and copied over the data-parallel ones; the
optimizer's state is cut over both.
"""

from __future__ import annotations

import common
import torch.distributed as dist
from torch import nn

from muonkit import MuonW
from muonkit.distributed.plan import StepPlan


def average_gradients(model: nn.Module, dp: dist.ProcessGroup) -> None:
    """The mean over the data-parallel ranks, in place."""
    for parameter in model.parameters():
        # A norm's gain is whole on every rank, but its gradient is of the rank's part of the time
        # steps; placed as the parameter is, it is their sum.
        gradient = parameter.grad.redistribute(placements=parameter.placements)
        dist.all_reduce(gradient.to_local(), group=dp)
        parameter.grad = gradient / dp.size()


def print_plan(plan: StepPlan, count: int) -> None:
    """What each rank sends to each other one for a step, in KiB, and what it computes.

    Parts of a matrix go to the rank that computes it whole, and parts of the result come back: one
    exchange each way over all ranks, whatever axes the matrix is cut along.
    """
    traffic = plan.traffic()
    for rank in range(count):
        print(f"rank {rank} computes {traffic.matrices[rank]} matrices, and sends")
        for way, bytes_to in plan.messages(rank).items():
            parts = ", ".join(f"{n / 1024:.0f} KiB to {at}" for at, n in sorted(bytes_to.items()))
            print(f"    {way:9}  {parts or 'nothing'}")
    print(f"FLOPs of a rank, largest over mean: {traffic.balance:.3f}", flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--tp", type=common.at_least_one, default=2, help="ranks that share a matrix product (2)"
    )
    options = parser.parse_args()
    with common.ranks(options.timeout) as (rank, count):
        model = common.separate(common.gpt(options.seed))
        if not dist.is_initialized():
            optimizer = MuonW(model, lr=options.lr, **common.SHARED)
            common.train(options, model, optimizer)
            return
        mesh = common.mesh_2d(count, options.tp, options.timeout)
        dp = mesh["dp"].get_group()
        common.tensor_parallel(model, mesh["tp"])
        optimizer = MuonW(model, lr=options.lr, **common.SHARED, process_group=dp, zero=1)
        if rank == 0:
            print_plan(optimizer.plan(), count)
        common.train(
            options,
            model,
            optimizer,
            part=mesh["dp"].get_local_rank(),
            parts=mesh["dp"].size(),
            after_backward=lambda: average_gradients(model, dp),
        )


if __name__ == "__main__":
    main()
