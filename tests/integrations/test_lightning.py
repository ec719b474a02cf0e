"""muonkit through Lightning: DDP with ZeRO-1. It calls consolidate_state_dict by itself."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonkit import MuonW
from tests.helpers import frameworks
from tests.helpers.ranks import Cases, Ranks, shared_folder

CASES = Cases(timeout=180.0, needs="lightning")


def fit(folder: Path, resume: bool = False, **options: Any) -> dict[str, Tensor]:
    """The parameters after all steps; the folder has a checkpoint of every `SAVED_AFTER` steps."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    from muonkit.integrations.lightning import MonitorCallback

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = frameworks.Model(seed=int(resume))

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> MuonW:
            assert dist.is_initialized()
            told = {**frameworks.OPTIONS, "process_group": dist.group.WORLD, "zero": 1}
            return MuonW(self.model, **{**told, **options})

    task = Task()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=frameworks.STEPS,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(
                folder,
                "{step}",
                every_n_train_steps=frameworks.SAVED_AFTER,
                save_top_k=-1,
            ),
            MonitorCallback(every=2, spectra=()),
        ],
        logger=CSVLogger(folder, "logs", version=int(resume)),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Lightning counts the batches that were seen, and does not skip them in a plain DataLoader.
    first = frameworks.SAVED_AFTER if resume else 0
    steps = [(first + step) % frameworks.STEPS for step in range(frameworks.STEPS)]
    mine = [frameworks.batch(step, rank, ranks) for step in steps]
    loader = torch.utils.data.DataLoader(mine, batch_size=None)
    path = folder / f"step={frameworks.SAVED_AFTER}.ckpt" if resume else None
    trainer.fit(task, loader, ckpt_path=path, weights_only=True)
    return frameworks.whole(task.model)


@CASES.on(2, variant=["plain", "normuon"])
def equals_one_process_and_resumes(variant: str) -> tuple[float, float]:
    """(deviation from one process after 10 steps, from the uninterrupted run after a resume)"""
    # As torchrun tells it, or Lightning would launch processes of its own.
    elastic = mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "none"})
    with frameworks.launched(), elastic, shared_folder() as folder, warnings.catch_warnings():
        # Lightning's remarks on the number of workers, and on what torch deprecates in it.
        warnings.simplefilter("ignore")
        done = fit(folder, variant=variant)
        resumed = fit(folder, resume=True, variant=variant)
        saved = torch.load(folder / f"step={frameworks.SAVED_AFTER}.ckpt", weights_only=True)
        state = saved["optimizer_states"][0]["state"]
        assert {type(value) for entry in state.values() for value in entry.values()} == {Tensor}
        if dist.get_rank() == 0:
            logged = list(csv.DictReader((folder / "logs/version_1/metrics.csv").open()))
            sampled = [row for row in logged if row["muon/matrix/up.weight/update_rms"]]
            assert [int(row["step"]) for row in sampled] == [6, 8, 10]
    return (
        frameworks.deviation(done, frameworks.alone(variant)),
        frameworks.deviation(resumed, done),
    )


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_through_lightning(world_size: int, case: str, ranks: Ranks) -> None:
    for apart, resumed in ranks.outcome(world_size, case).check():
        assert apart <= frameworks.EXACT
        assert resumed <= frameworks.SAME
