"""The laws on several ranks: layouts give what one process gives, and send no more than they need.

Every rank finds the subject anew by its spec, `mypackage.module:make`, since functions do not
travel; then all try the laws one after the other in the same processes.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muonkit._text import unknown
from muonkit._torch import FUNCTIONAL_COLLECTIVES, dispatch_mode
from muonkit.testing.adapter import CLAIMS, Subject, load
from muonkit.testing.laws import (
    LAWS,
    Broken,
    Finding,
    given,
    judge,
    law,
    matrix,
    same,
    see_reasons,
    shape_of,
)
from muonkit.testing.ranks import Outcome, run

__all__ = ["check_on_ranks", "on_this_rank"]

# Rows that 2 and 4 ranks divide; that they do not; fewer than ranks, so that shards are empty; so
# many that the factor of a shard is another one.
SHAPES = ((8, 6), (6, 8), (3, 5), (32, 4))
_SHAPES = ", ".join(f"{rows} × {cols}" for rows, cols in SHAPES)
# Large beside what ranks tell each other before a step.
LARGE = ((32, 24), (24, 32), (6, 40))
STEPS = 3
# With the learning rate of 0.1 the weights fall to a third: what a rank leaves out is seen.
DECAY = 3.0
# Seconds that the other ranks have to end a law that one rank found broken.
GRACE = 20.0


def check_on_ranks(
    spec: str, world_size: int, laws: Iterable[str] | None = None, *, timeout: float = 120.0
) -> list[Finding]:
    """Hold a subject to the laws on so many ranks, or to those of them that are named.

    Every rank is a process that imports the main module: a script calls this below
    `if __name__ == "__main__":`.

    Args:
        spec: where every rank finds it (`muonkit.testing.load`).
        timeout: seconds that one law may take; then all ranks are ended, and the next law has new
            ones.

    Raises:
        LookupError: a law of that name does not exist.
        ValueError: one of them is for another number of ranks, or there is none for so many.
    """
    subject = load(spec)
    see_reasons(subject)
    counts = sorted({each.world_size for each in LAWS.values() if each.world_size})
    if world_size not in counts:
        raise ValueError(f"there are laws for {counts} ranks, got world_size={world_size}")
    names = [name for name, each in LAWS.items() if each.world_size == world_size]
    if laws is not None:
        asked = list(laws)
        for name in asked:
            if name not in LAWS:
                raise LookupError(unknown("law", name, LAWS))
            if name not in names:
                raise ValueError(f"{name} is no law for {world_size} ranks")
        names = [name for name in names if name in asked]
    claimed = [name for name in names if not LAWS[name].missing(subject)]
    cases = {name: functools.partial(on_this_rank, spec, name) for name in claimed}
    outcomes: dict[str, Outcome] = {}
    while left := {name: case for name, case in cases.items() if name not in outcomes}:
        # After one that left the ranks out of step the others have a group of their own.
        found = run(world_size, left, timeout=timeout, grace=GRACE, failed=_has_failed)
        outcomes |= {name: each for name, each in found.items() if each.ran}
    return [_finding(name, subject, outcomes.get(name)) for name in names]


def on_this_rank(spec: str, name: str) -> Finding:
    """Try one law, as one of the ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its import warns of is no law either
        subject = load(spec)
    return judge(LAWS[name], subject)


def _finding(name: str, subject: Subject, outcome: Outcome | None) -> Finding:
    """What the ranks say: the first of them that failed."""
    if outcome is None:
        what = "; ".join(CLAIMS[claim] for claim in LAWS[name].missing(subject))
        return Finding(name, "does not claim", message=what)
    findings: list[Finding] = [value for value in outcome.values if value is not None]
    failed = [finding for finding in findings if _has_failed(finding)]
    if failed:
        return failed[0]
    for rank, error in enumerate(outcome.errors):
        if error is not None:
            lines = error.strip().splitlines()
            told = lines[0] if "Traceback" not in lines[0] else lines[-1]
            return Finding(name, "fail", f"rank {rank}", told[:400], subject.why(name))
    return findings[0]


def _has_failed(finding: Any) -> bool:
    return isinstance(finding, Finding) and finding.verdict == "fail"


# --- layouts ------------------------------------------------------------------------------------


Shapes = Sequence[tuple[int, int]]


