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
# # 8. Lessons
#
# **Result.** None of the bugs on this page raises an error: the loss goes down, a little less than
# it should. The first of them in numbers, a gradient that is very small or very large:
#
# Muon is forty lines, and many of its implementations have shipped with a bug. Each cell shows
# one, and how muonkit's tests look for it. Some are bugs of releases of others, which may have
# been mended since: those cells print what the release that you have does.

# %% tags=["hide-input"]
import importlib.util
import subprocess
import sys

REPOSITORY = ""  # the address in pyproject.toml: docs/notebooks.py writes it into the .ipynb
if importlib.util.find_spec("muonkit") is None and REPOSITORY:  # on Colab, say
    wanted = f"muonkit[tutorial] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    importlib.invalidate_caches()
try:
    import matplotlib.pyplot as plt
    import torch
    from torch import nn

    from muonkit import Muon, orthogonalize
    from muonkit.newton_schulz.coefficients import resolve
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None
print("torch", torch.__version__)


def one_step(kind, gradient, **options):
    """The parameter after one step from zero along a gradient, and the optimizer."""
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    optimizer = kind([p], lr=1.0, weight_decay=0.0, **options)
    optimizer.step()
    return p.detach(), optimizer.state[p]


# %% [markdown]
# ## Numbers
#
# **eps swamps the norm.** A guard against division by zero, `norm.clamp(min=1e-7)`, is fine until
# the gradient's norm *is* that small. Then the singular values start far below $10^{-3}$ and never
# arrive. At the other end the squares overflow, and the update is zero. Neither says anything.

# %% tags=["result"]
torch.manual_seed(0)
G = torch.randn(64, 64)
print("norm of the update of a 64 x 64 gradient (8 if it were exactly orthogonal)")
print("gradient times   torch.optim.Muon   muonkit.Muon")
for factor in (1e-12, 1.0, 1e19):
    theirs, ours = (one_step(k, G * factor)[0].norm().item() for k in (torch.optim.Muon, Muon))
    print(f"{factor:14.0e} {theirs:18.3f} {ours:14.3f}")
    assert 6 < ours < 9, "the scale of a gradient does not matter"

# %% [markdown]
# *The remedy:* divide by the largest magnitude first, then by the norm. The largest entry is then
# one, nothing overflows or vanishes, and eps has nothing to do. *The test:* $f(\alpha G) = f(G)$
# for $\alpha$ from $10^{-30}$ to $10^{30}$.
#
# **The momentum is overwritten.** In torch 2.13 `grad.bfloat16()` makes a copy, unless it already
# *is* bfloat16. With a bfloat16 gradient and `nesterov=False` it is the momentum itself, and the
# in-place normalization that follows destroys it.

# %%
G16 = torch.randn(8, 16).bfloat16()
for name, kind in (("torch.optim.Muon", torch.optim.Muon), ("muonkit.Muon", Muon)):
    _, state = one_step(kind, G16, nesterov=False)
    M = state["momentum_buffer"].float()
    wanted = 0.05 * G16.float()
    print(f"{name:17} momentum {M.norm():.3f} after one step, should be {wanted.norm():.3f}")
    if kind is Muon:
        assert (M - wanted).norm() < 0.01 * wanted.norm()  # bfloat16 rounds to 4e-3

# %% [markdown]
# *The test:* momentum after a step against the formula, for every dtype and both values of
# `nesterov`; and the gradient is bit for bit what it was.
#
# **Polar Express, cut short.** The polynomials of a schedule are composed: each is made for the
# interval that the one before leaves. Leave out the last, "to save 20%", and singular values of
# 1.5 come out.

# %% tags=["hide-input"]
x = torch.logspace(-3, 0, 2001, dtype=torch.float64)
y, maps = x, []
for a, b, c in resolve("polar_express").triples:
    y = a * y + b * y**3 + c * y**5
    maps.append(y)
plt.figure(figsize=(6.5, 3.4), layout="constrained")
plt.semilogx(x, maps[4], color="#8C6BB1", label="five of five")
plt.semilogx(x, maps[3], "--", color="#1B9E9E", label="four of five")
plt.xlabel("singular value before (log)")
plt.ylabel("after")
plt.legend()
plt.show()
print(f"largest with five: {maps[4].max():.2f}, with four: {maps[3].max():.2f}")
assert maps[4].max() < 1.13
assert maps[3].max() > 1.5
try:
    orthogonalize(G, ns_coefficients="polar_express", ns_steps=4)
    raise AssertionError("has to be refused")
