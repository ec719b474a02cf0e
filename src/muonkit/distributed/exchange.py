"""The exchange: moves tensors between the ranks of a group, and knows nothing of Muon.

What one rank sends to another is packed into one buffer for each direction, and moved by
`all_to_all_single` with uneven sizes, asynchronously; what all ranks get goes into one buffer for
all, by an all-gather. What stays on a rank is copied, or not even that. `check_ranks_agree`
compares the ranks' plans before anything is moved.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from muonkit._text import shown
from muonkit._torch import all_gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

__all__ = [
    "Domain",
    "Exchange",
    "Pending",
    "add_up",
    "announce",
    "check_ranks_agree",
    "gather",
    "move",
    "run_overlapped",
    "slots",
    "together",
]


class Domain(NamedTuple):
    """The ranks that exchange with one another.

    Attributes:
        group: their process group; a rank's *position* is its rank in it.
        position: this rank's.
        size: how many there are.
        device: where the buffers are: the group's backend decides.
        control: a group of the same ranks that moves CPU tensors, for `check_ranks_agree`, and for
            what follows it: a rank that does not come meets no other collective there.
        node: ranks in a node, the same number on all of them.
    """

    group: ProcessGroup
    position: int
    size: int
    device: torch.device
    control: ProcessGroup
    node: int


T = TypeVar("T", covariant=True)


class Pending(Generic[T]):
    """The value that exchanges deliver: `wait` completes them and returns the value.

    Until then nobody may write to what is sent, or read what is received.

    Args:
        value: what is there afterwards; at once, where nothing has to travel.
        exchanges: to complete first, in order.
        last_: what is done to the value then, in place.
        start_late: starts one more exchange, of what the first have brought.
    """

    def __init__(
        self,
        value: T,
        exchanges: Sequence[Exchange] = (),
        last_: Callable[[T], object] | None = None,
        start_late: Callable[[], Exchange] | None = None,
    ) -> None:
        self._value, self._exchanges, self._last = value, exchanges, last_
        self._start_late = start_late

    def arrive(self) -> Iterator[None]:
        """Pause whenever something is under way; what `wait` then waits for is the last of it."""
        yield
        if self._start_late is not None:
            self._next_round()
            yield

    def wait(self) -> T:
        """Raises:
        RuntimeError: as `Exchange.wait`.
        """
        if self._start_late is not None:
            self._next_round()
        for exchange in self._exchanges:
            exchange.wait()
        if self._last is not None:
            self._last(self._value)
        self._exchanges, self._last = (), None
        return self._value

    def _next_round(self) -> None:
        assert self._start_late is not None
        for exchange in self._exchanges:
            exchange.wait()
        self._exchanges, self._start_late = [self._start_late()], None


class Exchange:
    """One exchange that has been started."""

    def __init__(self, work: Work | None, buffers: tuple[Tensor, ...], arrived: Sequence[Any]):
        self._work = work
        self._buffers = buffers  # kept alive while they travel
        self._copies = arrived

    def wait(self) -> None:
        """Wait for the other ranks' tensors and put them where they belong.

        Raises:
            RuntimeError: a rank ended or did not answer within the group's timeout.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise RuntimeError(_BROKEN) from error
            self._work = None
        if self._copies:
            into, chunks = zip(*self._copies, strict=True)
            torch._foreach_copy_(list(into), list(chunks))
        self._buffers, self._copies = (), ()


_BROKEN = (
    "an exchange between ranks broke off: one of them ended, skipped this step, or did not answer "
    "within the process group's timeout (its own log says why). The step may be half done on some "
    "ranks: start all of them again from the last checkpoint"
)


