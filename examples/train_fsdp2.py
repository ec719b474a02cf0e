"""FSDP2: parameters, gradients and optimizer state are cut by rows over the ranks.

Run it from the checkout, on CPUs::

    torchrun --nproc-per-node 2 examples/train_fsdp2.py
    python examples/train_fsdp2.py                      # one process: the same losses
"""

from __future__ import annotations

import common
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonkit import MuonW


def main() -> None:
    options = common.parser(__doc__).parse_args()
    with common.ranks(options.timeout) as (rank, count):
        model = common.gpt(options.seed)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = MuonW(model, lr=options.lr, **common.SHARED)
        common.train(options, model, optimizer, part=rank, parts=count)


if __name__ == "__main__":
    main()
