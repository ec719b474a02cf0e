"""Random sequences of what happens to an optimizer in other people's programs.

Each sequence makes a small model and a `MuonW` with random options, and then a random row of
events: steps, frozen and unfrozen layers, added groups, replaced, resized, reordered and cast
parameters, saving and loading (of good and of damaged states), copies, schedulers, gradients that
are NaN, sparse or gone, options that are edited. After each event the laws hold:

- an exception is one that the documentation names, raised by muonkit's or torch's optimizer code
  on purpose, not by an operation that met tensors it could not handle;
- what was refused has changed nothing: parameters, state, groups, counters;
- after a step everything that was finite is finite, and no state is kept for parameters that no
  group holds.

`python -m tests.helpers.event_fuzz --sequences 10000` runs many, and names the seed of each
that fails.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR

import muonkit
from muonkit import Muon, MuonW
from tests.helpers.stages import NAMES, stage_options

DOCUMENTED = (ValueError, TypeError, RuntimeError, FloatingPointError)
_SOURCE = str(Path(muonkit.__file__).parent)

# Some models are in bfloat16, which cannot be held to a norm.
_STAGES = [name for name in NAMES if name not in ("hyperball", "radial_brake")]


class Broken(AssertionError):
    """A law that did not hold."""


class Net(nn.Module):
    """Tokens (B,) -> logits; every kind of parameter, small."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.mix = nn.Conv1d(4, 2, 3, padding=1)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10)
        self.to(dtype)


