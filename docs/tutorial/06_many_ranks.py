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
# # 6. Many ranks on a laptop
#
# **Result.** Four ranks train in four layouts, and end with the weights of one process: to the
# rounding of float32 sums, and with all ranks equal bit for bit.
#
# Large models lie on many devices, cut in pieces. Newton-Schulz needs *whole* matrices. This
# notebook starts four ranks on your CPU and shows, for four layouts, what each rank holds, who
# computes what, and what is sent. Nothing is simulated: the ranks train, and end with the weights
# of one process.

# %% tags=["hide-input"]
import importlib.util
import inspect
import subprocess
import sys

REPOSITORY = ""  # the address in pyproject.toml: docs/notebooks.py writes it into the .ipynb
if importlib.util.find_spec("muonkit") is None and REPOSITORY:  # on Colab, say
    wanted = f"muonkit[tutorial] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    # What the ranks run lies beside the notebook, in the repository.
    subprocess.run(["git", "clone", "-q", "--depth", "1", REPOSITORY, "repository"], check=True)
    sys.path.insert(0, "repository/docs/tutorial")
    importlib.invalidate_caches()
try:
    import matplotlib.pyplot as plt
    import torch
    from matplotlib.patches import Rectangle

    import muonkit
except ModuleNotFoundError as missing:
    remedy = 'in a checkout of muonkit, pip install ".[tutorial]"'
    raise SystemExit(f"{missing}: {remedy}") from None
try:
    import ranks
except ModuleNotFoundError:
    raise SystemExit("this notebook needs ranks.py beside it: copy it from docs/tutorial") from None

# %% [markdown]
# ## The ranks
#
# What the ranks run is in `ranks.py` beside this notebook: a started process imports its code by
# name, and cannot see into cells. They talk over **gloo**, torch's back end for CPUs, and are
# started by `torch.multiprocessing` with the method `forkserver` (each is a fork of a process that
# has imported torch once and has no threads; plain `fork` of a notebook, with its threads, may
# hang).
#
# The model has two blocks `x + down(gelu(up(x)))`, an embedding and a head. Muon's four matrices
# are `up` (128 × 32) and `down` (32 × 128) of each block. These are the layouts, whole:

# %%
for layout in ranks.LAYOUTS.values():
    print(inspect.getsource(layout))

# %% [markdown]
# The optimizer's line says nothing about FSDP2 or tensor parallelism: DTensors carry their layout
# themselves. `process_group` is for plain tensors that have copies on other ranks, `zero=1` shares
# the state out.
#
# Run three steps in each layout on four ranks, and in this process alone.

# %% tags=["hide-input", "result"]
N = 4
seen = ranks.run(N, ranks.LAYOUTS)
alone = ranks.train(None)

for name, of in seen.items():
    largest = max(w.abs().max() for w in alone.weights.values())
    off = max((of[0].weights[n] - w).abs().max() / largest for n, w in alone.weights.items())
    equal = all(torch.equal(r.weights[n], w) for r in of for n, w in of[0].weights.items())
    print(f"{name:16} against one process: {off:.0e}; all ranks equal, bit for bit: {equal}")
    assert off < 1e-5  # float32: the gradients' sums are taken in another order
    assert equal

# %% [markdown]
# ## One idea for all layouts
#
# Each rank stores a rectangle of a parameter (the plan's `param_placement`) and one of its momentum
# (`state_placement`), and every matrix is computed whole, by one **owner**. A layout is these
# three, and the step is the same in all:
#
# 1. momentum, elementwise, where it is stored;
# 2. one exchange: the rectangles of every matrix go to its owner;
# 3. the owner orthogonalizes the whole matrix;
# 4. one exchange: the result goes to every rank that stores some of the parameter;
# 5. decay and update, elementwise, where the parameter is stored.
#
# `optimizer.plan()` has all of it before the first step. Here are the rectangles of `up` (128
# rows, 32 columns) and `down` (32 rows, 128 columns) of the first block; a number is the rank that
# has it.

# %% tags=["hide-input"]
COLORS = ("#7A5AA6", "#14807F", "#8F6414", "#A0456B")  # one for each rank
WHITE, BLACK = "#fffffe", "#000001"  # the site's dark pages turn other greys round


def muon_plan(of):
    """The part of a plan that is about Muon's matrices."""
    (plan,) = [p for p in of[0].plan.plans if p.inward and p.tensors]
    return plan


