# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Experiments
#
# **Result.** With both learning rates tuned on grids, MuonW's loss falls below AdamW's in the same
# number of steps, here on a small GPT; each of its steps takes longer, so seconds are drawn too.
#
# Does it help? MNIST, CIFAR-10 and a GPT, Muon against AdamW, with both learning rates tuned. An
# untuned AdamW is easy to beat, and proves nothing.

# %% tags=["hide-input"]
import dataclasses
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

REPOSITORY = ""  # the address in pyproject.toml: docs/notebooks.py writes it into the .ipynb
if importlib.util.find_spec("muonkit") is None and REPOSITORY:  # on Colab, say
    wanted = f"muonkit[tutorial] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    importlib.invalidate_caches()
warnings.filterwarnings("ignore", "IProgress not found")  # no progress bars here
try:
    import matplotlib.pyplot as plt
    import torch
    from IPython.display import SVG, display
    from rich.console import Console

    from muonkit import MuonW
    from muonkit.lab import data, models
    from muonkit.lab.compare import compare, comparison
    from muonkit.lab.errors import DataError
    from muonkit.lab.objective import loss_of
    from muonkit.lab.tasks import Budget, get_task
    from muonkit.lab.train import evaluate, lr_factor
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None

QUICK = os.environ.get("MUONKIT_TUTORIAL") == "quick"  # the short form, for automatic checks
if QUICK:
    print("The short form: a few steps of everything. The losses below mean nothing.")


def task_or_digits(name):
    """The lab's task of this name, if its data are on disk or can be downloaded."""
    try:
        task = get_task(name)
        return task, task.load()
    except DataError as error:
        print(f"NOTE: {name} is not to be had, scikit-learn's digits stand in for it. ({error})")
        return get_task("digits"), data.digits()


# %% [markdown]
# ## What makes a comparison fair
#
# - The same initial weights, the same batches in the same order, the same number of steps.
# - The same learning-rate schedule (warm-up, then linear decay to zero), betas and decay.
# - **Each optimizer's own best learning rate**, chosen by validation loss from grids of the same
#   width and spacing. If the best is at the edge of a grid, the grid is too small.
# - Steps *and* seconds. An optimizer that needs fewer steps can still be slower.
#
# muonkit's lab does all of this; from the command line it is
# `muonkit compare mnist --sweep --seeds 3`. Here is the same from Python.

# %% tags=["hide-input"]
mnist, mnist_data = task_or_digits("mnist")
print(mnist_data.description)
asked = comparison(
    mnist.name,
    ["muonw", "adamw"],
    sweep=not QUICK,  # five learning rates each, more where the best lies at the edge
    lr={"muonw": 8e-3, "adamw": 4e-3},  # the centres of the grids
    budget=Budget(5 if QUICK else 80, "steps"),
)
out = Path(tempfile.mkdtemp()) / "mnist"
with (out.parent / "progress.txt").open("w") as progress:
    report = compare(asked, out, progress=Console(file=progress, force_jupyter=False))
display(SVG(filename=out / "loss-steps.svg"))
assert report.exists()

# %% [markdown]
# The table's last columns are the price: milliseconds per step, and how many of them the optimizer
# takes. On an MLP with batches of 128 the orthogonalization costs more than forward and backward.
# `report.html` in that folder has the curves against seconds, the learning rates tried and the
# routing.
#
# ## The plain loop
#
# No framework is needed: `MuonW(model)` stands where `AdamW(model.parameters())` stood. This loop
# does for CIFAR-10 and the GPT what the lab did for MNIST: train, time, tune.

# %%
make = {
    "MuonW": lambda model, lr: MuonW(
        model, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    ),
    "AdamW": lambda model, lr: torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    ),
}


def train(task, batches, name, lr, steps):
    """One training: losses, validation loss, seconds of each step and of the optimizer in it."""
    torch.manual_seed(0)
    model = task.build()
    optimizer = make[name](model, lr)
    losses, seconds, of_it = [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps)
        start = time.perf_counter()
        loss, _ = loss_of(model, *batches.batch(0, step, task.batch_size))
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        of_it.append(time.perf_counter() - before)
        losses.append(loss.item())
    return losses, evaluate(model, Validation(batches))[0], seconds, of_it


class Validation:
    """The first few batches of the validation set: enough to choose a learning rate."""

    def __init__(self, batches, count=1 if QUICK else 2):
        self.batches, self.count = batches, count

    def validation(self):
        return itertools.islice(self.batches.validation(), self.count)


def tuned(task, batches, grids, steps):
    """For each optimizer the training with the lowest validation loss of its grid.

    While the best is at an edge of the grid, one more is tried beyond it, at most twice.
    """
    best = {}
    for name, grid in grids.items():
        runs = {lr: train(task, batches, name, lr, steps) for lr in grid}
        factor = grid[-1] / grid[-2] if len(grid) > 1 else 1.0
        for _ in range(2):
            lr = min(runs, key=lambda lr: runs[lr][1])
            beyond = lr / factor if lr == min(runs) else lr * factor
            if lr in (min(runs), max(runs)) and beyond not in runs:
                runs[beyond] = train(task, batches, name, beyond, steps)
        lr = min(runs, key=lambda lr: runs[lr][1])
        tried = ", ".join(f"{lr:g}: {runs[lr][1]:.3f}" for lr in sorted(runs))
        edge = "" if min(runs) < lr < max(runs) else "  (at the edge of what was tried)"
        print(f"{name}: validation loss by learning rate: {tried}; best {lr:g}{edge}")
        best[name] = lr, *runs[lr]
    return best