def move(
    domain: Domain,
    outgoing: Sequence[tuple[int, Tensor]],
    incoming: Sequence[tuple[int, Tensor]],
    dtype: torch.dtype,
    together: bool = True,
    chunk: tuple[int, int] = (0, 1),
    buffer: Tensor | None = None,
) -> Exchange:
    """Start to send tensors to other positions, and to receive theirs.

    Args:
        outgoing: (position, tensor), ascending; what is for this rank itself is copied at once.
        incoming: (position, tensor to write into), ascending, in the sender's order.
        dtype: in which elements travel; tensors of other dtypes are cast. What stays on this rank
            is rounded to it too: copies of one tensor have to be equal on all ranks.
        together: False where no rank sends anything, and there is nothing to wait for.
        chunk: (k, n): only the k-th of n chunks, by who sends to whom; with the first one goes what
            stays on this rank.
        buffer: what other ranks send is read where it arrives: in this memory, of that dtype and on
            the domain's device, of which `incoming` are the parts, one after the other.
    """
    number, count = chunk
    me = domain.position
    own_from = [tensor.to(dtype) for position, tensor in outgoing if position == me]
    own_into = [tensor for position, tensor in incoming if position == me]
    if own_into and number == 0:
        torch._foreach_copy_(own_into, own_from)
    if not together:
        return Exchange(None, (), ())
    sent = [(to, tensor) for to, tensor in outgoing if to != me and (to - me) % count == number]
    received = [
        (source, tensor)
        for source, tensor in incoming
        if source != me and (me - source) % count == number
    ]
    to_send, to_come = (_sizes(domain, some) for some in (sent, received))
    send = _packed(domain, [tensor for _, tensor in sent], dtype, sum(to_send))
    receive = buffer
    arrived: Sequence[Any] = ()
    if receive is None:
        into = [tensor for _, tensor in received]
        receive = torch.empty(sum(to_come), dtype=dtype, device=domain.device)
        arrived = list(zip(into, _views(receive, into), strict=True))
    try:
        work = torch.distributed.all_to_all_single(
            receive, send, to_come, to_send, group=domain.group, async_op=True
        )
    except RuntimeError as error:
        raise RuntimeError(_BROKEN) from error
    return Exchange(work, (send, receive), arrived)


def gather(
    domain: Domain,
    own: Sequence[Tensor],
    incoming: Sequence[tuple[int, Tensor]],
    dtype: torch.dtype,
    size: int,
    buffer: Tensor | None = None,
) -> Exchange:
    """Start to bring tensors of every rank to all ranks.

    Args:
        own: this rank's.
        incoming: (position, tensor to write into), ascending, in the sender's order: all that a
            position sends, or nothing of it.
        dtype: in which elements travel; tensors of other dtypes are cast.
        size: elements that each rank sends: as many on all ranks as the one has that has most.
        buffer: what arrives is read where it does: in this memory, of that dtype and on the
            domain's device, of which `incoming` are the parts that `slots` says.
    """
    send = _packed(domain, own, dtype, size)
    receive = buffer
    arrived: Sequence[Any] = ()
    if receive is None:
        receive = torch.empty(domain.size * size, dtype=dtype, device=domain.device)
        starts = slots([(position, tensor.numel()) for position, tensor in incoming], size)
        arrived = [
            (tensor, receive[start : start + tensor.numel()].view(tensor.shape))
            for (_, tensor), start in zip(incoming, starts, strict=True)
        ]
    try:
        work = all_gather(receive, send, domain.group)
    except RuntimeError as error:
        raise RuntimeError(_BROKEN) from error
    return Exchange(work, (send, receive), arrived)


