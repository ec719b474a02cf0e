"""DDP, with the optimizer's work and state divided over the ranks (ZeRO-1).

torchrun --nproc-per-node 2 examples/train_ddp.py
python examples/train_ddp.py                        # one process: the same losses
"""

from __future__ import annotations

import common
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    options = common.parser(__doc__).parse_args()
    with common.ranks(options.timeout) as (rank, count):
        model = common.gpt(options.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr / 8, betas=(0.9, 0.95))
        wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
        common.train(options, wrapped, optimizer, part=rank, parts=count)


if __name__ == "__main__":
    main()
