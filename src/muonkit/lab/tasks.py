"""What can be trained: one table of what comes with muonkit, and tasks of the user's own by name.

A new task is one record in ``TASKS``: where its data come from, which model, how long, and the
learning rates it starts from. A task of the user's own is a record too: `muonkit.lab.own`.
"""

from functools import partial
from pathlib import Path

from muonkit._text import shortened, unknown
from muonkit.lab import data, models
from muonkit.lab.errors import LabError
from muonkit.lab.own import own_task
from muonkit.lab.task import Budget as Budget
from muonkit.lab.task import Task as Task
from muonkit.lab.task import rates

_CONTEXT = 128

# The learning rates of muonw and adamw for gpt, and of muonw, adamw and sgd for mnist, are what
# --sweep chose on 2026-11-22 (docs/lab.md has the grids). All others are guesses from which --sweep
# starts.


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gpt",
            summary="byte-level GPT on the source of Python's standard library (no download)",
            load=partial(data.stdlib_text, _CONTEXT),
            build=partial(models.GPT, 256, _CONTEXT),
            batch_size=16,
            budget=Budget(400, "steps"),
            lr=rates(muon=0.016, adamw=2e-3, sgd=0.3),
            evaluations=20,
            accuracy=False,
        ),
        Task(
            name="digits",
            summary="MLP on scikit-learn's 8 x 8 digits (no download)",
            load=data.digits,
            build=partial(models.mlp, 64, 128, 10, 2),
            batch_size=64,
            budget=Budget(20, "epochs"),
            lr=rates(muon=4e-3, adamw=4e-3, sgd=0.1),
            evaluations=20,
            accuracy=True,
        ),
        Task(
            name="mnist",
            summary="MLP on MNIST (12 MB)",
            load=data.mnist,
            build=partial(models.mlp, 784, 256, 10, 3),
            batch_size=128,
            budget=Budget(3, "epochs"),
            lr=rates(muon=1e-3, adamw=2e-3, sgd=0.1, relative=0.008),
            evaluations=20,
            accuracy=True,
        ),
        Task(
            name="cifar10",
            summary="small residual convnet on CIFAR-10 (170 MB)",
            load=data.cifar10,
            build=models.ConvNet,
            batch_size=250,
            budget=Budget(5, "epochs"),
            lr=rates(muon=4e-3, adamw=4e-3, sgd=0.1, relative=0.016),
            evaluations=10,
            accuracy=True,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called ``name``: one of ours, or ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``.

    Raises:
        LabError: there is none, with the closest name, or the user's is not fit.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" in name or name.endswith(".py"):
        return own_task(name)
    if Path(f"{name}.py").is_file():
        raise LabError(f"there is no task {shortened(name, 40)!r}: did you mean '{name}.py:task'?")
    raise LabError(unknown("task", name, TASKS, ", or one of your own, as mytask.py:task"))