class World:
    """What a sequence acts on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model: nn.Module = Net(
            self.random.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
        )
        if self.random.random() < 0.3:
            self.model.up.requires_grad_(False)
        choose = self.random.choice
        self.optimizer: Muon = MuonW(
            self.model,
            lr=choose([0.01, torch.tensor(0.01)]),
            adamw_lr=0.01,
            **choose([{}, {}, *map(stage_options, _STAGES)]),
            nonfinite=choose(["propagate", "skip", "raise"]),
            momentum_dtype=choose(["auto", "auto", "float32", "bfloat16", "int8"]),
            cautious=choose([False, True]),
            nesterov=choose([False, True]),
            ns_dtype="float32",
            maximize=choose([False, False, True]),
        )
        self.saved: list[bytes] = []
        self.scheduler: Any = None
        self.modules: list[nn.Module] = []  # added later

    # -- helpers ---------------------------------------------------------------------------------

    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def some(self) -> Tensor | None:
        params = self.params()
        return self.random.choice(params) if params else None

    def group(self) -> dict[str, Any] | None:
        groups = self.optimizer.param_groups
        return self.random.choice(groups) if groups else None

    def fill(self, scale: float = 1.0) -> None:
        for p in self.params():
            if p.requires_grad and self.random.random() < 0.9:
                p.grad = (torch.randn(p.shape) * scale).to(p.dtype)


# -- events: each acts, and may raise what is documented -----------------------------------------


def step(world: World) -> None:
    world.fill(world.random.choice([1.0, 1.0, 1e-6, 1e3]))
    world.optimizer.step()


def step_again(world: World) -> None:
    world.optimizer.step()


def step_with_closure(world: World) -> None:
    def closure() -> float:
        world.fill()
        return 1.0

    world.optimizer.step(closure)


def zero_grad(world: World) -> None:
    world.optimizer.zero_grad(set_to_none=world.random.random() < 0.5)


def freeze(world: World) -> None:
    p = world.some()
    if p is not None:
        p.requires_grad_(False)
        p.grad = None


def unfreeze(world: World) -> None:
    for p in world.params():
        p.requires_grad_(True)


def nan_gradient(world: World) -> None:
    world.fill()
    p = world.some()
    if p is not None and p.grad is not None and p.grad.layout == torch.strided:
        p.grad.view(-1)[0] = world.random.choice([float("nan"), float("inf")])
    world.optimizer.step()


def sparse_gradient(world: World) -> None:
    world.fill()
    p = world.some()
    if p is not None and p.grad is not None and p.dtype == torch.float32:
        p.grad = p.grad.to_sparse()
    world.optimizer.step()


def add_module(world: World) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5))
    world.modules.append(module)
    for group in muonkit.route(module).param_groups():
        world.optimizer.add_param_group(group)


def add_group(world: World) -> None:
    shapes = world.random.choice([[(4, 5)], [(3,)], [(2, 3, 4)], [], [(1, 6), (6, 1)]])
    params: list[Any] = [nn.Parameter(torch.randn(s)) for s in shapes]
    if world.random.random() < 0.7:
        params = [(f"added.{i}", p) for i, p in enumerate(params)]
    group: dict[str, Any] = {"params": params}
    group |= world.random.choice(
        [
            {},
            {"algorithm": "muon"},
            {"algorithm": "adamw"},
            {"algorithm": "muon", "view": "experts"},
            {"algorithm": "muon", "lr": -1.0},
            {"algorithm": "sgd"},
            {"use_muon": True},
        ]
    )
    world.optimizer.add_param_group(group)


def add_twice(world: World) -> None:
    p = world.some()
    if p is not None:
        world.optimizer.add_param_group({"params": [p], "algorithm": "adamw"})


def replace_all(world: World) -> None:
    """As frameworks do: in the model, and then in the groups."""
    new: dict[Tensor, Tensor] = {}
    for group in world.optimizer.param_groups:
        for p in group["params"]:
            new.setdefault(p, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        group["params"] = [new[p] for p in group["params"]]


def replace_one(world: World) -> None:
    group = world.group()
    if group is None or not group["params"]:
        return
    index = world.random.randrange(len(group["params"]))
    p = group["params"][index]
    shape = world.random.choice([tuple(p.shape), tuple(p.shape), (3, *p.shape[1:])])
    group["params"][index] = nn.Parameter(torch.randn(shape).to(p.dtype))


def placeholders(world: World) -> None:
    """What Accelerate puts into the groups while it shards the model, and then takes out again."""
    kept = [list(group["params"]) for group in world.optimizer.param_groups]
    for group in world.optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype)
    try:
        if world.random.random() < 0.5:
            world.optimizer.state_dict()
    finally:
        for group, params in zip(world.optimizer.param_groups, kept, strict=True):
            group["params"] = params


def reorder(world: World) -> None:
    group = world.group()
    if group is None or len(group["params"]) < 2:
        return
    order = list(range(len(group["params"])))
    world.random.shuffle(order)
    group["params"] = [group["params"][i] for i in order]
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in order]


def remove(world: World) -> None:
    group = world.group()
    if group is None or not group["params"]:
        return
    group["params"] = group["params"][1:]
    if "param_names" in group and world.random.random() < 0.8:
        group["param_names"] = group["param_names"][1:]


def remove_group(world: World) -> None:
    if len(world.optimizer.param_groups) > 1:
        world.optimizer.param_groups.pop()


def repair_names(world: World) -> None:
    for number, group in enumerate(world.optimizer.param_groups):
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            group["param_names"] = [f"mended.{number}.{i}" for i in range(len(group["params"]))]


def resize(world: World) -> None:
    p = world.some()
    if p is not None and p.ndim:
        p.grad = None
        p.data = torch.cat([p.data, torch.zeros_like(p.data[:1])])


def reset(world: World) -> None:
    if world.random.random() < 0.5:
        world.optimizer.reset_state()
    elif (p := world.some()) is not None:
        world.optimizer.reset_state([p])


def cast(world: World) -> None:
    dtype = world.random.choice([torch.float32, torch.bfloat16, torch.float64])
    for p in world.params():
        p.grad = None
        p.data = p.data.to(dtype)


def foreign_dtype(world: World) -> None:
    p = world.some()
    if p is None:
        return
    values = p.data
    p.grad = None
    dtype = world.random.choice([torch.float8_e4m3fn, torch.complex64])
    p.data = values.to(dtype)
    p.grad = torch.zeros_like(p.data)
    try:
        world.optimizer.step()
    finally:
        p.grad = None
        p.data = values


def save(world: World) -> None:
    buffer = io.BytesIO()
    torch.save(world.optimizer.state_dict(), buffer)
    world.saved.append(buffer.getvalue())


def load(world: World) -> None:
    if world.saved:
        data = io.BytesIO(world.random.choice(world.saved))
        world.optimizer.load_state_dict(torch.load(data, weights_only=True))


def load_damaged(world: World) -> None:
    if not world.saved:
        return
    data = io.BytesIO(world.random.choice(world.saved))
    state = torch.load(data, weights_only=True)
    entries = [entry for entry in state["state"].values() if entry]
    kind = world.random.randrange(8)
    if kind == 0:
        del state["param_groups"]
    elif kind == 1 and entries:
        entry = world.random.choice(entries)
        entry[next(iter(entry))] = torch.zeros(2, 3, 4)
    elif kind == 2 and entries:
        world.random.choice(entries).clear()
    elif kind == 3 and entries:
        entry = world.random.choice(entries)
        entry.pop(next(iter(entry)))
    elif kind == 4:
        state["param_groups"].append(dict(state["param_groups"][0]))
    elif kind == 5:
        state["param_groups"][0]["lr"] = world.random.choice([-1.0, "fast", None])
    elif kind == 6 and entries:
        entry = world.random.choice(entries)
        entry[next(iter(entry))] = world.random.choice([None, "momentum", 3.0])
    elif kind == 7:
        state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    world.optimizer.load_state_dict(state)


def tamper(world: World) -> None:
    p = world.some()
    if p is None or not world.optimizer.state.get(p):
        return
    state = world.optimizer.state[p]
    key = world.random.choice(list(state))
    kept = state[key]
    state[key] = world.random.choice(
        [torch.zeros(2), kept.double(), kept.half(), torch.full(kept.shape, float("nan")), None]
    )
    world.fill()
    try:
        world.optimizer.step()
    except DOCUMENTED:
        world.optimizer.state[p][key] = kept
        raise


def forget(world: World) -> None:
    p = world.some()
    if p is not None:
        world.optimizer.state.pop(p, None)


def deepcopy(world: World) -> None:
    both = (world.model, world.modules, world.optimizer, world.scheduler)
    world.scheduler = None
    world.model, world.modules, world.optimizer, _ = copy.deepcopy((*both[:3], None))


def schedule(world: World) -> None:
    make: list[Callable[[Any], Any]] = [
        lambda o: LambdaLR(o, lambda t: 0.9**t),
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: OneCycleLR(o, max_lr=0.01, total_steps=10**6),
        lambda o: CyclicLR(o, base_lr=0.001, max_lr=0.01),
    ]
    if world.optimizer.param_groups:
        world.scheduler = world.random.choice(make)(world.optimizer)


def scheduled(world: World) -> None:
    groups = world.optimizer.param_groups
    # A group that came after the scheduler, in place of one that went, has not what it looks for.
    known = all("initial_lr" in group for group in groups)
    if world.scheduler is not None and known and len(world.scheduler.base_lrs) == len(groups):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            world.scheduler.step()


EDITS: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": float("nan")},
    {"lr": torch.tensor(0.01)},
    {"weight_decay": 0.0},
    {"weight_decay": None},
    {"maximize": True},
    {"nonfinite": "skip"},
    {"nonfinite": "typo"},
    {"momentum": 0.5},
    {"momentum": 2.0},
    {"variant": "normuon"},
    {"variant": "plain"},
    {"variant": "typo"},
    {"before": "muoneq"},
    {"after": ["muon_plus"]},
    {"constraint": "relative_update"},
    {"constraint": ()},
    {"constraint": "typo"},
    {"momentum_dtype": "bfloat16"},
    {"momentum_dtype": "int8"},
    {"ns_steps": 3},
    {"ns_steps": 0},
    {"ns_coefficients": "svd"},
    {"view": "matrix"},
    {"view": "experts"},
    {"view": "split(rows=2)"},
    {"betas": (0.5, 0.9)},
    {"betas": 0.9},
    {"algorithm": "adamw"},
    {"algorithm": "muon"},
    {"algorithm": "sgd"},
    {"bytes_in_flight": 64},
]


def edit(world: World) -> None:
    """An option of one group, taken back where a step refuses it."""
    group = world.group()
    if group is None:
        return
    change = world.random.choice(EDITS)
    own = {key: group[key] for key in change if key in group}
    new = change.keys() - own.keys()
    group.update(change)
    world.fill()
    try:
        world.optimizer.step()
    except DOCUMENTED:
        group.update(own)
        for key in new:
            group.pop(key, None)
        raise


def look(world: World) -> None:
    world.random.choice(
        [
            world.optimizer.describe,
            world.optimizer.plan,
            world.optimizer.state_dict,
            lambda: repr(world.optimizer),
        ]
    )()


def clip(world: World) -> None:
    world.fill()
    world.optimizer.clip_grad_norm_(1.0)


EVENTS: list[Callable[[World], None]] = [
    *[step] * 6,
    step_again,
    step_with_closure,
    zero_grad,
    freeze,
    unfreeze,
    nan_gradient,
    sparse_gradient,
    add_module,
    add_group,
    add_twice,
    replace_all,
    replace_one,
    placeholders,
    reorder,
    remove,
    remove_group,
    *[repair_names] * 2,
    resize,
    *[reset] * 2,
    cast,
    foreign_dtype,
    *[save] * 2,
    *[load] * 2,
    load_damaged,
    tamper,
    forget,
    deepcopy,
    schedule,
    *[scheduled] * 2,
    *[edit] * 2,
    look,
    clip,
]


# -- laws ----------------------------------------------------------------------------------------


def snapshot(world: World) -> dict[str, Any]:
    optimizer = world.optimizer
    return {
        "params": [(p, p.detach().clone()) for p in world.params()],
        "state": {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
            for p, entry in optimizer.state.items()
        },
        "groups": len(optimizer.param_groups),
        "skipped": optimizer.skipped_steps,
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # State follows a parameter that was cast.
        return one.shape == other.shape and torch.equal(
            one.to(other.dtype).nan_to_num(), other.nan_to_num()
        )
    return one is None or one is other or one == other  # what is missing may be made


def check_unchanged(world: World, before: dict[str, Any]) -> None:
    after = snapshot(world)
    for (p, value), (q, other) in zip(before["params"], after["params"], strict=False):
        if p is q and not _equal(value, other):
            raise Broken(f"a parameter {tuple(p.shape)} was written")
    held = set(world.params())  # what was replaced goes on elsewhere
    for p, entry in before["state"].items():
        if p not in held:
            continue
        now = after["state"].get(p)
        if now is None or any(not _equal(v, now.get(k)) for k, v in entry.items()):
            raise Broken(f"the state of a parameter {tuple(p.shape)} was written or lost")
    for key in ("groups", "skipped"):
        if before[key] != after[key]:
            raise Broken(f"{key} changed")


def _raised_on_purpose(error: BaseException) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(_SOURCE)
    torchs = last.filename.endswith(("torch/optim/optimizer.py", "torch/optim/lr_scheduler.py"))
    return (ours or torchs) and (last.line or "").startswith("raise") and bool(str(error))


def run(seed: int, length: int = 14) -> Counter[str]:
    """One sequence; how often each event went through or was refused.

    Raises:
        Broken: a law did not hold; the message has the events.
    """
    world = World(seed)
    told: list[str] = []
    counts: Counter[str] = Counter()
    for _ in range(length):
        event = world.random.choice(EVENTS)
        told.append(event.__name__)
        before = snapshot(world)
        finite = all(bool(torch.isfinite(value.double()).all()) for _, value in before["params"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                event(world)
            counts[f"{event.__name__} ok"] += 1
            if event is step and finite and _sane(world):
                _check_finite(world)
        except Broken as error:
            raise Broken(f"seed {seed}: {', '.join(told)}: {error}") from error
        except DOCUMENTED as error:
            counts[f"{event.__name__} refused"] += 1
            try:
                if not _raised_on_purpose(error):
                    raise Broken(f"{type(error).__name__} by accident: {error}") from error
                check_unchanged(world, before)
            except Broken as broken:
                raise Broken(f"seed {seed}: {', '.join(told)}: {broken} ({error})") from broken
        except Exception as error:
            raise Broken(
                f"seed {seed}: {', '.join(told)}: undocumented {type(error).__name__}: {error}"
            ) from error
    return counts


def _sane(world: World) -> bool:
    """Whether nothing that is not finite was put in on purpose."""
    return all(
        bool(torch.isfinite(value if value.is_complex() else value.double()).all())
        for entry in world.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    )


def _check_finite(world: World) -> None:
    held = set(world.params())
    if any(isinstance(p, Tensor) and p not in held for p in world.optimizer.state):
        raise Broken("state is kept for a parameter that no group holds")
    for p in world.params():
        if not torch.isfinite(p.detach().double()).all():
            raise Broken(f"a parameter {tuple(p.shape)} is not finite after a step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--length", type=int, default=14, help="events in a sequence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failures = 0
    for seed in range(options.first, options.first + options.sequences):
        try:
            counts += run(seed, options.length)
        except Broken as error:
            failures += 1
            print(str(error).splitlines()[0])
    for name, count in sorted(counts.items()):
        print(f"{count:8,} {name}")
    print(f"{options.sequences:,} sequences, {sum(counts.values()):,} events, {failures:,} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
