"""`muonkit compare mytask.py:task`: the whole protocol on a task of one's own, and bad ones."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from muonkit import Rule
from muonkit.lab import objective, own
from muonkit.lab.cli import main
from muonkit.lab.compare import comparison
from muonkit.lab.errors import RunError, TaskError
from muonkit.lab.loaders import ENDLESS, OwnData, digest_of
from muonkit.lab.optimizers import OPTIMIZERS
from muonkit.lab.output import Console
from muonkit.lab.rules import in_script, rules_of
from muonkit.lab.store import DATA, SOURCES, Folder
from muonkit.lab.task import Task
from muonkit.lab.tasks import get_task
from muonkit.lab.train import Run, Setting, StopRequest, Trainer, train
from muonkit.views import View
from tests.helpers import lab
from tests.helpers.lab import Silent, losses
from tests.helpers.pages import read_blocks
from tests.helpers.paths import ROOT

HEAD = """
import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

x = torch.linspace(-1, 1, 48 * 8).view(48, 8).sin()
y = torch.arange(48) % 3
train = DataLoader(TensorDataset(x[:36], y[:36]), batch_size=6, shuffle=True)
val = [(x[36:], y[36:])]

def net():
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                         nn.Linear(16, 3))
"""
GOOD = HEAD + "def task():\n    return net, train, val, nn.CrossEntropyLoss()\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test in an empty folder; modules imported from there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    own._loaded.clear()
    for name in {"mine", "pack", "pack.tasks"} - before:
        sys.modules.pop(name, None)


def written(body: str, file: str = "mine.py") -> Task:
    """The task whose function has this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    Path(file).write_text(f"{HEAD}\ndef task():\n{lines}")
    return get_task(f"{file}:task")


def setting(task: Task, steps: int = 8, **changes: Any) -> Setting:
    return Setting(task, task.load(), steps, 0, source=task.source, evaluations=2, **changes)


# --- the same for every optimizer, and for every run of a seed ---