def show(title, best):
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    styles = zip(("#0072B2", "#D55E00"), ("-", "--"), strict=True)
    for (name, (lr, losses, val, seconds, of_it)), (color, dash) in zip(
        best.items(), styles, strict=True
    ):
        window = max(1, len(losses) // 20)
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
        elapsed = torch.tensor(seconds).cumsum(0)[window - 1 :]
        label = f"{name}, lr {lr:g}"
        axes[0].plot(torch.arange(window, len(losses) + 1), smooth, dash, color=color, label=label)
        axes[1].plot(elapsed, smooth, dash, color=color, label=label)
        ms, optimizer = (1e3 * torch.tensor(x).median().item() for x in (seconds, of_it))
        print(
            f"{title}, {name}: train {smooth[-1]:.3f}, validation {val:.3f} nats; "
            f"{ms:.1f} ms per step, the optimizer {optimizer:.1f} of them"
        )
        assert QUICK or smooth[-1] < smooth[0], "the best learning rate learns"
    axes[0].set(title=title, xlabel="step", ylabel="training loss, nats (smoothed)")
    axes[1].set(xlabel="seconds of training")
    axes[0].legend()
    plt.show()
    low = min(best, key=lambda name: best[name][2])
    print(f"lower validation loss at the end: {low}")


# %% [markdown]
# ### CIFAR-10
#
# A small residual convnet. Its convolutions are matrices too: a kernel of shape (out, in, 3, 3) is
# seen as out × 9·in (notebook 5 has these *views*). The images are mirrored and shifted at random,
# and 30 steps are far from an epoch: this is the start of a training.

# %%
cifar, cifar_data = task_or_digits("cifar10")
print(cifar_data.description)
cifar = dataclasses.replace(cifar, batch_size=16 if QUICK else 64)
grids = {"MuonW": (1e-3, 4e-3, 1.6e-2), "AdamW": (1e-3, 4e-3, 1.6e-2)}
if QUICK:
    grids = {"MuonW": (1.6e-2,), "AdamW": (4e-3,)}
show(cifar.name, tuned(cifar, cifar_data, grids, 3 if QUICK else 30))

# %% [markdown]
# ### A GPT
#
# The byte-level GPT of notebook 1, a size that a laptop can tune: two layers of width 64.

# %% tags=["result"]
gpt = dataclasses.replace(
    get_task("gpt"),
    load=functools.partial(data.stdlib_text, 64),
    build=functools.partial(models.GPT, 256, 64, 64, 2),
)
gpt_data = gpt.load()
grids = {"MuonW": (1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1), "AdamW": (1e-3, 2e-3, 4e-3, 8e-3)}
if QUICK:
    grids = {"MuonW": (1.6e-2,), "AdamW": (4e-3,)}
show("GPT", tuned(gpt, gpt_data, grids, 12 if QUICK else 150))

# %% [markdown]
# ## How to read this
#
# These are short trainings of small models: the part of a training where Muon's lead is largest,
# and its cost, next to such cheap forward and backward passes, the most visible. On long trainings
# of large models the reports are:
#
# - tuned on both sides, a factor of 1.4 in steps at 0.1 billion parameters, falling to 1.1 at 1.2
#   billion (arXiv 2509.02046); 1.4 with muP scaling and a width-dependent decay (arXiv 2512.05620);
# - the time of the optimizer a few percent of the whole (Moonlight: 1 to 3% of forward and
#   backward).
#
# The lab's own tables, five seeds, every learning rate and decay swept, are in
# [Evidence](../evidence.md): `muonkit compare` prints them anew on your machine.
#
# ## What to remember
#
# - Tune AdamW too, with the same care, by validation loss, and look whether the best is at an edge.
# - With the scale `match_rms_adamw` Muon's best learning rate can be near AdamW's or many times
#   it, as the lines above show. Sweep upward from AdamW's.
# - Count seconds as well as steps.
#
# ## Exercises
#
# 1. Compare at one shared learning rate, AdamW's best and then Muon's best. What would you
#    conclude?
# 2. Replace the schedule `keller` by exact singular value decomposition, `ns_coefficients="svd"`,
#    in `make["MuonW"]`. How much does the validation loss change, and how much the time?
#
# <details><summary>Answers</summary>
#
# 1. A rate that is good for one makes the other look worse than it is: read the lead off the lines
#    "validation loss by learning rate" above, at one rate and then at each one's best.
# 2. The cell below prints both. The inexact polynomial does about as well as the exact factor, and
#    takes less time.
#
# </details>

# %%
steps = 10 if QUICK else 100
results = {}
for schedule in ("keller", "svd"):
    make["MuonW"] = lambda model, lr, c=schedule: MuonW(
        model, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", ns_coefficients=c
    )
    _, val, _, of_it = train(gpt, gpt_data, "MuonW", 1.6e-2, steps)
    results[schedule] = val
    ms = 1e3 * torch.tensor(of_it).median().item()
    print(
        f"{schedule:7} validation loss {val:.3f} after {steps} steps, optimizer {ms:.1f} ms a step"
    )
assert abs(results["keller"] - results["svd"]) < 0.3
