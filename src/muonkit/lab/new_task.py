"""``muonkit new-task NAME``: a task of one's own to begin with, which runs as it is written."""

import shlex
from pathlib import Path

from muonkit._text import shortened
from muonkit.lab.errors import LabError
from muonkit.lab.files import is_there, write_atomically

_TEMPLATE = '''"""A task for muonkit compare: what to train, on what, and how it is judged.

It runs as it is, on data made here. Put your own in the places marked CHANGE, then

    muonkit compare @FILE@:task --steps 300 --sweep --seeds 3
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


# CHANGE: your model. It is made anew for every run, with torch's random numbers seeded by the run's
# seed, so that every optimizer begins with the same weights. Leave it on the CPU: where there is a
# GPU it is moved there, and trained under autocast to bfloat16.
def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


# CHANGE: your data. Here: 10 classes that a random network (the teacher) tells apart.
def examples() -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.Generator().manual_seed(0)  # the same examples every time
    x = torch.randn(6000, 32, generator=own)
    hidden = (x @ torch.randn(32, 64, generator=own)).tanh()
    return x, (hidden @ torch.randn(64, 10, generator=own)).argmax(1)


# CHANGE: the loss of a batch, a scalar: its mean. A batch is what the loader gives, on the model's
# device. In place of a function there may be nn.CrossEntropyLoss() for batches of (inputs,
# targets), which also gives the accuracy, or None for a Hugging Face model: its own loss.
def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def task():
    """Classes of a random network."""
    x, y = examples()
    # Batches: a DataLoader, a list, or a function that makes an iterable. Shuffling is repeatable:
    # each batch depends on the run's seed and the step alone.
    train = DataLoader(TensorDataset(x[:5000], y[:5000]), batch_size=100, shuffle=True)
    # What validates has to be the same at every validation.
    validation = DataLoader(TensorDataset(x[5000:], y[5000:]), batch_size=500)
    return model, train, validation, loss
'''


def command_of(path: Path) -> str:
    """The task of this file as a shell takes it; of Windows' paths without a backslash."""
    return shlex.quote(f"{path.as_posix()}:task")


def write_task(name: str) -> Path:
    """Write the template to ``NAME.py``, or to NAME if that ends in .py.

    Raises:
        LabError: there is such a file, no such folder, or it is no name of a Python file.
    """
    path = Path(name if name.endswith(".py") else f"{name}.py")
    if not path.stem.isidentifier():
        raise LabError(
            f"{shortened(name, 40)!r} is no name of a Python module: use letters, digits and _"
        )
    if is_there(path):
        raise LabError(f"{path} is there already, and is left as it is: choose another name")
    if not path.parent.is_dir():
        raise LabError(f"there is no folder {path.parent}: make it first")
    write_atomically(
        path, _TEMPLATE.replace("@FILE@:task", command_of(path)).encode(), "another folder"
    )
    return path
