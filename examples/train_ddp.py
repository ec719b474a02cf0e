"""DDP, with the optimizer's work and state divided over the ranks (ZeRO-1).

Run it from the checkout, on CPUs::

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --reduce-scatter
    python examples/train_ddp.py                        # one process: the same losses
"""

from __future__ import annotations

import common
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from muonkit import MuonW, ddp_reduce_scatter_hook


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--reduce-scatter", action="store_true", help="send gradients only where they are needed"
    )
    parser.add_argument(
        "--same-order",
        action="store_true",
        help="sum gradients in one order in every step: then a resumed run is equal bit for bit",
    )
    options = parser.parse_args()
    with common.ranks(options.timeout) as (rank, count):
        model = common.gpt(options.seed)
        group = dist.group.WORLD if dist.is_initialized() else None
        optimizer = MuonW(model, lr=options.lr, **common.SHARED, process_group=group, zero=1)
        wrapped = model
        if dist.is_initialized():
            # After the first step, of a resumed run too, DDP makes its buckets anew, in the order
            # in which gradients arrived. Among three ranks or more, sums in other buckets are
            # rounded otherwise. Looking for unused parameters, it leaves its buckets alone.
            wrapped = DistributedDataParallel(model, find_unused_parameters=options.same_order)
            if options.reduce_scatter:
                wrapped.register_comm_hook(optimizer, ddp_reduce_scatter_hook)
        common.train(options, wrapped, optimizer, part=rank, parts=count)


if __name__ == "__main__":
    main()