def rectangles(ax, shape, boxes):
    """Draw who has which rows and columns; boxes are ((row, row end), (col, col end)) by rank."""
    holders = {}
    for rank, box in boxes.items():
        holders.setdefault(box, []).append(rank)
    for ((r0, r1), (c0, c1)), who in holders.items():
        color = COLORS[who[0]] if len(who) == 1 else "lightgrey"
        ax.add_patch(
            Rectangle((c0, r0), c1 - c0, r1 - r0, facecolor=color, edgecolor="white", lw=2)
        )
        text = dict(ha="center", va="center", color=WHITE if len(who) == 1 else "black")
        ax.text((c0 + c1) / 2, (r0 + r1) / 2, ",".join(map(str, who)), fontsize=9, **text)
    ax.set(xlim=(0, shape[1]), ylim=(shape[0], 0), xticks=(0, shape[1]), yticks=(0, shape[0]))
    ax.tick_params(labelsize=7)


def draw(parameter):
    """One row a layout: where the parameter and its momentum are, and who computes it."""
    fig, axes = plt.subplots(len(seen), 3, figsize=(6.6, 7.2), layout="constrained")
    for (name, of), row in zip(seen.items(), axes, strict=True):
        plan = muon_plan(of)
        number, tensor = next((i, t) for i, t in enumerate(plan.tensors) if t.name == parameter)
        stored = {rank: tensor.param_placement.box(tensor.shape, rank) for rank in range(N)}
        momentum = {rank: tensor.state_placement.box(tensor.shape, rank) for rank in range(N)}
        owner = {
            rank: plan.matrices[matrix].box
            for matrix, owners in plan.assignments()
            for rank in owners
            if plan.matrices[matrix].tensor == number
        }
        for ax, boxes in zip(row, (stored, momentum, owner), strict=True):
            rectangles(ax, tensor.shape, boxes)
        row[0].set_ylabel(f"{name}\nrow", fontsize=9)
        # What is drawn is what the ranks really had.
        for rank in range(N):
            for boxes, had in ((stored, of[rank].stored), (momentum, of[rank].state)):
                assert tuple(end - start for start, end in boxes[rank]) == had[parameter]
    for ax, title in zip(axes[0], ("parameter", "momentum", "computed by"), strict=True):
        ax.set_title(title, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("column", fontsize=8)
    fig.suptitle(f"{parameter}: which rank has what")
    plt.show()


draw("1.up.weight")
draw("1.down.weight")

# %% [markdown]
# Read the last row of the second picture: under data × tensor parallelism ranks 0 and 2 both store
# the left half of `down`'s columns, 1 and 3 the right half; with ZeRO-1 each of the four has a
# quarter of the momentum; and rank 1 computes it. Which cut is along which mesh axis does not
# matter for the step: a rectangle is a rectangle.
#
# Here is the whole step of one rank, from the plan: a part is [rows, columns].


# %% tags=["hide-input"]
def part(box):
    return "[" + ", ".join(f"{start}:{end}" for start, end in box) + "]"


def narrate(name, rank):
    plan = muon_plan(seen[name])

    def of(transfers):
        """Transfers to or from others, in words."""
        named = [(plan.tensors[plan.matrices[t.matrix].tensor].name, t) for t in transfers]
        return [f"{n} {part(t.box)}, rank {t.position}" for n, t in named if t.position != rank]

    (bucket,) = plan.buckets  # larger models have several, one under way while another is computed
    there, back = plan.inbound(bucket, rank), plan.outbound(bucket, rank)
    own = [plan.tensors[plan.matrices[i].tensor] for i, owners in bucket if rank in owners]
    momenta = [f"{t.name} {part(t.state_placement.box(t.shape, rank))}" for t in plan.tensors]
    parameters = [f"{t.name} {part(t.param_placement.box(t.shape, rank))}" for t in plan.tensors]
    for title, lines in {
        "1. momentum of": momenta,
        "2. momentum out, to": of(there.sends),
        "   momentum in, from": of(there.recvs),
        "3. orthogonalizes": [f"{t.name} {t.shape[0]} x {t.shape[1]}, whole" for t in own],
        "4. results out, to": of(back.sends),
        "   results in, from": of(back.recvs),
        "5. updates": parameters,
    }.items():
        print(f"{title:22}" + "; ".join(lines or ["nothing"]))


print("rank 0 of DP x TP with ZeRO-1\n")
narrate("DP x TP, ZeRO-1", 0)

# %% [markdown]
# ## What is sent
#
# `plan().messages(rank)` says how many bytes a rank sends to which other: to the owners, back to
# the parameters, and what AdamW's part shares with ZeRO-1.

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, len(seen), figsize=(11, 3.1), layout="constrained")
tables = {}
for name, of in seen.items():
    table = torch.zeros(N, N)
    for rank in range(N):
        for to_rank in of[rank].plan.messages(rank).values():
            for to, size in to_rank.items():
                table[rank, to] += size / 1024
    tables[name] = table
top = max(t.max().item() for t in tables.values())
for ax, (name, table) in zip(axes, tables.items(), strict=True):
    image = ax.imshow(table, cmap="viridis", vmin=0, vmax=top)
    for i in range(N):
        for j in range(N):
            dark = table[i, j] < top / 2
            text = f"{table[i, j]:.0f}" if table[i, j] else ""
            ax.text(j, i, text, ha="center", va="center", color=WHITE if dark else BLACK)
    ax.set(title=name, xlabel="to rank", xticks=range(N), yticks=range(N))
