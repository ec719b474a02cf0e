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
# # 7. Reading the instruments
#
# **Result.** The monitor points at the two matrices whose gradients were spoiled on purpose (the
# arrows), of which a loss curve says nothing. It changes no bit of the training that it watches.
#
# `muonkit.Monitor` shows what the optimizer does while it trains: sizes of steps, spectra before
# and after orthogonalization, learning rates as they arrive. It reads and never writes: the
# training is the same with it, bit for bit.

# %% tags=["hide-input"]
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
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

    from muonkit import Monitor, MuonW
    from muonkit.lab.data import stdlib_text
    from muonkit.lab.models import GPT
    from muonkit.lab.train import lr_factor
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None

QUICK = os.environ.get("MUONKIT_TUTORIAL") == "quick"  # the short form, for automatic checks
STYLES = (("#8C6BB1", "-"), ("#1B9E9E", "--"), ("#A6761D", "-."), ("#808080", ":"))

# %% [markdown]
# ## A training with a monitor
#
# The GPT of notebook 5. Step 1 and every tenth are sampled; each sample is a dict, and a line of a
# file.

# %%
text = stdlib_text(64)
steps, every = (24, 4) if QUICK else (300, 10)
folder = Path(tempfile.mkdtemp())


def train(file=None, lr=1.6e-2, spoil=None, **options):
    torch.manual_seed(0)
    model = GPT(256, 64, 64, layers=2)
    optimizer = MuonW(model, lr=lr, adjust_lr_fn="match_rms_adamw", **options)
    monitor = Monitor(optimizer, every=every, to=folder / file) if file else None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps)
        x, y = text.batch(0, step, 8)
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        if spoil:
            spoil(model, step)
        optimizer.step()
        optimizer.zero_grad()
    if monitor:
        monitor.close()
    return model


def read(file):
    """The header and the samples of a monitor's file."""
    header, *samples = (json.loads(line) for line in (folder / file).open())
    assert header["kind"] == "header"
    assert header["format"] == 1
    return header, samples


model = train("run.jsonl")
header, samples = read("run.jsonl")
print([s["step"] for s in samples])
equal = [torch.equal(p, q) for p, q in zip(model.parameters(), train().parameters(), strict=True)]
print("weights equal to those of a training without a monitor, bit for bit:", all(equal))
assert all(equal)

# %% [markdown]
# ## What a sample has
#
# One record for every *matrix* (a fused projection has three, by `index`), every AdamW parameter,
# every param group and every rank. Here is one matrix, late in the training.

# %% tags=["hide-input"]
matrix = next(m for m in samples[-2]["matrices"] if m["name"] == "blocks.1.up.weight")
for key, value in matrix.items():
    if key != "spectra":
        print(f"{key:20} {value}")
for which, spectrum in matrix["spectra"].items():
    print(f"spectrum of {which:9}", {k: v for k, v in spectrum.items() if k != "quantiles"})

# %% [markdown]
# With $W$ the weight before the step, $O$ the orthogonalized momentum, $\eta$ = lr · scale:
#
# - `update_norm` is $\|\eta O\|_F$, `update_rms` the same per entry. With the scale
#   `match_rms_adamw` the latter is at most about 0.2 lr, in every matrix.
# - `update_to_weight` is how far a matrix moves in one step relative to its size. Matrices of one
#   kind should have similar ones.
# - `orthogonality_error` is $\|OO^\top - I\|_F / \sqrt{m}$. With Keller's coefficients and all
#   singular values in the band it is about 0.3; it is higher where many singular values were too
#   small to arrive.
# - `spectra.*.stable_rank` is notebook 1's; `entropy` is 1 if all singular values are equal.
#
# ## The spectrum, before and after
#
# A sample has 17 quantiles of the singular values of momentum, update and weight. This is the
# picture of notebook 1 again, and the answer to it.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
shown = ["blocks.0.attention.qkv.weight", "blocks.1.attention.out.weight", "blocks.1.up.weight"]
last = {m["name"]: m for m in samples[-2]["matrices"] if m["index"] == 0}
for ax, kind in zip(axes, ("momentum", "update", "weight"), strict=True):
    for name, (color, dash) in zip(shown, STYLES, strict=False):
        quantiles = last[name]["spectra"][kind]["quantiles"]
        share = [100 * i / (len(quantiles) - 1) for i in range(len(quantiles))]
        ax.plot(share, quantiles, dash, color=color, label=name.removesuffix(".weight"))
    ax.set(title=f"{kind}, step {samples[-2]['step']}", xlabel="quantile, %")
axes[0].set_yscale("log")
axes[0].set_ylabel("singular value")
axes[1].axhline(1, color="black", linewidth=0.6)
axes[0].legend(fontsize=7)
plt.show()
for name in shown:
    before, after = (last[name]["spectra"][k]["stable_rank"] for k in ("momentum", "update"))
    print(f"{name:32} stable rank {before:5.1f} -> {after:5.1f}")
    assert after > 3 * before
errors = [m["orthogonality_error"] for m in samples[-2]["matrices"]]
print(f"orthogonality error of all matrices: {min(errors):.2f} to {max(errors):.2f}")

