"""Run a function on so many fresh ranks of gloo, one process and one thread each."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["muonkit", "torch.distributed.tensor", "torch.profiler"]


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returned on the first rank, as JSON holds it.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the others have been ended.
    """
    # Forked from a process that has imported torch once, not each importing it.
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank_main, (ranks, folder, function, arguments), ranks, start_method="forkserver"
        )
        return json.loads(Path(folder, "result.json").read_text())


def _rank_main(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may not resolve
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=300),
    )
    result = function(*arguments)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