axes[0].set_ylabel("from rank")
fig.colorbar(image, ax=axes, label="KiB per step", shrink=0.8)
plt.show()
for name, of in seen.items():
    sent = {way: sum(to.values()) for way, to in of[0].plan.messages(0).items()}
    print(f"{name:16} rank 0 sends {sent}, counted in the run: {of[0].sent} bytes")
    for rank in range(N):
        planned = sum(sum(to.values()) for to in of[rank].plan.messages(rank).values())
        assert planned == of[rank].sent, "bytes planned are bytes sent, exactly"

# %% [markdown]
# The owners' loads are balanced by FLOPs, the longest first, each matrix to the least loaded rank
# that has a part of it. With $S$ elements in Muon's matrices, $N$ ranks and $b$ bytes each, the
# sums are simple where shapes divide evenly:
#
# | | to the owners | to the parameters |
# |---|---|---|
# | DDP | 0 | $\frac{N-1}{N} S b$ |
# | DDP, ZeRO-1 | $\frac{N-1}{N^2} S b$ | $\frac{N-1}{N} S b$ |
# | FSDP2, TP, FSDP2 × TP | $\frac{N-1}{N^2} S b$ | $\frac{N-1}{N^2} S b$ |
# | DP × TP with ZeRO-1, $M$ shards | $\frac{N-1}{N^2} S b$ | $\frac{N-1}{M N} S b$ |
#
# (The gradients' own all-reduce under DDP is $2\frac{N-1}{N} S b$, for comparison.)

# %% tags=["hide-input"]
S, b, M = sum(p.numel() for n, p in alone.weights.items() if ".up." in n or ".down." in n), 4, 2
piece, copy = (N - 1) / N**2 * S * b, (N - 1) / N * S * b
formulas = {
    "DDP": (0, copy),
    "DDP, ZeRO-1": (piece, copy),
    "FSDP2": (piece, piece),
    "DP x TP, ZeRO-1": (piece, (N - 1) / (M * N) * S * b),
}
print(f"S = {S} elements; bytes of rank 0, planned and by the formula")
for name, expected in formulas.items():
    messages = seen[name][0].plan.messages(0)
    planned = [sum(messages[way].values()) for way in ("to_owners", "to_params")]
    print(f"{name:16} {planned} {[int(x) for x in expected]}")
    assert planned == list(expected)
    traffic = seen[name][0].plan.traffic()
    print(
        f"{'':16} matrices of each rank: {traffic.matrices}, largest load over mean: "
        f"{traffic.balance:.2f}"
    )

# %% [markdown]
# ## Why not orthogonalize the pieces?
#
# It would need no exchange at all. But a piece's orthogonal factor is not a piece of the whole's:
# the result depends on how many ranks there are, and its singular values are no longer near one.

# %%
torch.manual_seed(0)
M_whole = torch.randn(32, 8) @ torch.randn(8, 128) + 0.1 * torch.randn(32, 128)
exact = {"ns_coefficients": "svd"}
whole = muonkit.orthogonalize(M_whole, **exact)
print("ranks  largest singular value  distance from the whole's factor, relative")
for count in (1, 2, 4, 8):
    shards = torch.cat([muonkit.orthogonalize(c, **exact) for c in M_whole.chunk(count)])
    top = torch.linalg.matrix_norm(shards, ord=2).item()
    off = ((shards - whole).norm() / whole.norm()).item()
    print(f"{count:5} {top:23.2f} {off:29.2f}")
    assert (off < 1e-5) if count == 1 else (top > 1.1 and off > 0.1)

# %% [markdown]
# ## On ranks that you have not got
#
# The plan is arithmetic without tensors, so the same code tells what a step would cost on thousands
# of ranks: `muonkit plan --model kimi-k2 --mesh fsdp=64,ep=8` on the command line (docs/plan.md).
#
# ## What to remember
#
# - Three placements: of a parameter, of its momentum, and who computes each matrix.
# - One exchange to the owners, one back, whatever the layout; each matrix is computed once.
# - Never orthogonalize a shard.
# - `optimizer.plan()` says who sends how much to whom, before the first step.
#
# ## Exercises
#
# 1. ZeRO-1 sends more than DDP with owners. What is it for?
# 2. Experts sharded on dim 0 (each rank has whole experts): what is exchanged?
#
# <details><summary>Answers</summary>
#
# 1. Memory: each rank keeps a quarter of the state (the pictures' second column). It pays with the
#    first exchange, $\frac{N-1}{N^2} S b$, which is small beside the gradients' all-reduce.
# 2. Nothing. Every matrix is whole on its rank already, and the step is that of one device.
#
# </details>