def _gradients(step: int, shapes: Shapes = SHAPES) -> list[Tensor]:
    return [matrix(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]


def _weights(shapes: Shapes = SHAPES) -> list[Tensor]:
    return [matrix(*shape, seed=100 + i) for i, shape in enumerate(shapes)]


def _ddp(_: DeviceMesh, tensor: Tensor) -> Tensor:
    return tensor.clone()


def _fsdp2(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    return distribute_tensor(tensor, mesh, [Shard(0)])


LAYOUTS: dict[str, Callable[[DeviceMesh, Tensor], Tensor]] = {"ddp": _ddp, "fsdp2": _fsdp2}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(
    subject: Subject,
    layout: str,
    shapes: Shapes = SHAPES,
    counted: bool = False,
    decay: float = 0.0,
) -> tuple[list[Tensor], int, list[Tensor]]:
    """Weights after some steps, gathered whole; bytes of the last step; gathered gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = functools.partial(LAYOUTS[layout], mesh)
    params = [nn.Parameter(placed(w)) for w in _weights(shapes)]
    optimizer = subject.optimizer(params, lr=0.1, weight_decay=decay, layout=layout)
    sent = 0
    for step in range(STEPS):
        for p, g in zip(params, _gradients(step, shapes), strict=True):
            p.grad = placed(g)
        # Some find out in the first step where everything lies.
        with counted_bytes() if counted and step == STEPS - 1 else contextlib.nullcontext() as it:
            optimizer.step()
        sent = sum(it) if it else 0
    held = [p.grad for p in params]
    gradients = [_whole(g.detach()) for g in held if g is not None]
    return [_whole(p.detach()) for p in params], sent, gradients


def _alone(subject: Subject, decay: float) -> list[Tensor]:
    params = [nn.Parameter(w) for w in _weights()]
    optimizer = subject.optimizer(params, lr=0.1, weight_decay=decay)
    for step in range(STEPS):
        for p, g in zip(params, _gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def _equals_one_process(subject: Subject, layout: str) -> None:
    for decay in _decays(subject):
        _equals_with(subject, layout, decay)


def _decays(subject: Subject) -> tuple[float, ...]:
    """None first: what decay moves would cover what an update is off by."""
    return (0.0, DECAY) if subject.decay else (0.0,)


def _equals_with(subject: Subject, layout: str, decay: float) -> None:
    expected = _alone(subject, decay)
    with given(f"{_SHAPES} parameters on {dist.get_world_size()} ranks"):
        got, _, _ = _train(subject, layout, decay=decay)
    for one, two, before in zip(got, expected, _weights(), strict=True):
        with given(f"a {shape_of(before)} parameter on {dist.get_world_size()} ranks, 3 steps"):
            same(subject, one - before, two - before, "what one process computes")


@law(
    "ddp",
    elsewhere="decay on a rank's own parameters only: copies that drift apart",
    world_sizes=(2, 4),
)
def ddp_equals_one_process(subject: Subject) -> None:
    """With a copy of every parameter and gradient on each rank, all ranks end with one process's
    weights, and all with the same ones, bit for bit."""
    _equals_one_process(subject, "ddp")
    for tensor in _train(subject, "ddp", decay=_decays(subject)[-1])[0]:
        with given(f"a {shape_of(tensor)} parameter on {dist.get_world_size()} ranks"):
            copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, tensor.contiguous())
            if any(not torch.equal(each, copies[0]) for each in copies):
                raise Broken("the ranks' copies differ")


@law(
    "fsdp2",
    elsewhere="each rank orthogonalizes its own shard; uneven and empty shards hang",
    world_sizes=(2, 4),
)
def fsdp2_equals_one_process(subject: Subject) -> None:
    """Sharded on the first dim, evenly, unevenly and with empty shards, parameters end with one
    process's weights."""
    _equals_one_process(subject, "fsdp2")


@law("fsdp2", elsewhere="results written into the gradients' shards", world_sizes=(2,))
def sharded_gradients_are_untouched(subject: Subject) -> None:
    """A step neither writes to sharded gradients nor takes them away."""
    _, _, gradients = _train(subject, "fsdp2")
    with given(f"{_SHAPES} gradients on 2 ranks"):
        if len(gradients) < len(SHAPES):
            raise Broken("gradients were taken away")
        for got, expected in zip(gradients, _gradients(STEPS - 1), strict=True):
            if not torch.equal(got, expected):
                raise Broken(f"the {shape_of(got)} gradient changed")


@law(
    "fsdp2", "checkpoint", elsewhere="state keyed by rank, or of a shard's shape", world_sizes=(2,)
)
def sharded_state_has_the_parameters_layout(subject: Subject) -> None:
    """After a step, what the state has of a matrix's size is a DTensor laid out as the parameter,
    which torch.distributed.checkpoint saves at one world size and loads at another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with given("a 3 × 5 parameter on 2 ranks"):
        p = nn.Parameter(_fsdp2(mesh, matrix(3, 5)))
        optimizer = subject.optimizer([p], layout="fsdp2")
        p.grad = _fsdp2(mesh, matrix(3, 5, seed=1))
        optimizer.step()
        state = optimizer.state_dict()["state"].get(0, {})
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 5}
        if not tensors:
            raise Broken("the state dict has no tensor of the matrix's size")
        for key, value in tensors.items():
            if not isinstance(value, DTensor) or value.placements != (Shard(0),):
                kind = f"{type(value).__name__} of shape {tuple(value.shape)}"
                raise Broken(f"{key!r} is a {kind}, the parameter a DTensor sharded on dim 0")


def _bytes(subject: Subject, layout: str) -> None:
    size = dist.get_world_size()
    whole = sum(4 * rows * cols for rows, cols in LARGE)
    # What a rank sends of tensors of `whole` bytes that all ranks are to have. Uneven shards are
    # padded to the largest, and a few numbers are compared.
    most = whole * (size - 1) / size
    room = sum(4 * size * cols for _, cols in LARGE) + 1024
    with given(f"{', '.join(f'{rows} × {cols}' for rows, cols in LARGE)} on {size} ranks"):
        total = torch.tensor(float(_train(subject, layout, LARGE, counted=True)[1]))
        dist.all_reduce(total)
        mean = float(total) / size
        if mean > most + room:
            raise Broken(
                f"a rank sends {mean:.0f} bytes a step on average, {most:.0f} (and {room} for "
                "padding and checks) are enough"
            )
        if mean == 0 and layout == "fsdp2":
            raise Broken("nothing was sent: no rank can have seen a whole matrix")


@law("fsdp2", elsewhere="every rank gathers everything, twice", world_sizes=(2, 4))
def fsdp2_sends_no_more_than_an_all_gather(subject: Subject) -> None:
    """A step sends no more bytes than an all-gather of every matrix, and some."""
    _bytes(subject, "fsdp2")


@law("ddp", elsewhere="padding with whole matrices", world_sizes=(2, 4))
def ddp_sends_no_more_than_an_all_gather(subject: Subject) -> None:
    """A step sends no more bytes than an all-gather of every matrix's update."""
    _bytes(subject, "ddp")


# --- bytes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that this rank sends to others in the collectives of this thread, one number each.

    Counted as the least that an algorithm needs: of an all-gather a rank's part to all others, of
    an all-reduce twice its share of the whole.
    """
    mode = _Counting()
    with mode:
        yield mode.sent


class _Counting(dispatch_mode()):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(arg, DTensor) for arg in _tensors(args)):
            return NotImplemented  # its local tensors come by afterwards
        space, _, name = str(func).partition(".")
        if space in ("c10d", FUNCTIONAL_COLLECTIVES):
            self.sent.append(_sent(space, name.partition(".")[0].strip("_"), args))
        return func(*args, **(kwargs or {}))


def _sent(space: str, name: str, args: Sequence[Any]) -> int:
    size, me = dist.get_world_size(), dist.get_rank()
    each = [t.numel() * t.element_size() for t in _tensors(args)]
    if not each:
        return 0
    functional = space == FUNCTIONAL_COLLECTIVES  # given the inputs alone, c10d's the outputs first
    if name.startswith(("allreduce", "all_reduce")):
        return 2 * sum(each) * (size - 1) // size
    if name.startswith("broadcast"):
        return sum(each) * (size - 1) // size  # one rank sends it to all: the mean
    if name.startswith(("allgather", "all_gather")):
        return (sum(each) if functional else sum(each) // (size + 1)) * (size - 1)
    if name.startswith(("reduce_scatter", "reducescatter")):
        return (sum(each) if functional else max(each)) * (size - 1) // size
    if name.startswith(("alltoall", "all_to_all")):
        if name not in ("alltoall_base", "all_to_all_single"):  # lists of tensors, out and in
            return sum(each) // 2 * (size - 1) // size
        splits = args[2 if functional else 4] or [1] * size  # of what it gives
        return each[-1] - int(each[-1] * splits[me] // max(1, sum(splits)))
    if name in ("gather", "scatter"):  # outputs and inputs: the root has a list of one of them
        outputs, inputs = (list(_tensors(arg)) for arg in args[:2])
        sent = sum(t.numel() * t.element_size() for t in inputs)
        if name == "scatter":
            return sent * (size - 1) // size
        return 0 if outputs else sent
    if name == "reduce":
        return sum(each) * (size - 1) // size  # all send it but one: the mean
    return sum(each) if name == "send" else 0  # the rest moves nothing (waits, wrappers)


def _tensors(args: Any) -> Iterator[Tensor]:
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, list | tuple):
        for each in args:
            yield from _tensors(each)