FORMS = {
    "a factory": "return net, train, val, nn.CrossEntropyLoss()",
    "a module": "return net(), train, val, F.cross_entropy",
    "a function of model and batch": (
        "return net, train, val, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
    ),
    "a function of a seed": (
        "def batches(seed):\n"
        "    rng = np.random.default_rng(seed)\n"
        "    for _ in range(5):\n"
        "        rows = torch.from_numpy(rng.permutation(36)[:6])\n"
        "        yield x[rows], y[rows]\n"
        "return net, batches, val, nn.CrossEntropyLoss()"
    ),
    "a stream, augmented by every generator": (
        "class Stream(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        for i in itertools.count():\n"
        "            noise = random.random() + np.random.rand() + torch.rand(8)\n"
        "            yield x[i % 36] + 0.1 * noise, y[i % 36]\n"
        "return net, DataLoader(Stream(), batch_size=6), val, nn.CrossEntropyLoss()"
    ),
    "a mean in buffers that no state dict has": (
        "class Centred(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = net()\n"
        "        self.register_buffer('mean', torch.zeros(8), persistent=False)\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())\n"
        "            if not hasattr(self, 'late'):\n"
        "                self.register_buffer('late', torch.zeros(()), persistent=False)\n"
        "            self.late += 1\n"
        "        return self.net(x - self.mean) * (1 + 0.1 * getattr(self, 'late', 0))\n"
        "return Centred, train, val, nn.CrossEntropyLoss()"
    ),
    "a loader with a generator of its own": (
        "g = torch.Generator()\n"
        "own = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=g)\n"
        "return net, own, DataLoader(TensorDataset(x, y), 20, shuffle=True), nn.CrossEntropyLoss()"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_optimizer_gets_the_same_and_a_run_resumes_exactly(form: str, tmp_path: Path) -> None:
    task = written(FORMS[form])
    begun = []
    for name in ("muonw", "adamw"):
        trainer = Trainer(
            Run(name, 1e-3, 1), setting(task), tmp_path / name, StopRequest(), Silent()
        )
        weights = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        batches = [trainer.setting.data.batch(1, step, 0)[0].sum().item() for step in range(8)]
        begun.append((weights.tolist(), batches))
        trainer.train()
    assert begun[0] == begun[1]
    assert len(set(begun[0][1])) > 1
    # Stopped in the second pass, with another run's batches drawn meanwhile.
    cut = Trainer(Run("adamw", 1e-3, 1), setting(task), tmp_path / "cut", StopRequest(), Silent())
    lab.advance(cut, 7)
    task.load().batch(5, 3, 0)
    train(Run("adamw", 1e-3, 1), setting(task), tmp_path / "cut", StopRequest(), Silent())
    assert losses(tmp_path / "cut") == losses(tmp_path / "adamw")


def test_a_batch_may_be_a_dataclass_with_a_sparse_tensor(tmp_path: Path) -> None:
    task = written(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Graph:\n"
        "    x: torch.Tensor\n"
        "    edges: torch.Tensor\n"
        "def graph(i, weight=1.0): return Graph(x[i:i + 6], weight * torch.eye(6).to_sparse())\n"
        "loss = lambda m, g: F.cross_entropy(g.edges @ m(g.x), torch.arange(6) % 3)\n"
        "task.graph = graph\n"
        "return net, [graph(i) for i in range(0, 30, 6)], [graph(36)], loss"
    )
    run = Run("adamw", 1e-3, 0)
    assert train(run, setting(task), tmp_path / "r", StopRequest(), Silent()).val_loss is not None
    assert task.batch_size == 6
    graph = sys.modules["mine"].task.graph
    digests = {digest_of(graph(*given)) for given in ((0,), (6,), (0, 2.0))}
    assert len(digests) == 3
    assert digest_of(graph(0)) in digests
    moved = objective.Place("meta").moved(graph(0).__class__(torch.ones(2), torch.ones(3)))
    assert moved.x.is_meta
    assert moved.edges.is_meta


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", ["jagged", "strided"])
def test_a_batch_may_be_a_nested_tensor(layout: str) -> None:
    task = written(
        "def rows(*counts):\n"
        f"    return torch.nested.nested_tensor([x[:n] for n in counts], layout=torch.{layout})\n"
        "def loss(m, rows):\n"
        "    return m(torch.cat(rows.unbind())).square().mean()\n"
        "task.rows = rows\n"
        "return net, [rows(2, 3), rows(3, 1)], [rows(3, 2)], loss"
    )
    assert task.batch_size == 2
    rows = sys.modules["mine"].task.rows
    digests = {digest_of(rows(*counts)) for counts in ((2, 3), (3, 2), (2, 3, 1))}
    assert len(digests) == 3
    assert digest_of(rows(2, 3)) in digests


def test_a_loader_with_workers_and_a_loss_that_takes_batches_apart(tmp_path: Path) -> None:
    """What a loader makes anew each time may be changed."""
    task = written(
        "def collate(rows):\n"
        "    return {'x': torch.stack([r[0] for r in rows]) + torch.rand(8), "
        "'y': torch.stack([r[1] for r in rows])}\n"
        "def loss(model, batch):\n"
        "    y = batch.pop('y')\n"
        "    return F.cross_entropy(model(batch['x'].mul_(2)), y)\n"
        "own = DataLoader(train.dataset, 6, shuffle=True, num_workers=1, collate_fn=collate)\n"
        "return net, own, DataLoader(train.dataset, 18, collate_fn=collate), loss"
    )
    run = Run("adamw", 1e-3, 0)
    for folder in ("one", "two"):
        train(run, setting(task, 7), tmp_path / folder, StopRequest(), Silent())
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_a_criterion_with_options_set_is_a_criterion() -> None:
    task = written(
        "import functools\n"
        "return net, train, val, functools.partial(F.cross_entropy, label_smoothing=0.1)"
    )
    assert task.accuracy


@pytest.mark.parametrize(
    "made", ["nn.CrossEntropyLoss(weights)", "functools.partial(F.cross_entropy, weight=weights)"]
)
def test_the_tensors_of_a_criterion_are_where_the_batch_is(made: str) -> None:
    task = written(
        f"import functools\nweights = torch.arange(1.0, 4)\nreturn net, train, val, {made}"
    )
    batch = task.load().batch(0, 0, 0)
    assert math.isfinite(task.objective.loss(task.build(), batch).item())
    moved = objective.Place("meta").moved(batch)
    assert task.objective.loss(task.build().to("meta"), moved).is_meta


def test_seeds_differ_in_weights_and_order() -> None:
    task = written(FORMS["a module"])
    data = task.load()
    assert not torch.equal(task.make(0)[0].weight, task.make(1)[0].weight)
    assert torch.equal(task.make(0)[0].weight, task.make(0)[0].weight)
    assert not torch.equal(data.batch(0, 0, 0)[0], data.batch(1, 0, 0)[0])
    first = [data.batch(0, step, 0)[1] for step in range(6)]
    second = [data.batch(0, step, 0)[1] for step in range(6, 12)]
    assert not all(map(torch.equal, first, second)), "each pass is shuffled anew"
    assert torch.cat(first).sort()[0].equal(torch.cat(second).sort()[0])


ORDERED = "DataLoader(TensorDataset(x[:36], y[:36]), batch_size=6)"
PRETRAINED = """
import copy
begun = net()
return lambda: copy.deepcopy(begun), {}, val, F.cross_entropy
"""
SEEDED = """
def make():
    torch.manual_seed(7)
    return net()
return make, {}, val, F.cross_entropy
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (PRETRAINED.format("train"), "± and p are of the batches alone"),
        (SEEDED.format("train"), "± and p are of the batches alone"),
        (SEEDED.format(ORDERED), "± and p mean nothing"),
        (FORMS["a module"], None),
        (FORMS["a factory"].replace("train", ORDERED), None),
    ],
)
def test_seeds_that_share_the_weights_are_told_of(
    body: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    written(body)
    asked = ["compare", "mine.py:task", "--steps", "1", "--optimizers", "adamw", "--out", "out"]
    assert main([*asked, "--seeds", "2"]) == 0
    found = capsys.readouterr()
    page = Path("out", "report.html").read_text()
    for text in (" ".join(found.err.split()), " ".join(found.out.split()), page):
        assert ("Every seed begins with the same weights" in text) == (said is not None)
        assert said is None or said in text


def test_one_seed_has_nothing_to_share(capsys: pytest.CaptureFixture[str]) -> None:
    written(SEEDED.format("train"))
    asked = ["compare", "mine.py:task", "--steps", "1", "--optimizers", "adamw", "--out", "out"]
    assert main(asked) == 0
    assert "same weights" not in capsys.readouterr().err


def test_a_hugging_face_model_needs_an_adapter_of_three_lines(tmp_path: Path) -> None:
    Path("mine.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "def task():\n"
        "    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2)\n"
        "    rows = [{'input_ids': (torch.arange(8) + i) % 16} for i in range(12)]\n"
        "    def collate(rows):\n"
        "        ids = torch.stack([row['input_ids'] for row in rows])\n"
        "        return {'input_ids': ids, 'labels': ids}\n"
        "    train = DataLoader(rows[:8], batch_size=4, shuffle=True, collate_fn=collate)\n"
        "    val = DataLoader(rows[8:], batch_size=4, collate_fn=collate)\n"
        "    return lambda: GPT2LMHeadModel(config), train, val, None\n"
    )
    task = get_task("mine.py:task")
    result = train(
        Run("muonw", 1e-2, 0), setting(task, 20), tmp_path / "r", StopRequest(), Silent()
    )
    assert result.val_loss is not None
    assert result.val_loss < 2.6  # of ln 16 = 2.77: what follows what is the same in every row
    assert result.accuracy is None


def test_a_batch_is_moved_with_all_that_is_in_it() -> None:
    class Pair(NamedTuple):
        x: torch.Tensor
        name: str

    place = objective.Place("meta")
    moved = place.moved({"a": [torch.ones(2), 3], "b": Pair(torch.ones(1), "c"), "d": (None,)})
    assert moved["a"][0].is_meta
    assert moved["b"].x.is_meta
    assert (moved["a"][1], moved["b"].name, moved["d"]) == (3, "c", (None,))


# --- the command ---


CRASH = """
def task():
    return Net, train, val, nn.CrossEntropyLoss()

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == 7:
            check_rows(x)
        return super().forward(x)

def check_rows(x):
    raise KeyError("row 7")
"""
MENDED = CRASH.replace('raise KeyError("row 7")', "pass")
COMMAND = ["compare", "mine.py:task", "--steps", "12", "--evaluations", "2", "--threads", "1"]


def _undisturbed(optimizer: str, seed: int) -> list[tuple[Any, ...]]:
    """The measurements of a run as the commands here have it, which nothing disturbed."""
    task = get_task("mine.py:task")
    run = Run(optimizer, task.lr[optimizer], seed)
    folder = Path(f"undisturbed-{optimizer}-{seed}")
    train(run, setting(task, 12), folder, StopRequest(), Silent())
    return losses(folder)


def test_a_crash_shows_its_own_traceback_once_and_the_run_goes_on_after_a_fix(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*COMMAND, "--optimizers", "adamw", "--out", "out"]
    Path("mine.py").write_text("1\n" + HEAD + CRASH)
    assert main(words) == 1
    Path("mine.py").write_text(HEAD + CRASH)  # with no checkpoint yet, nobody is asked
    capsys.readouterr()
    assert main([*words, "--checkpoint-every", "0"]) == 1
    said = capsys.readouterr().err
    assert said.count("Traceback") == said.count("in check_rows") == 1
    assert "muonkit/lab" not in said
    last = said.splitlines()[-1]
    assert "the loss of mine.py:task failed (KeyError: 'row 7'), at step 6 of adamw" in last
    assert "mend it, and the same command goes on" in last
    assert not Path("out/report.html").exists()
    Path("mine.py").write_text(HEAD + MENDED)
    assert main(words) == 2  # whether what is trained is the same, only the user knows
    said = capsys.readouterr().err
    assert "was edited since out was begun: --same-task goes on with its 1 runs, if" in said
    assert main([*words, "--same-task"]) == 0
    assert "goes on at step 6/12" in capsys.readouterr().err
    assert losses(Path("out")) == _undisturbed("adamw", 0)
    assert len(Folder(Path("out")).config()["sources"]) == 2  # from now on known


def test_processes_import_the_task_and_its_crash_comes_from_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*COMMAND, "--seeds", "2", "--jobs", "2"]
    Path("mine.py").write_text(HEAD + CRASH)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.count("Traceback") == said.count("in check_rows") == 1
    Path("mine.py").write_text(HEAD + MENDED)
    assert main([*words, "--same-task"]) == 0
    captured = capsys.readouterr()
    assert "1 batch to validate; 12 steps a run, on cpu" in captured.err
    said = captured.out
    assert "accuracy, %" in said
    assert "defaults that nobody has tuned for this task" in said.replace("\n", "")
    assert "nats" not in said
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("mine-")
    (run,) = folder.glob("runs/muonw-*-seed1")
    assert losses(run) == _undisturbed("muonw", 1)
    page = (folder / "report.html").read_text()
    assert "6 batches of 6 to train on, 12 examples in 1 batch to validate" in page


def test_another_model_is_another_folder_and_other_data_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.py").write_text(GOOD)
    first = comparison("mine.py:task", ["adamw"])
    again = comparison("mine.py:task", ["adamw"], device="cpu")
    assert again.default_folder() == first.default_folder()
    Path("mine.py").write_text(GOOD.replace("16", "17"))
    other = comparison("mine.py:task", ["adamw"])
    assert other.default_folder() != first.default_folder()
    assert other.config()["model"].startswith("Sequential, ")
    # As a run leaves it that was stopped.
    Path("mine.py").write_text(GOOD)
    task = get_task("mine.py:task")
    folder = Folder(first.default_folder())
    folder.create(first.config() | {DATA: task.load().fingerprint, SOURCES: [task.source]})
    run = folder.run("adamw-lr0.002-seed0")
    lab.advance(Trainer(Run("adamw", 2e-3, 0), setting(task), run, StopRequest(), Silent()), 3)
    Path("mine.py").write_text(GOOD.replace("[36:]", "[30:]"))
    assert main(["compare", "mine.py:task", "--optimizers", "adamw", "--threads", "1"]) == 2
    assert "was begun on other data" in capsys.readouterr().err
    assert main(["compare", "mine.py:task", "--batch-size", "4"]) == 2
    assert "--batch-size 4: the batches are those that" in capsys.readouterr().err


def test_a_module_is_found_from_its_folder() -> None:
    Path("pack").mkdir()
    Path("pack/__init__.py").write_text("")
    Path("pack/tasks.py").write_text(GOOD)
    first = get_task("pack.tasks:task")
    assert first.label == "tasks"
    assert get_task("pack.tasks:task") is first
    Path("pack/tasks.py").write_text(GOOD.replace("16", "17"))
    assert get_task("pack.tasks:task").model != first.model


# --- bad input ---

BAD = {
    "return 3": "mine.py:task() returned int, expected four things: model, train, validation, loss",
    "return net, train, val": "returned a tuple of 3, expected four things: model, train,",
    "return 3, train, val, None": "the model of mine.py:task is of type int, expected an nn.Module",
    "return list, train, val, None": "the model of mine.py:task made list, expected an nn.Module",
    "return nn.ReLU, train, val, None": "has no parameter to train",
    "return net, 3, val, None": "the training data of mine.py:task is of type int, expected a Data",
    "return net, x, val, None": "is of type Tensor, expected batches: write DataLoader(dataset,",
    "return net, train.dataset, val, None": "is of type TensorDataset, expected batches: write",
    "return net, iter(val), val, None": "which can be gone through only once: return the function",
    "return net, (b for b in val), val, None": "is a generator, which can be gone through only",
    "return net, [], val, None": "the training data of mine.py:task has no batches: give it more",
    "return net, DataLoader(train.dataset, 50, drop_last=True), val, None": (
        "has no batches, and drop_last=True leaves out the only one"
    ),
    "return net, lambda: [], val, None": "the training data of mine.py:task has no batches",
    "return net, lambda: 3, val, None": "() returned int, expected an iterable of batches",
    "return net, train, [], None": "the validation data of mine.py:task has no batches",
    "return net, train, lambda: [], None": "the validation data of mine.py:task has no batches",
    "return net, train, lambda: itertools.repeat(val[0]), None": (
        f"did not end after {ENDLESS:,} batches: give them an end, as itertools.islice does"
    ),
    "return net, [['a']], val, None": "gave a batch of type list without a tensor: make tensors",
    "return net, [(x[:0], y[:0])], val, F.cross_entropy": "gave a batch of 0 examples",
    "return net, train, [(x[:0], y[:0])], F.cross_entropy": "gave a batch of 0 examples",
    "return net, train, val, nn.CrossEntropyLoss": (
        "is a class, expected what it makes: write CrossEntropyLoss()"
    ),
    "return net, train, val, lambda m, b: m(b[0]).mean() * float('nan')": (
        "is nan on the first batch, before any step"
    ),
    "return lambda: nn.LazyLinear(3), train, val, F.cross_entropy": "has lazy layers without",
    "return lambda: nn.Linear(8, 3), train, val, F.cross_entropy": (
        "muonw has nothing to train here: the model has no hidden matrix"
    ),
    "return net, train, val, 3": "the loss of mine.py:task is of type int, expected a function",
    "return net, train, val, None": "is None, and a batch is a list of 2, expected a dict",
    "return net, [x], val, F.mse_loss": "is a criterion, and a batch is a Tensor, expected (inp",
    "return net, train, val, nn.CrossEntropyLoss(reduction='none')": (
        "returned a tensor of shape (6,) and torch.float32, expected a scalar: end it with .mean()"
    ),
    "return net, train, val, lambda m, b: m(b[0]).argmax()": (
        "returned a tensor in torch.int64, which has no gradient: expected a floating-point loss"
    ),
    "return net, train, [(x * float('nan'), y)], F.cross_entropy": (
        "is nan on the first validation batch, before any step"
    ),
    "return net, train, val, lambda m, b: m(b[0]).sum().item()": (
        "returned float, expected a scalar tensor: leave out float() or .item()"
    ),
    "return net, train, val, lambda m, b: m(b[0]).sum().detach()": (
        "returned a scalar without a gradient: compute it from the model"
    ),
    "return net, train, val, lambda m, b: None": (
        "returned NoneType, expected a scalar tensor: end it with 'return loss', and nothing beside"
    ),
    "return net, train, val, lambda m, b: (m(b[0]).mean(), 3)": (
        "returned tuple, expected a scalar tensor: end it with 'return loss', and nothing beside it"
    ),
    "once = net()\nreturn lambda: once, train, val, F.cross_entropy": (
        "the model of mine.py:task has the same tensors each time (0.weight), so that each run "
        "would begin with the weights that the one before has trained: make them anew"
    ),
    "return ONCE, train, val, F.cross_entropy": "has the same tensors each time (0.weight), so",
    "def made(): return nn.Sequential(NORM, net())\nreturn made, train, val, F.cross_entropy": (
        "has the same tensors each time, so that"
    ),
    "class Scaled(nn.CrossEntropyLoss):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.heat = nn.Parameter(torch.ones(3))\n"
    "return net, train, val, Scaled()": (
        "the loss of mine.py:task has a parameter of its own (heat), which no optimizer would "
        "train: make it a part of the model, and return a function loss(model, batch)"
    ),
    "class Counting(nn.CrossEntropyLoss):\n"
    "    def forward(self, x, y):\n"
    "        self.weight.add_(1)\n"
    "        return super().forward(x, y)\n"
    "return net, train, val, Counting(torch.ones(3))": (
        "changes tensors of its own, so that each run would begin with those that the one before"
    ),
    "def loss(m, b):\n    return F.cross_entropy(m(b[0].mul_(2)), b[1])\n"
    "return net, [(x[:9], y[:9])], val, loss": (
        "the training data of mine.py:task changed while the loss was computed, so that other "
        "batches would come the next time: let loss and model write into copies"
    ),
    "def loss(m, b):\n    return F.cross_entropy(m(b['x']), b.pop('y'))\n"
    "train = DataLoader([{'x': x[i], 'y': y[i]} for i in range(9)], 3)\n"
    "return net, train, [{'x': x, 'y': y}], loss": (
        "the validation data of mine.py:task changed while the loss was computed"
    ),
    "class Noisy(torch.utils.data.Dataset):\n"
    "    def __len__(self): return 9\n"
    "    def __getitem__(self, i): return x[i] + torch.rand(8), y[i]\n"
    "own = DataLoader(Noisy(), 3, num_workers=1, persistent_workers=True)\n"
    "return net, own, val, F.cross_entropy": (
        "are other batches each time, at the same seed: leave out persistent_workers=True"
    ),
    "return net, lambda: [(torch.randn(4, 8, generator=G), y[:4])], val, F.cross_entropy": (
        "are other batches each time, at the same seed: draw random numbers from torch's"
    ),
    "m = net()\nm[0].weight.data.normal_(generator=G)\nreturn m, train, val, F.cross_entropy": (
        "has other weights each time, at the same seed"
    ),
    "return nn.Linear(4, 4, device='meta'), train, val, None": "is on meta, expected the CPU",
}


GLOBAL = """
G = torch.Generator()
ONCE = net()
NORM = nn.BatchNorm1d(8).requires_grad_(False)
"""


@pytest.mark.parametrize("body", BAD)
def test_what_the_protocol_does_not_say_is_a_line_and_nothing_is_written(
    body: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    Path("mine.py").write_text(f"{HEAD}\n{GLOBAL}\ndef task():\n{lines}")
    assert main(["compare", "mine.py:task"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert BAD[body] in line
    assert not Path("runs").exists()


def test_leaving_python_is_an_error_like_another(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(GOOD + "raise SystemExit('no data here')\n")
    assert main(["compare", "mine.py:task"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: importing mine.py failed (SystemExit: no data here)"


def test_a_loss_that_runs_out_of_something_is_an_error_like_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.py").write_text(
        HEAD + "few = iter(range(9))\n"
        "def loss(m, b):\n    return F.cross_entropy(m(b[0]), b[1]) + 0 * next(few)\n"
        "def task(): return net, train, val, loss\n"
    )
    assert main([*COMMAND, "--optimizers", "adamw"]) == 1
    said = capsys.readouterr().err
    assert "in loss" in said
    assert "the loss of mine.py:task failed (StopIteration), at step" in said.splitlines()[-1]


def test_a_file_of_a_package_is_to_be_named_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pack").mkdir()
    Path("pack/tasks.py").write_text("from .elsewhere import task\n")
    assert main(["compare", "pack/tasks.py:task"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("above the package: package.tasks in place of pack/tasks.py")


def test_a_validation_loss_that_is_not_finite_before_any_step_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = "def task():\n    return net, train, [*val, (x * {0}, y)], F.cross_entropy\n"
    words = ["compare", "mine.py:task", "--steps", "2", "--out", "out"]
    for value, status in (("float('nan')", 1), ("1", 0)):
        Path("mine.py").write_text(f"{HEAD}\n{body.format(value)}")
        assert main([*words, "--same-task"][: len(words) + (status == 0)]) == status
        said = capsys.readouterr().err
        assert ("no optimizer can begin with a validation loss of nan, at" in said) == bool(status)


def test_a_sweep_in_which_everything_diverged_names_no_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = (
        "calls = []\ndef loss(model, batch):\n    calls.extend([0] * model.training)\n"
        "    lost = model.training and len(calls) > 1\n"
        "    return model(batch[0]).square().mean() * (math.nan if lost else 1)\n"
        "def task():\n    return net, train, val, loss\n"
    )
    Path("mine.py").write_text(f"import math\n{HEAD}\n{body}")
    asked = ["--sweep", "--steps", "1", "--optimizers", "adamw"]
    assert main(["compare", "mine.py:task", *asked]) == 0
    said = capsys.readouterr().err
    assert "is kept: every run diverged" in said
    assert "lowest validation loss" not in said


RAW = """
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.strange = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return self.last(self.first(x) @ self.strange.sum(0))

def task():
    return Mixer, train, val, F.cross_entropy
"""


@pytest.mark.filterwarnings("ignore:undecided='adamw'")
def test_what_routing_cannot_judge_is_adamws_and_the_lines_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.py").write_text(HEAD + RAW)
    assert main(["compare", "mine.py:task", "--steps", "2", "--optimizers", "muonw"]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("import torch\n") : said.index("scheduler = ")]
    assert 'undecided="adamw"' in lines
    found: dict[str, Any] = {"model": get_task("mine.py:task").build()}
    exec(lines, found)  # without the argument MuonW refuses such a model
    assert sum(len(group["params"]) for group in found["optimizer"].param_groups) == 5


COMPLEX = """
class Filter(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.hidden, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8)
        return self.last(self.hidden(x).relu())

def task():
    return Filter, train, val, F.cross_entropy
"""


def scripts_of(folder: str) -> list[str]:
    """The lines for a script, of each optimizer in a report."""
    page = Path(folder, "report.html").read_text()
    found = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    return [html.unescape(each) for each in found if "LambdaLR" in each]


def test_a_model_with_complex_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(HEAD + COMPLEX)
    asked = ["--steps", "2", "--optimizers", "muonw,adamw,sgd,torch-muon-fp32", "--out", "out"]
    assert main(["compare", "mine.py:task", *asked]) == 0, capsys.readouterr().err
    trained = get_task("mine.py:task").build()
    before = trained.filter.detach().clone()
    optimizer = OPTIMIZERS["adamw"].build(trained, 0.1)
    trained(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert (trained.filter != before).all()
    for lines in scripts_of("out"):
        found: dict[str, Any] = {"model": get_task("mine.py:task").build()}
        exec(lines, found)
        found["model"](torch.randn(2, 8)).sum().backward()
        for each in found.get("optimizers") or [found["optimizer"]]:
            each.step()


RULES = ["--rule", "strange=muon:experts", "--rule", "first.*=adamw"]


def test_rules_decide_and_the_lines_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings are errors here, and routing cannot judge `strange`."""
    Path("mine.py").write_text(HEAD + RAW)
    names = "muonw,normuon,torch-muon-fp32,adamw"
    asked = ["compare", "mine.py:task", "--steps", "2", "--optimizers", names, "--out", "out"]
    assert main([*asked, *RULES, "--embedding-lr", "adamw=0.02"]) == 2  # nothing for torch's Muon
    assert "torch-muon-fp32 has nothing to train here" in capsys.readouterr().err
    asked[5] = "muonw,normuon,adamw"
    assert main([*asked, *RULES, "--embedding-lr", "adamw=0.02"]) == 0
    said = capsys.readouterr().out
    assert "undecided" not in said
    scripts = scripts_of("out")
    assert {("MuonW(" in each, "route(" in each) for each in scripts} >= {(True, False)}
    for lines in scripts:
        assert "Rule('strange', view=\"experts\")" in lines
        found: dict[str, Any] = {"model": get_task("mine.py:task").build()}
        exec(lines, found)
        groups = found["optimizer"].param_groups
        names = {id(p): name for name, p in found["model"].named_parameters()}
        if "MuonW(" in lines:
            muon = [names[id(p)] for g in groups if g["algorithm"] == "muon" for p in g["params"]]
            assert muon == ["strange"]
    # Another rule is another comparison, and the same one goes on.
    assert main([*asked, *RULES, "--embedding-lr", "adamw=0.02"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert main([*asked, *RULES[:2]]) == 2
    assert "rules" in capsys.readouterr().err


def test_rules_decide_in_every_process_of_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(HEAD + RAW)
    asked = ["compare", "mine.py:task", "--steps", "3", "--optimizers", "muonw", "--seeds", "2"]
    for jobs in ("1", "2"):
        words = [*asked, *RULES, "--threads", "1", "--jobs", jobs, "--out", jobs]
        assert main(words) == 0, capsys.readouterr().err
    for run in sorted(path.name for path in Path("1/runs").iterdir()):
        assert losses(Path("1/runs", run)) == losses(Path("2/runs", run))


def test_a_rule_may_have_any_signs() -> None:
    """Those of a name, those that Python and rich give a meaning, and a view on two lines."""
    names = ("a=b", "it's", 'q"uote', "x[[]0]", "c:d", ":fire:", "back\\slash", "new\nline", "ü")
    texts = [f"{name}={choice}" for name in names for choice in ("adamw", "muon", "muon:experts")]
    texts.append("w=muon: split(rows=2) >\n transpose")
    rules = rules_of(texts)
    assert [rule.match for rule in rules] == [name for name in names for _ in range(3)] + ["w"]
    stream = io.StringIO()
    Console(file=stream).print(
        in_script(rules_of(texts)), highlight=False, markup=False, soft_wrap=True
    )
    found: dict[str, Any] = {"Rule": Rule}
    exec(stream.getvalue(), found)
    for rule, again in zip(rules, found["rules"], strict=True):
        assert again.match == rule.match
        assert (again.algorithm or "muon") == rule.algorithm
        assert (again.view is None) == (rule.view is None)
        assert again.view is None or View.parse(again.view) == View.parse(rule.view)


def test_a_run_of_other_rules_is_another_run() -> None:
    Path("mine.py").write_text(HEAD + RAW)
    task = get_task("mine.py:task")
    identities = [
        Setting(task, task.load(), 2, 0, rules=rules).identity(Run("muonw", 0.1, 0))
        for rules in ((), ("strange=adamw",), ("strange=muon:experts",))
    ]
    assert all(one != other for one, other in itertools.combinations(identities, 2))


def test_rules_decide_which_rate_a_matrix_has_under_adamw(tmp_path: Path) -> None:
    Path("mine.py").write_text(HEAD + RAW)
    model = get_task("mine.py:task").build()
    rules = rules_of(["strange=muon:experts", "first.weight=adamw"])
    groups = OPTIMIZERS["adamw"].build(model, 0.1, None, 0.8, rules).param_groups
    apart = next(group["params"] for group in groups if group["lr"] == 0.8)
    assert {id(p) for p in apart} == {id(model.first.weight), id(model.last.weight)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("strange", "--rule 'strange': write PATTERN=adamw, PATTERN=ignore"),
        ("strange=sgd", "--rule 'strange=sgd': write PATTERN=adamw"),
        ("=adamw", "--rule '=adamw': write PATTERN=adamw"),
        ("strange=muon:expert", "--rule 'strange=muon:expert': "),
        ("strange=ignore", "call requires_grad_(False) on those where the model is made"),
        ("strnge=adamw", "strnge"),
        ("*.bias=muon", "bias"),
    ],
)
def test_a_rule_that_is_none(
    rule: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("mine.py").write_text(HEAD + RAW)
    asked = ["compare", "mine.py:task", "--steps", "1", "--out", "out", "--rule", rule]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 12
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "'mine.py' has no function: write mine.py:task"),
        ("mine", "there is no task 'mine': did you mean 'mine.py:task'?"),
        ("mine.py:tsk", "mine.py has no 'tsk': did you mean 'task'? it has net, task"),
        ("mime.py:task", "there is no file mime.py: did you mean 'mine.py'?"),
        ("nowhere:task", "there is no module 'nowhere': run from the folder that has it"),
        ("no.where:task", "there is no module 'no.where': run from the folder that has it"),
        ("mine.py:x", "mine.py:x is of type Tensor, expected a function that returns model"),
        ("wrong.py:task", "importing wrong.py failed (SyntaxError"),
        ("args.py:task", "args.py:task() failed (TypeError: task() missing 1 required"),
        ("mine.py:task --epochs 1 --device tpu", "--device tpu: write cpu or cuda"),
    ],
)
def test_a_task_that_is_not_there(
    spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(GOOD)
    Path("wrong.py").write_text("def task(:\n")
    Path("args.py").write_text("def task(size):\n    pass\n")
    assert main(["compare", *spec.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert not Path("runs").exists()


def test_a_stream_has_no_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    written(FORMS["a stream, augmented by every generator"])
    assert main(["compare", "mine.py:task", "--epochs", "2"]) == 2
    assert "have no length, so that nobody knows what an epoch is: give" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_loader_that_is_shorter_than_it_says() -> None:
    class Lies(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from torch.ones(4, 2)

        def __len__(self) -> int:
            return 8

    data = OwnData(DataLoader(Lies(), batch_size=2), [torch.ones(2)], "t")
    with pytest.raises(TaskError, match="have a length of 4 and ended after 2 batches"):
        data.batch(0, 2, 0)


def test_a_validation_set_that_is_longer_than_it_says() -> None:
    class Lies:
        def __iter__(self) -> Iterator[Any]:
            return itertools.repeat(torch.ones(2))

        def __len__(self) -> int:
            return 2

    with pytest.raises(TaskError, match="did not end after 10,000 batches"):
        OwnData([torch.ones(2)], Lies(), "t")


def test_a_validation_set_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        HEAD + "calls = []\n"
        "def held_out():\n"
        "    calls.append(1)\n"
        "    yield x[36:] + (len(calls) > 4), y[36:]\n"
        "def task(): return net, train, held_out, nn.CrossEntropyLoss()\n"
    )
    assert main([*COMMAND, "--optimizers", "adamw", "--out", "o"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the validation data of mine.py:task changed between two validations" in last
    assert not list(Path("o").rglob("result.json"))


def test_a_disk_that_is_too_full_is_told_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(GOOD)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000))
    assert main([*COMMAND, "--out", "a/b"]) == 2
    assert "a/b needs about 8 MB, and its disk has 1 MB free: make room" in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_disk_that_fills_up_in_a_run_is_a_line_and_the_run_goes_on(tmp_path: Path) -> None:
    task, run = written(FORMS["a factory"]), Run("adamw", 1e-3, 0)
    trainer = Trainer(run, setting(task), tmp_path / "full", StopRequest(), Silent())
    trainer.save()

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    trainer.file.close()
    trainer.file._file = Full()
    with pytest.raises(RunError, match=r"measurements.jsonl: No space left on device; make room"):
        trainer.train()
    train(run, setting(task), tmp_path / "full", StopRequest(), Silent())
    train(run, setting(task), tmp_path / "whole", StopRequest(), Silent())
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_no_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compare", "digits", "--device", "cuda"]) == 2


# --- a task to begin with, and the page's ---


def _trained(task: Task, out: Path) -> None:
    result = train(Run("muonw", 4e-3, 0), setting(task, 4), out, StopRequest(), Silent())
    assert result.val_loss is not None


def test_the_task_to_begin_with_runs_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-task", "mine"]) == 0
    said = capsys.readouterr().out
    assert said == "wrote mine.py; it runs as it is: muonkit compare mine.py:task\n"
    assert "muonkit compare mine.py:task" in Path("mine.py").read_text()
    _trained(get_task("mine.py:task"), tmp_path / "out")
    before = Path("mine.py").read_text()
    for name, message in (
        ("mine.py", "mine.py is there already, and is left as it is: choose another name"),
        ("1st", "'1st' is no name of a Python module: use letters, digits and _"),
        ("no/where", "there is no folder no: make it first"),
    ):
        assert main(["new-task", name]) == 2
        assert message in capsys.readouterr().err
    assert Path("mine.py").read_text() == before
    assert main(["compare", "mine.py"]) == 2
    assert "'mine.py' has no function: write mine.py:task" in capsys.readouterr().err
    Path("a folder").mkdir()
    assert main(["new-task", "a folder/other"]) == 0
    command = "muonkit compare 'a folder/other.py:task'"
    assert capsys.readouterr().out.endswith(f": {command}\n")
    assert command in Path("a folder/other.py").read_text()


def test_the_tasks_on_the_page_train(tmp_path: Path) -> None:
    blocks = read_blocks((ROOT / "docs" / "your-task.md").read_text(encoding="utf-8"))
    python = [block.text for block in blocks if block.language == "python"]
    Path("mine.py").write_text("\n".join(python[:2]))
    for name in ("task", "language_model"):
        _trained(get_task(f"mine.py:{name}"), tmp_path / name)
