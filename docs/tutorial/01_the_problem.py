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
# # 1. The problem
#
# **Result.** A GPT's momentum has few directions: in every matrix of its first block fewer than a
# quarter, in effect. A step that gives all of them one size, $UV^\top$, lowers the loss faster than
# AdamW's update and than the momentum itself, when all three change no output by more than the same
# bound. That step is Muon's.
#
# Most of a network's weights are in matrices. An optimizer such as SGD or AdamW does not know that:
# it sees a long list of numbers. In this notebook we train a small GPT, look at the momentum of its
# matrices *as matrices*, and find that nearly all of a step goes into a few directions.
#
# You know PyTorch. Nothing is assumed about Muon.

# %% tags=["hide-input"]
import importlib.util
import os
import subprocess
import sys
import warnings

REPOSITORY = ""  # the address in pyproject.toml: docs/notebooks.py writes it into the .ipynb
if importlib.util.find_spec("muonkit") is None and REPOSITORY:  # on Colab, say
    wanted = f"muonkit[tutorial] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    importlib.invalidate_caches()
warnings.filterwarnings("ignore", "IProgress not found")  # no progress bars here
try:
    import matplotlib.pyplot as plt
    import torch

    from muonkit.lab.data import stdlib_text
    from muonkit.lab.models import GPT
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None

QUICK = os.environ.get("MUONKIT_TUTORIAL") == "quick"  # the short form, for automatic checks
# Optimizers have the colours of every picture of muonkit; what is none has others.
MUON, ADAMW, SGD = "#0072B2", "#D55E00", "#009E73"
OTHERS = ("#8C6BB1", "#1B9E9E", "#A6761D", "#808080")

# %% [markdown]
# ## A real network
#
# A decoder-only transformer reads the source code of Python's standard library, byte by byte (it
# is on your disk already, nothing is downloaded), and learns to predict the next byte. We train it
# twice from the same weights on the same batches: with AdamW, and with SGD with momentum.

# %% tags=["hide-input"]
context, width, layers, batch, steps = (64, 64, 2, 8, 60) if QUICK else (128, 128, 4, 16, 150)
text = stdlib_text(context)
print(text.description)


def loss_of(model, step):
    x, y = text.batch(0, step, batch)  # the batch is a function of (seed, step)
    return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(make_optimizer):
    torch.manual_seed(0)
    model = GPT(256, context, width, layers)
    optimizer = make_optimizer(model.parameters())
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, losses


model, adamw, losses = train(lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.95)))
sgd_model, sgd, sgd_losses = train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
print(f"AdamW: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte in {steps} steps")
print(f"SGD:   loss {sgd_losses[0]:.2f} -> {sgd_losses[-1]:.2f}")
assert losses[-1] < losses[0] - 1, "the network learns: what follows is about a real training"

# %% [markdown]
# ## Momentum, as a matrix
#
# Both optimizers keep a running sum or average of each parameter's gradient, the momentum $M$. For
# a weight matrix $W$ with $m$ rows (outputs) and $n$ columns (inputs), $M$ is $m \times n$ too, and
# like every matrix it is a sum of *directions*:
#
# $$M = \sum_i \sigma_i\, u_i v_i^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0.$$
#
# The term $u_i v_i^\top$ says: when the input looks like $v_i$, change the output towards $u_i$.
# The singular value $\sigma_i$ says how much of it. Here are the $\sigma_i$ of four matrices of
# the first block, each divided by the largest.


# %% tags=["hide-input"]
def matrices(model, optimizer, key):
    """What the optimizer keeps under `key` for the first block (of the fused qkv: the query's)."""
    block = model.blocks[0]
    return {
        "query": optimizer.state[block.attention.qkv.weight][key].chunk(3)[0],
        "attention out": optimizer.state[block.attention.out.weight][key],
        "MLP up": optimizer.state[block.up.weight][key],
        "MLP down": optimizer.state[block.down.weight][key],
    }