def slots(sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Where (position, so many elements) start in a buffer that has `room` elements for each
    position: one after the other.
    """
    starts = []
    used: dict[int, int] = {}
    for position, size in sizes:
        starts.append(position * room + used.get(position, 0))
        used[position] = used.get(position, 0) + size
    return starts


def add_up(domain: Domain, numbers: Tensor) -> Exchange:
    """Start to replace the numbers of every rank by their sum over all ranks.

    Args:
        numbers: written to; on the domain's device.
    """
    try:
        work = torch.distributed.all_reduce(numbers, group=domain.group, async_op=True)
    except RuntimeError as error:
        raise RuntimeError(_BROKEN) from error
    return Exchange(work, (numbers,), ())


def _packed(domain: Domain, tensors: Sequence[Tensor], dtype: torch.dtype, size: int) -> Tensor:
    """Copies of the tensors, one after the other, in a buffer of so many elements."""
    buffer = torch.empty(size, dtype=dtype, device=domain.device)
    if tensors:
        torch._foreach_copy_(_views(buffer, tensors), list(tensors))
    return buffer


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a buffer, one after the other from its start, in the tensors' shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    chunks = torch.split(buffer[: sum(sizes)], sizes) if sizes else ()
    return [chunk.view(tensor.shape) for chunk, tensor in zip(chunks, tensors, strict=True)]


def _sizes(domain: Domain, tensors: Sequence[tuple[int, Tensor]]) -> list[int]:
    sizes = [0] * domain.size
    for position, tensor in tensors:
        sizes[position] += tensor.numel()
    return sizes


def check_ranks_agree(
    domain: Domain,
    compared: Sequence[tuple[str, str]],
    remedies: Mapping[str, str],
    vote: int = 0,
    call: str = "step",
) -> int:
    """Compare what every rank has; one small collective, two where they differ.

    Args:
        compared: (what it is, its value), in order of what causes what: the first that differs is
            told.
        remedies: the end of the error, by what differs; "" for all that is not there.
        vote: any non-negative number of the rank's own.
        call: what this rank was called for: ranks that are in different ones are told so.

    Returns:
        The largest vote.

    Raises:
        RuntimeError: on every rank, naming the first that differs, and who has what.
    """
    compared = _named_apart([(_CALL, call), *compared])
    remedies = {_CALL: _CALLS, _STEP: _REFUSED, **remedies}
    digest = hashlib.sha256(repr(compared).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    answer = torch.tensor([number, -number, vote], device="cpu")
    try:
        torch.distributed.all_reduce(
            answer, op=torch.distributed.ReduceOp.MAX, group=domain.control
        )
    except RuntimeError as error:
        raise RuntimeError(_BROKEN) from error
    highest, lowest, most = answer.tolist()
    if highest != -lowest:
        everyone: list[Any] = [None] * domain.size
        torch.distributed.all_gather_object(everyone, compared, group=domain.control)
        ranks = torch.distributed.get_process_group_ranks(domain.group)
        what, difference = _difference(everyone, ranks)
        raise RuntimeError(f"{difference}; {remedies.get(what, remedies[''])}")
    return int(most)


def announce(domain: Domain, error: Exception, call: str = "step") -> None:
    """Tell the ranks that wait in `check_ranks_agree` that this rank refused the call."""
    with contextlib.suppress(RuntimeError):  # they disagree, of course; ours is the cause
        check_ranks_agree(domain, [(_STEP, f"refused: {shown(error)}")], {"": ""}, call=call)


_STEP = "this step"
_REFUSED = "that rank's own error has more; nothing was changed on any"
_CALL = "this call"
_CALLS = (
    "all ranks take the same steps, clip and consolidate between the same ones, and have a Monitor "
    "or none; nothing was changed"
)


def together(domain: Domain, call: str) -> None:
    """See that all ranks are in this call: before a collective that has no comparison of its own.

    Raises:
        RuntimeError: on every rank, some are in another.
    """
    check_ranks_agree(domain, [], {"": ""}, call=call)


def _named_apart(compared: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Number what has the name of another, as a parameter of that name in a second group."""
    seen: dict[str, int] = {}
    apart = []
    for name, value in compared:
        seen[name] = seen.get(name, 0) + 1
        apart.append((name if seen[name] == 1 else f"{name} ({seen[name]})", value))
    return apart


def _difference(
    everyone: Sequence[Sequence[tuple[str, str]]], ranks: Sequence[int]
) -> tuple[str, str]:
    """The first name of which the ranks have different values, and who has what."""
    tables = [dict(compared) for compared in everyone]
    orders = [list(table) for table in tables]
    calls = [table[_CALL] for table in tables]
    if len(set(calls)) > 1:
        return _CALL, _told(_CALL, calls, ranks)
    if all(set(order) == set(orders[0]) for order in orders):
        for names in zip(*orders, strict=True):
            if len(set(names)) > 1:
                return "the order", _told("the order of parameters", names, ranks)
    for number in range(max(map(len, orders))):
        here = {order[number] for order in orders if number < len(order)}
        # A name that some ranks lack goes first, since it shifts all that follow; a refusal is the
        # cause of such a shift, and goes before it.
        for name in sorted(here, key=lambda n: (n != _STEP, all(n in t for t in tables), n)):
            said = [table.get(name, "nothing") for table in tables]
            if len(set(said)) > 1:
                return name, _told(name, said, ranks)
    return "", "the ranks disagree"


def _told(what: str, said: Sequence[str], ranks: Sequence[int]) -> str:
    """Who says what of it."""
    at: dict[str, list[int]] = {}
    for rank, value in zip(ranks, said, strict=True):
        at.setdefault(value, []).append(rank)
    return "the ranks disagree: " + ", but ".join(
        f"{what}: {value} on {'rank' if len(who) == 1 else 'ranks'} "
        f"{', '.join(map(str, who[:8]))}{', ...' if len(who) > 8 else ''}"
        for value, who in at.items()
    )


def run_overlapped(tasks: Sequence[Iterator[None]], depth: int) -> None:
    """Run tasks that pause while something they sent has not arrived.

    Up to `depth` of them are under way at once; the order in which they go on is the same on every
    rank.
    """
    waiting = list(reversed(tasks))
    running: list[Iterator[None]] = []
    while waiting or running:
        if waiting and len(running) < depth:
            running.append(waiting.pop())
        running = [task for task in running if next(task, _DONE) is not _DONE]


_DONE = object()
