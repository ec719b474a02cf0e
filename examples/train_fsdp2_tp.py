"""FSDP2 x tensor parallelism: every matrix is cut over the whole mesh, in rectangles.

Run it from the checkout, on CPUs::

    torchrun --nproc-per-node 4 examples/train_fsdp2_tp.py --tp 2
    python examples/train_fsdp2_tp.py                   # one process: the same losses
"""

from __future__ import annotations

import common
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from muonkit import MuonW


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--tp", type=common.at_least_one, default=2, help="ranks that share a matrix product (2)"
    )
    options = parser.parse_args()
    with common.ranks(options.timeout) as (_, count):
        model = common.separate(common.gpt(options.seed))
        part, parts = 0, 1
        if dist.is_initialized():
            mesh = common.mesh_2d(count, options.tp, options.timeout)
            common.tensor_parallel(model, mesh["tp"])
            for block in model.blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            part, parts = mesh["dp"].get_local_rank(), mesh["dp"].size()
        optimizer = MuonW(model, lr=options.lr, **common.SHARED)
        common.train(options, model, optimizer, part=part, parts=parts)


if __name__ == "__main__":
    main()
