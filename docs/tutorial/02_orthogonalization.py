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
# # 2. Orthogonalization
#
# **Result.** Five iterations, of matrix products alone, bring every singular value between 0.001
# and 1 into a band around one: 0.47 to 1.20 with Keller Jordan's coefficients (left, and the first
# of the four on the right). No singular value decomposition is needed, and no more exactness
# either.
#
# Muon replaces the momentum $M = U S V^\top$ by $U V^\top$: the same directions, every singular
# value one. Here is how that is done with matrix products alone, how exact it has to be, and what
# it costs.

# %% tags=["hide-input"]
import importlib.util
import os
import subprocess
import sys
import time

REPOSITORY = ""  # the address in pyproject.toml: docs/notebooks.py writes it into the .ipynb
if importlib.util.find_spec("muonkit") is None and REPOSITORY:  # on Colab, say
    wanted = f"muonkit[tutorial] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    importlib.invalidate_caches()
try:
    import matplotlib.pyplot as plt
    import torch

    from muonkit import orthogonalize
    from muonkit.newton_schulz.coefficients import SCHEDULES, resolve
    from muonkit.newton_schulz.forms import choose_form, product_flops
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None

QUICK = os.environ.get("MUONKIT_TUTORIAL") == "quick"  # the short form, for automatic checks

# %% [markdown]
# ## The exact answer
#
# $UV^\top$ is the *orthogonal factor* of $M$, from its polar decomposition. Of all matrices $Q$
# with orthonormal rows (or columns, if $M$ is tall), it is the closest to $M$. With a singular
# value decomposition it is two lines.