# %% [markdown]
# ## Over time
#
# Three things to look at in any run.


# %% tags=["hide-input"]
def series(samples, key):
    """Steps, and one list of values for each matrix."""
    found = {}
    for sample in samples:
        for m in sample["matrices"]:
            found.setdefault((m["name"], m["index"]), []).append(key(m))
    return [s["step"] for s in samples], found


panels = {
    "update / weight": lambda m: m["update_to_weight"],
    "orthogonality error": lambda m: m["orthogonality_error"],
    "decay's share of the step": lambda m: m["decay_share"],
}
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
for ax, (title, key) in zip(axes, panels.items(), strict=True):
    at, found = series(samples, key)
    for label, (color, dash) in zip(("qkv", "out", "up", "down"), STYLES, strict=True):
        mine = [v for (name, _), v in found.items() if name.split(".")[-2] == label]
        mean = torch.tensor(mine, dtype=torch.float64).mean(0)
        ax.plot(at, mean, dash, color=color, label=label)
    ax.set(title=f"{title} (no unit)", xlabel="step", ylim=(0, None))
axes[0].legend(title="mean over blocks", fontsize=8)
plt.show()
for sample in samples:
    lr = next(g["lr"] for g in sample["groups"] if g["algorithm"] == "muon")
    for m in sample["matrices"]:
        # The largest singular value of O is at most 1.21 (notebook 2).
        assert m["update_rms"] <= 1.21 * 0.2 * lr * (1 + 1e-5)

# %% [markdown]
# Left: the learning rate's schedule, seen through the weights. All kinds of matrices move by a
# similar share of themselves; one far above the others would be trained too fast. Right: how much
# of the step is decay. An orthogonalized update has the same norm whatever the gradient, so the
# weights grow until decay takes away what the updates add; the share rises until then.
#
# ## Finding a fault
#
# Now a run in which something is wrong. In the middle of it the gradient of one matrix is cut to
# zero, as if its layer were no longer used; and another one's lies in a single direction from the
# start.


# %% tags=["result"]
def fault(model, step):
    if step > steps // 2:
        model.blocks[0].down.weight.grad.zero_()
    g = model.blocks[1].attention.out.weight.grad
    g.copy_(g.mean(0, keepdim=True).expand_as(g))


train("fault.jsonl", spoil=fault)
_, faulty = read("fault.jsonl")
print("                               gradient norm   stable rank of momentum / update")
for m in faulty[-2]["matrices"]:
    if m["index"] == 0:
        ranks = [m["spectra"][k]["stable_rank"] for k in ("momentum", "update")]
        mark = "  <-" if m["gradient_norm"] == 0 or ranks[1] < 3 else ""
        print(f"{m['name']:32} {m['gradient_norm']:10.2e} {ranks[0]:12.1f} {ranks[1]:8.1f}{mark}")
found = {m["name"]: m for m in faulty[-2]["matrices"]}
assert found["blocks.0.down.weight"]["gradient_norm"] == 0
assert found["blocks.1.attention.out.weight"]["spectra"]["update"]["stable_rank"] < 3
assert found["blocks.0.down.weight"]["update_norm"] > 0

# %% [markdown]
# A loss curve does not say which matrix. And look at the first of the two: its gradient is zero,
# but its **update is as large as ever**. The momentum dies out by 5% a step, and orthogonalization
# takes the size out: Muon goes on along the last direction at full speed until the momentum is
# rounding. A gradient of `None` (a layer that is not used) skips the parameter; a gradient of
# zeros does not.
#
# ## What to remember
#
# - `Monitor(optimizer, every=100, to="run.jsonl")`; `monitor.latest` is the last sample.
# - `update_to_weight`: similar for matrices of one kind. `orthogonality_error`: about 0.3 to 0.6
#   here.
# - A stable rank of the *update* near one: the gradient has one direction only.
# - Look at `gradient_norm` beside `update_norm`: Muon's updates do not shrink with the gradient.
#
# ## Exercises
#
# 1. Train with `ns_coefficients="svd"`. What is `orthogonality_error` then?
# 2. And with `weight_decay=0`? Which of the curves changes most?
#
# <details><summary>Answers</summary>
#
# 1. Rounding, as far as the momentum has full rank (the cell below prints it).
# 2. `decay_share` is zero, and without it the weights grow further, so that `update_to_weight`
#    falls.
#
# </details>

# %%
train("svd.jsonl", ns_coefficients="svd")
train("no_decay.jsonl", weight_decay=0.0)
errors = sorted(m["orthogonality_error"] for m in read("svd.jsonl")[1][-2]["matrices"])
median = errors[len(errors) // 2]
print(f"orthogonality error with svd: median {median:.0e}, largest {errors[-1]:.0e}")
assert median < 1e-2  # one direction that a momentum of rank 63 lacks makes it 1/8
norms = [
    sum(m["weight_norm"] for m in read(f)[1][-1]["matrices"])
    for f in ("run.jsonl", "no_decay.jsonl")
]
print(f"sum of the matrices' norms at the end: {norms[0]:.1f} with decay, {norms[1]:.1f} without")
assert norms[1] > norms[0]