except ValueError as error:
    print("muonkit:", error)

# %% [markdown]
# **Decay that rounds.** $W \leftarrow (1 - \eta\lambda) W$ with $\eta\lambda = 0.002$ and bfloat16
# weights: `torch._foreach_mul_` rounds the factor to the weights' dtype first. Between 0.99609 and
# 1 there is no bfloat16 number, so the factor is twice as far from 1 as it should be, or 1.

# %%
for decay in (0.002, 0.001):
    factor = torch.tensor(1 - decay, dtype=torch.bfloat16).item()
    print(f"1 - {decay} in bfloat16: {factor:.5f}, a decay of {1 - factor:.4f}")
    assert not 0.5 * decay < 1 - factor < 1.5 * decay
    W = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    product, added = W.clone(), W.clone()
    torch._foreach_mul_([product], 1 - decay)
    torch._foreach_add_([added], [added], alpha=-decay)
    for how, decayed in (("multiplied", product), ("added", added)):
        left = ((decayed.float() * W.float()).sum() / W.float().square().sum()).item()
        print(f"  weights {how}: a decay of {1 - left:.4f}")

# %% [markdown]
# muonkit adds instead, `p += -lr * decay * p`: the small factor keeps its digits (muonkit's
# docs/decisions.md: "decay is added, not multiplied"). But the sum is rounded to bfloat16 too, and
# a change of less than half the distance to the next number is lost: most of a decay of 0.002, all
# of one of 0.001. *The remedy:* keep the weights in float32, and compute in 16 bits by autocast or
# FSDP2's mixed precision.
#
# ## Shapes
#
# **A fused QKV as one matrix.** The norm and the singular values are then shared by three maps. If
# the query's gradient is large, key and value are hardly trained (notebook 5 has the numbers).
#
# **A convolution's scale from the wrong dimensions.** A kernel is (out, in, kh, kw). The scale
# $\sqrt{\max(1, \text{rows}/\text{cols})}$ is about out and in·kh·kw; `size(-2)` and `size(-1)` of
# the stored tensor are kernel height and width, and their ratio is one whatever the layer.
#
# **Experts flattened to one matrix.** E experts of m × n as one (E·m) × n matrix: at most n
# directions for all of them together, so that each one's update has about 1/√E of its norm.

# %%
E, m, n = 8, 64, 64
G = torch.randn(E, m, n)
apart = orthogonalize(G)
flattened = orthogonalize(G.flatten(0, 1)).view(E, m, n)
print(
    f"norm of one expert's update: apart {apart[0].norm():.2f}, flattened {flattened[0].norm():.2f}"
)
assert flattened[0].norm() < 0.5 * apart[0].norm()
kernel = torch.randn(256, 16, 3, 3)
right = max(1, kernel.shape[0] / kernel[0].numel()) ** 0.5
wrong = max(1, kernel.size(-2) / kernel.size(-1)) ** 0.5
print(f"scale of a 256 x 16 x 3 x 3 convolution: {right:.2f}, from the kernel's sides {wrong:.2f}")
update = one_step(lambda p, **o: Muon([{"params": p, "view": "flatten"}], **o), kernel)[0]
s = torch.linalg.svdvals(update.flatten(1) / right)
print(f"muonkit's update over the right scale has singular values {s.min():.2f} to {s.max():.2f}")
assert 0.6 < s.min()
assert s.max() < 1.25

# %% [markdown]
# ## Around the step
#
# **Clipping the update.** Gradient clipping in the wrong place: the norm of all *updates* is
# clipped to one. An orthogonal factor of rank r has norm $\sqrt r$ whatever the gradient was, and
# a whole model the root of the sum: the clip acts at every step, and only divides the learning
# rate, by a number that depends on the model's size.

# %%
for layers, width in ((1, 64), (4, 128), (24, 1024)):
    # q, k, v, out, up and down of each layer have rank `width`.
    norm = (6 * layers * width) ** 0.5
    print(
        f"{layers:2} layers of width {width:4}: norm of all updates {norm:5.1f}: "
        f"clipped to 1, the steps are {norm:.0f} times too small"
    )