# %%
def exact(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


torch.manual_seed(0)
M = torch.randn(48, 128)
Q = exact(M)
assert torch.allclose(Q @ Q.T, torch.eye(48), atol=1e-5)  # rounding of float32
others = [exact(torch.randn(48, 128)) for _ in range(100)]
others += [exact(M + 0.3 * torch.randn_like(M)) for _ in range(100)]
print(f"distance of M to U V^T: {(M - Q).norm():.2f}")
print(f"to 200 others with orthonormal rows: {min((M - R).norm() for R in others):.2f} and more")
assert all((M - R).norm() > (M - Q).norm() for R in others)

# %% [markdown]
# But a decomposition is slow, on GPUs above all, and wants 32 bits. Matrix products are what the
# hardware is built for.
#
# ## Newton-Schulz: a polynomial of a matrix
#
# Take an **odd** polynomial $p(x) = a x + b x^3 + c x^5$ and apply it to a matrix like this:
#
# $$p(X) = a X + b\,(XX^\top) X + c\,(XX^\top)^2 X.$$
#
# Put $X = U S V^\top$ in. The inner $U^\top U$ and $V^\top V$ cancel, and what is left is
#
# $$p(X) = U\, p(S)\, V^\top:$$
#
# the directions stay, and every singular value goes through the scalar polynomial. So: divide $M$
# by its norm, so that all singular values are in $[0, 1]$, and apply polynomials that push
# everything in $(0, 1]$ towards 1. Keller Jordan's choice is one polynomial, five times.


# %%
def newton_schulz(M, a=3.4445, b=-4.7750, c=2.0315, steps=5):
    X = M / M.norm()  # the Frobenius norm is at least the largest singular value
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


s = torch.linalg.svdvals(M / M.norm())
for _ in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5  # the same on the singular values alone
O = newton_schulz(M)
error = (torch.linalg.svdvals(O) - s.sort(descending=True).values).abs().max().item()
print(f"matrix iteration against the scalar one: {error:.0e}")
assert error < 1e-4  # float32
deviation = (O - orthogonalize(M, ns_dtype="float32")).abs().max().item()
print(f"these five lines against muonkit.orthogonalize: {deviation:.0e}")
assert deviation < 1e-5
print(f"singular values of the result: {s.min():.2f} to {s.max():.2f}")

# %% [markdown]
# ## Drawn
#
# Left: Keller's polynomial after one to five iterations. It rises steeply at zero (the slope is
# $3.4445^k$), and wobbles around one without ever settling: the price of the steep rise. Right:
# other schedules after their last iteration. They use a different polynomial each time, the first
# ones steep, the last ones gentle.


# %% tags=["hide-input", "result"]
def schedule_map(name, x, steps=None):
    """Where a singular value x in [0, 1] of the normalized matrix lands."""
    iterations = resolve(name)
    y = x / iterations.margin
    for a, b, c in iterations.triples[:steps]:
        y = a * y + b * y**3 + c * y**5
    return y


x = torch.linspace(0, 1, 4001, dtype=torch.float64)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for k, color in zip(
    range(1, 6), plt.get_cmap("viridis_r")(torch.linspace(0.15, 0.85, 5)), strict=True
):
    left.plot(x, schedule_map("keller", x, k), color=color, linewidth=1.2, label=f"{k}")
left.legend(title="iterations")
left.set(title="keller", xlabel="singular value before (of M / its norm)", ylabel="after")
shown = {
    "keller": ("#8C6BB1", "-"),
    "you": ("#1B9E9E", "--"),
    "polar_express_1.01": ("#A6761D", "-."),
    "cubic5": ("#808080", ":"),
}
small = torch.logspace(-4, 0, 2001, dtype=torch.float64)
for name, (color, dash) in shown.items():
    right.semilogx(small, schedule_map(name, small), dash, color=color, linewidth=1.4, label=name)
right.axhline(1, color="black", linewidth=0.6)
right.legend()
right.set(title="five iterations of four schedules", xlabel="singular value before (log)")
plt.show()

# %% [markdown]
# Each schedule declares the band in which singular values of $[10^{-3}, 1]$ land. Here they are,
# checked. Values below $10^{-3}$ come out smaller: near zero an iteration can only multiply by its
# slope.

# %% tags=["hide-input"]
x = torch.logspace(-3, 0, 200_001, dtype=torch.float64)
print("schedule            steps  lands in        slope at 0  for 16 bits  source")
for name, schedule in SCHEDULES.items():
    y = schedule_map(name, x)
    low, high = y.min().item(), y.max().item()
    assert abs(low - schedule.band[0]) < 2e-3
    assert abs(high - schedule.band[1]) < 2e-3
    slope = torch.tensor([t[0] for t in resolve(name).triples]).prod().item()
    steps = len(resolve(name).triples)
    safe = "no" if schedule.strict else "yes"
    print(
        f"{name:19} {steps:5}  {low:.3f} to {high:.3f} {slope:9.0f}  {safe:>11}  {schedule.source}"
    )

# %% [markdown]
# Which one? For training it matters little: an error of 0.3 in the singular values is harmless in
# every published comparison, and notebook 4 lets you try. What hurts is a singular value far
# *above* one, a NaN, or a silent zero. The schedules marked "no" have no safety factor: each
# polynomial explodes just above the interval that the one before maps to, and the rounding of 16
# bits goes there.
#
# ## What it costs
#
# For $m \times n$ with $m \le n$, one iteration is three products: $XX^\top$ ($m^2 n$
# multiply-adds), $A^2$ ($m^3$) and one onto $X$ ($m^2 n$). Five iterations with $\alpha = n/m$:
# $(10\alpha + 5)\, m^3$ multiply-adds, twice as many FLOPs. Always put the short side first: $A$
# should be the small one.
#
# Two savings. $A$ and $A^2$ are **symmetric**: computing one triangle halves them. And the **Gram
# form** never touches the wide $X$ inside the loop: all the factors are polynomials of the one
# m × m matrix $R = XX^\top$, so they commute, and it is enough to keep track of the product $Q$ of
# the factors:
#
# $$P_k = aI + bR_k + cR_k^2, \qquad Q \leftarrow P_k Q, \qquad R_{k+1} = P_k R_k P_k,
#   \qquad \text{at the end } X \leftarrow Q X.$$


# %%
def gram_newton_schulz(M, triples, restarts=()):
    X = M / M.norm()
    identity = torch.eye(len(M), dtype=M.dtype)
    R, Q = X @ X.T, identity
    for k, (a, b, c) in enumerate(triples):
        if k in restarts:
            X = Q @ X
            R, Q = X @ X.T, identity
        P = a * identity + b * R + c * R @ R
        Q = P @ Q
        R = P @ R @ P
    return Q @ X


keller = resolve("keller").triples
wide = torch.randn(64, 512, dtype=torch.float64)
difference = gram_newton_schulz(wide, keller) - orthogonalize(wide, ns_form="standard")
print(f"Gram form against the standard form, float64: {difference.abs().max().item():.0e}")
assert difference.abs().max() < 1e-10

print("\nGFLOP of five iterations for one matrix (symmetric products at half cost)")
print("shape          standard  gram, one restart  'auto' takes")
for m, n in ((768, 768), (768, 2304), (768, 3072)):
    standard = product_flops(m, n, keller, (1, 2, 3, 4), float("inf")) / 1e9
    gram = product_flops(m, n, keller, (2,), float("inf")) / 1e9
    form = choose_form("auto", m, n, keller, 4, 8).form
    print(f"{m:4} x {n:<5} {standard:12.1f} {gram:18.1f}  {form}")
    alpha = n / m
    assert abs(standard - 2 * (7.5 * alpha + 2.5) * m**3 / 1e9) < 1e-6
    assert abs(gram - 2 * (3 * alpha + 7) * m**3 / 1e9) < 1e-6


# %% tags=["hide-input"]
def seconds(f, times=3):
    f()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return min(taken)


G = torch.randn(256, 1024) if QUICK else torch.randn(768, 3072)
rows, cols = G.shape
print(f"on this machine, one {rows} x {cols} matrix in float32, {torch.get_num_threads()} threads:")
for name, run in {
    "SVD": lambda: exact(G),
    "the five lines above": lambda: newton_schulz(G),
    "muonkit.orthogonalize": lambda: orthogonalize(G, ns_dtype="float32"),
}.items():
    print(f"  {name:22} {1e3 * seconds(run):8.1f} ms")

# %% [markdown]
# In a training this is small beside forward and backward as long as the batch is large: they cost
# about $6 m n$ FLOPs per token and matrix, the orthogonalization about $20\, m^2 n$ per *step*.
# The ratio is near $3m$ / (tokens per step): for $m = 768$ and half a million tokens, half a
# percent. On the small models of a laptop it is not small at all, and notebook 4 prints it.
#
# ## Rounding
#
# On GPUs the products are in bfloat16: 8 significant bits. Newton-Schulz stands that, and not by
# accident: the standard form starts every iteration from $X$ itself, so an error is a slightly
# wrong $X$, and the next polynomial pushes *its* singular values towards one. The Gram form does
# not look at $X$ again, and rounding errors in $R$ where it should be zero (a rank-deficient $M$:
# a small batch, an expert nobody used) are multiplied by $a^2$ in each iteration.

# %% tags=["hide-input"]
full = torch.randn(48, 96)
half = torch.randn(48, 24) @ torch.randn(24, 96)  # rank 24 of 48
power = exact(torch.randn(48, 48)) * (1.0 / torch.arange(1, 49)) @ exact(torch.randn(48, 96))
safe = resolve("polar_express_1.05").triples


def relative(O, reference):
    return ((O.double() - reference).norm() / reference.norm()).item()


print("relative error against float64, schedule polar_express_1.05")
print("dtype     spectrum            standard  gram, naive  gram, with muonkit's restarts")
naive_errors = {}
for dtype in (torch.float32, torch.bfloat16):
    for label, G in {"full rank": full, "power law 1/k": power, "rank 24 of 48": half}.items():
        how = {"ns_coefficients": "polar_express_1.05", "ns_dtype": dtype}
        reference = orthogonalize(G.double(), ns_coefficients="polar_express_1.05")
        standard = relative(orthogonalize(G, ns_form="standard", **how), reference)
        restarted = relative(orthogonalize(G, ns_form="gram", **how), reference)
        naive = relative(gram_newton_schulz((G / G.norm()).to(dtype), safe), reference)
        naive_errors[dtype, label] = naive
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} {label:18} {standard:9.1e} {naive:12.1e} {restarted:12.1e}")
        assert (
            restarted < 3 * standard + 5e-4
        )  # muonkit.newton_schulz.forms: 5e-4 in float32, twice in 16 bits