momenta = {
    "AdamW": matrices(model, adamw, "exp_avg"),
    "SGD": matrices(sgd_model, sgd, "momentum_buffer"),
}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for ax, (name, of) in zip(axes, momenta.items(), strict=True):
    styles = zip(OTHERS, ("-", "--", "-.", ":"), strict=True)
    for (label, M), (color, dash) in zip(of.items(), styles, strict=True):
        s = torch.linalg.svdvals(M)
        ax.semilogy(torch.arange(1, len(s) + 1), s / s[0], dash, color=color, label=label)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(title=f"momentum of {name}", xlabel="i, from the largest", ylim=(1e-4, 1.6))
axes[0].set_ylabel("singular value / largest (no unit)")
axes[1].legend()
plt.show()

# %% [markdown]
# The scale is logarithmic. One direction is at 1; half of them are far below. Three numbers say how
# skewed a spectrum is:
#
# - **condition**: $\sigma_1$ over the median $\sigma$;
# - **stable rank** $\|M\|_F^2 / \sigma_1^2$: the number of directions if all were as large as the
#   first. A matrix with equal singular values has its full rank here;
# - **top tenth**: the share of $\|M\|_F^2 = \sum_i \sigma_i^2$ that is in the largest tenth of the
#   directions.

# %% tags=["hide-input"]
print("momentum of  matrix         rank  largest/median  stable rank  top tenth")
for name, of in momenta.items():
    for label, M in of.items():
        s = torch.linalg.svdvals(M)
        stable = (s.square().sum() / s[0] ** 2).item()
        top = (s[: len(s) // 10].square().sum() / s.square().sum()).item()
        print(
            f"{name:12} {label:14} {len(s):4} {s[0] / s.median():14.0f} {stable:13.1f} {top:10.0%}"
        )
        assert stable < len(s) / 4, "less than a quarter of the directions, in effect"

# %% [markdown]
# ## Why that is a problem
#
# With SGD the step *is* the momentum: $W \leftarrow W - \eta M$. The learning rate has to be small
# enough for the largest direction, or training diverges. Then a direction with a hundredth of its
# singular value moves a hundred times slower. Small need not mean useless: what is rare in the data
# (a bracket, a rare word) has small gradients too.
#
# What limits a step is its **spectral norm** $\|\Delta W\|_2 = \sigma_1(\Delta W)$: for every input
# $x$, the output changes by at most
#
# $$\|\Delta W x\| \le \|\Delta W\|_2\, \|x\|.$$
#
# So ask: among all steps that change no output by more than that, which one lowers the loss most?
# To first order a step along $-D$ lowers it by $\langle M, D\rangle = \sum_{jk} M_{jk} D_{jk}$
# (taking $M$ for the gradient). The answer has a closed form. With $M = U S V^\top$,
#
# $$\max_{\|D\|_2 \le 1} \langle M, D\rangle = \sum_i \sigma_i, \qquad \text{at } D = U V^\top.$$
#
# **Keep the directions, set every singular value to one.** That is what Muon does. The next cell
# compares candidates, each scaled to spectral norm one.


# %%
def per_spectral_norm(D):
    return D / torch.linalg.matrix_norm(D, ord=2)


def orthogonal_factor(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


second = matrices(model, adamw, "exp_avg_sq")
torch.manual_seed(0)
print("first-order decrease of the loss, in units of the best one (the sum of singular values)")
print("matrix          momentum  AdamW's update  a random orthogonal  U V^T")
for label, M in momenta["AdamW"].items():
    candidates = [
        per_spectral_norm(M),
        per_spectral_norm(M / (second[label].sqrt() + 1e-8)),
        orthogonal_factor(torch.randn_like(M)),
        orthogonal_factor(M),
    ]
    best = torch.linalg.svdvals(M).sum()
    gains = [((M * D).sum() / best).item() for D in candidates]
    print(f"{label:14} {gains[0]:9.3f} {gains[1]:15.3f} {gains[2]:20.3f} {gains[3]:6.3f}")
    # 1e-4: float32, sums of a few thousand terms.
    assert abs(gains[3] - 1) < 1e-4
    assert max(gains[:3]) < gains[3]

# %% [markdown]
# AdamW divides every entry by the root of its own mean square. That evens out *entries*, which is
# not the same as evening out *directions*: its update is still far from $UV^\top$ in this measure.
#
# ## The same on the real loss
#
# First-order decrease is a promise for tiny steps. So take the GPT as it is now, move all of its
# hidden matrices at once by a step of spectral norm $t$ each, and measure the loss. To keep the
# noise of single batches out of it, $M$ is now the mean gradient of eight batches, and the loss
# theirs.


# %% tags=["hide-input", "result"]
def hidden(model):
    return [p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2]


def blocks(p):
    """The fused q, k, v are three matrices; every other parameter is one."""
    return p.chunk(3) if p.shape[0] == 3 * p.shape[1] else (p,)


def mean_loss():
    return sum(loss_of(model, steps + k) for k in range(8)) / 8


gradients = torch.autograd.grad(mean_loss(), hidden(model))


def directions(of):
    """One direction for each hidden matrix: of(gradient, AdamW's mean square)."""
    squares = [adamw.state[p]["exp_avg_sq"] for p in hidden(model)]
    pairs = [
        list(zip(blocks(M), blocks(v), strict=True))
        for M, v in zip(gradients, squares, strict=True)
    ]
    return [torch.cat([of(M, v) for M, v in pair]) for pair in pairs]


@torch.no_grad()
def loss_after(D, t):
    torch._foreach_sub_(hidden(model), D, alpha=t)
    loss = mean_loss().item()
    torch._foreach_add_(hidden(model), D, alpha=t)
    return loss


along = {
    "momentum": directions(lambda M, v: per_spectral_norm(M)),
    "AdamW's update": directions(lambda M, v: per_spectral_norm(M / (v.sqrt() + 1e-8))),
    "U V^T": directions(lambda M, v: orthogonal_factor(M)),
}
before = mean_loss().item()
sizes = torch.logspace(-3, -0.5, 8 if QUICK else 14).tolist()
fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
styles = zip((SGD, ADAMW, MUON), ("^-.", "s--", "o-"), strict=True)
gained = {}
for (name, D), (color, dash) in zip(along.items(), styles, strict=True):
    gained[name] = [before - loss_after(D, t) for t in sizes]
    ax.semilogx(sizes, gained[name], dash, color=color, markersize=4, label=name)
    best = max(gained[name])
    t = sizes[gained[name].index(best)]
    print(f"{name:15} lowers the loss by {best:.4f} at best, at t = {t:.3f}")
top = max(map(max, gained.values()))
ax.axhline(0, color="black", linewidth=0.8)
ax.set(
    xlabel="t: spectral norm of every matrix's step (log)",
    ylabel="decrease of the loss, nats per byte",
)
ax.set_ylim(-0.5 * top, 1.2 * top)
ax.legend()
plt.show()
# At the smallest t the loss falls fastest along U V^T, as the first order says.
assert gained["U V^T"][0] > max(gained["momentum"][0], gained["AdamW's update"][0])

# %% [markdown]
# One step on one network proves little, and this is not yet a training: notebook 4 does those. But
# it shows what Muon is after. **M**oment**u**m **o**rthogonalized by **N**ewton-Schulz: the next
# notebook is about the second half of the name, how to get $UV^\top$ without a singular value
# decomposition.
#
# ## What to remember
#
# - The momentum of a weight matrix has a few large singular values and many small ones.
# - The spectral norm of a step bounds what it does to any input; of all steps with the same
#   spectral norm, $UV^\top$ lowers the loss most to first order.
# - AdamW evens out entries, not directions.
#
# ## Exercises
#
# 1. Show that $\langle M, D \rangle \le \sum_i \sigma_i$ for every $D$ with $\|D\|_2 \le 1$.
# 2. What is the best step if the *Frobenius* norm is bounded instead? Which optimizer is that?
#
# <details><summary>Answers</summary>
#
# 1. $\langle M, D\rangle = \sum_i \sigma_i\, u_i^\top D v_i$, and $|u^\top D v| \le \|D\|_2 \le 1$
#    for unit vectors. With $D = UV^\top$ every term is $\sigma_i$.
# 2. $D = M / \|M\|_F$ (Cauchy-Schwarz): the momentum itself, normalized. That is SGD with a
#    normalized step. Bounding the largest *entry* instead gives $\operatorname{sign}(M)$: sign
#    descent, which is what Adam is close to when its two averages agree.
#
# </details>