G = torch.randn(64, 256)
assert abs(orthogonalize(G, ns_coefficients="svd").norm() - 64**0.5) < 1e-3
# Clipping the *gradient* is harmless: the scale drops out.
clipped, whole = (orthogonalize(g, ns_dtype="float32") for g in (G / G.norm(), G))
assert torch.allclose(clipped, whole, atol=1e-5)

# %% [markdown]
# **No gradient is not a zero gradient.** A layer that this batch did not use has `p.grad is None`.
# If that is turned into zeros, decay and the old momentum go on moving it.
#
# **Each rank's shard by itself.** The most tempting shortcut of all: no communication. Two ranks
# with the halves of a matrix whose rows are alike get singular values up to $\sqrt 2$, eight up to
# $\sqrt 8$, and a result that depends on the number of ranks (notebook 6 has the table). The same
# happens with gradients that are not yet summed over ranks: the orthogonal factor of a sum is not
# the sum of the factors.

# %%
one, other = torch.randn(32, 64), torch.randn(32, 64)
whole = orthogonalize(one + other, ns_coefficients="svd")
parts = sum(orthogonalize(g, ns_coefficients="svd") for g in (one, other)) / 2
off = ((whole - parts).norm() / whole.norm()).item()
print(f"mean of two ranks' factors against the factor of the sum: off by {off:.0%}")
assert off > 0.2

row = torch.randn(1, 64)
alike = row + 0.05 * torch.randn(8, 64)
for count in (1, 2, 8):
    shards = torch.cat([orthogonalize(c, ns_coefficients="svd") for c in alike.chunk(count)])
    print(
        f"{count} shards of 8 rows that are alike: largest singular value "
        f"{torch.linalg.matrix_norm(shards, ord=2):.2f}"
    )
assert torch.linalg.matrix_norm(shards, ord=2) > 0.9 * 8**0.5

p, q = (nn.Parameter(torch.ones(4, 8)) for _ in range(2))
p.grad = torch.zeros(4, 8)
Muon([p, q], lr=0.1, weight_decay=0.1).step()
print(
    f"a zero gradient decays the weight to {p[0, 0].item():.2f}, none leaves it at "
    f"{q[0, 0].item():.2f}"
)
assert q.min() == 1
assert p.max() < 1

# %% [markdown]
# ## What we tried, and what failed
#
# From docs/decisions.md, where each has its figures.
#
# - *The Gram form without any restart, in float32* (a quarter fewer FLOPs): error 0.3 on a constant
#   matrix, where the standard form has 1e-4.
# - *An all-gather of the owners' results*: a third more bytes where owners' loads differ.
# - *Ranks compare what they are about to do at the first step only*: a layer that one rank does
#   not use in step 100 hangs in step 100. So they compare at every step.
# - *What a param group does not say comes from Keller's defaults*: lr 0.02 and no decay, silently,
#   beside the lr that was passed.
# - *One set of defaults for routed and hand-made splits*: one of the two moves hidden matrices six
#   times too far.
# - *Transposing tall matrices first*: two passes over memory more than computing $X^\top X$ where
#   they lie.
#
# ## What to remember
#
# - Nearly every bug of an optimizer is silent. Test laws, not examples: scale invariance, the
#   transposed, a batch against a loop, the momentum against its formula, many ranks against one.
# - A test that passes with the bug in is no test. Put the bug in once, and look.
# - Shapes: orthogonalize what acts as one linear map, whole, and scale by *its* shape.
#
# ## Exercises
#
# 1. Which of these bugs would you see in the loss curve of your own training?
# 2. `MyMuon` of notebook 3 has one of them. Which? (Try a gradient times $10^{25}$.)
#
# <details><summary>Answers</summary>
#
# 1. Hardly any, unless there is a right implementation to compare with: that is why they shipped.
# 2. The first: it squares the entries to get the norm, in float32. At $10^{25}$ the squares
#    overflow, the norm is infinite and the update zero. The cell below shows it, and the remedy.
#
# </details>


# %%
def normalized(U):
    return U / U.norm().clamp_min(1e-30)


def normalized_safely(U):
    U = U / U.abs().max().clamp_min(torch.finfo(U.dtype).tiny)
    return U / U.norm().clamp_min(torch.finfo(U.dtype).tiny)


huge = 1e25 * torch.randn(16, 32)
for normalize in (normalized, normalized_safely):
    print(f"norm after {normalize.__name__}: {normalize(huge).norm():.2f}")
assert normalized(huge).norm() == 0
assert abs(normalized_safely(huge).norm() - 1) < 1e-5