assert not naive_errors[torch.bfloat16, "rank 24 of 48"] < 1  # useless, or not even finite

# %% [markdown]
# The remedy is a **restart**: multiply $Q$ onto $X$ and take $R = XX^\top$ anew. In float32 one
# restart in five iterations is enough; in 16 bits nearly every iteration needs one, and little is
# saved. muonkit counts the FLOPs of both forms for every shape and takes the cheaper one that is
# safe.
#
# ## What to remember
#
# - An odd polynomial of a matrix, $aX + b(XX^\top)X + c(XX^\top)^2X$, acts on its singular values
#   and leaves the directions alone.
# - Divide by the Frobenius norm, then five steps with $(3.4445, -4.7750, 2.0315)$: singular values
#   from $10^{-3}$ up land between 0.47 and 1.20. That is exact enough.
# - The short side first. Three products per iteration, or the Gram form for wide matrices.
# - The standard form repairs its own rounding; the Gram form needs restarts.
#
# ## Exercises
#
# 1. The classical Newton-Schulz iteration is $(1.5, -0.5, 0)$: it converges to exactly one. How
#    many iterations does it need to bring $\sigma = 10^{-3}$ above 0.5? How many does Keller's?
# 2. Dividing by the largest singular value would put the spectrum higher in $[0, 1]$ than the
#    Frobenius norm does. Why is it not done?
#
# <details><summary>Answers</summary>
#
# 1. Near zero the classical one multiplies by 1.5: it takes 16 iterations (the next cell counts).
#    Keller's multiplies by 3.4445 and takes 6; after its five, $10^{-3}$ has become 0.47.
# 2. The largest singular value is itself the result of an iteration (power iteration), more
#    expensive than a sum of squares, and an estimate that is too low puts singular values above
#    one, where these polynomials grow without bound. The Frobenius norm is never too low. It is
#    too high by a factor of $\sqrt{\text{stable rank}}$, which notebook 1 found to be small.
#
# </details>


# %% tags=["hide-input"]
def iterations_until(a, b, c, x=1e-3):
    count = 0
    while x < 0.5:
        x, count = a * x + b * x**3 + c * x**5, count + 1
    return count


print(f"Keller's five bring 0.001 to {schedule_map('keller', 1e-3):.2f}")
print("classical:", iterations_until(1.5, -0.5, 0), " Keller's:", iterations_until(*keller[0]))
assert (iterations_until(1.5, -0.5, 0), iterations_until(*keller[0])) == (16, 6)
