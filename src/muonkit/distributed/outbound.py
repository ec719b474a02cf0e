"""The way back: what owners have computed, to all ranks that store it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from muonkit.distributed.exchange import Exchange, Pending, gather, move

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.placement import Box
    from muonkit.distributed.plan import Assignment, Plan, Transfer, Transfers

__all__ = ["Outbound"]

T = TypeVar("T")


class Outbound:
    """This rank's part in sending back a bucket of results, or of a stage's state; the same in
    every step.

    Args:
        bucket: all its assignments, by which every rank decides alike how they are sent.
        mine: those of them that concern this rank, where they are known.
        cap: bytes that a rank may send at once; None is any number.
        state: the stage's state, and not the results.
        own: whether parts that stay on this rank are copied too.

    Attributes:
        sends: the parts that this rank hands over, in order.
        rounds: the parts that it receives, in the order in which they arrive: from owners, or of
            all ranks; and where there are any, from relays (`muonkit.distributed.nodes`).
        own: the parts that stay on this rank, if these are not copied.
        gathered: see `Plan.gathers`.
        moves: whether any rank sends anything.
    """

    def __init__(
        self,
        plan: Plan,
        bucket: Sequence[Assignment],
        me: int,
        cap: int | None = None,
        state: bool = False,
        own: bool = False,
        mine: Sequence[Assignment] | None = None,
    ) -> None:
        first = plan.outbound(bucket if mine is None else mine, me, state=state)
        self.gathered = plan.gathers(bucket, state)
        self.moves = plan.moves(bucket, False, state)
        self.sends, recvs = first
        if self.gathered:  # everything that it owns goes to itself too: one copy, for all
            self.sends = _to(first.sends, me)
        elif not own:
            self.sends = _away(first.sends, me)
        self.own = () if own else _to(recvs, me)
        self.rounds: list[Sequence[Transfer]] = [recvs if own else _away(recvs, me)]
        self._late: Transfers | None = None
        self._chunks = [1 if cap is None else plan.chunks(bucket, cap, state)]
        if plan.relays(bucket, state):
            self._late = plan.outbound(bucket, me, late=True, state=state)
            self.rounds.append(self._late.recvs)
            self._chunks.append(1 if cap is None else plan.chunks(bucket, cap, state, late=True))

    def send(
        self,
        domain: Domain,
        value: T,
        outgoing: Sequence[tuple[int, Tensor]],
        place_of: Callable[[int, Box], Tensor],
        dtype: torch.dtype,
        last_: Callable[[T], object] | None = None,
        buffers: Sequence[Tensor | None] = (None, None),
    ) -> Pending[T]:
        """Start to send.

        Args:
            value: what the result has.
            outgoing: (position, tensor) for each of `sends`.
            place_of: where a part of a matrix is to be on this rank.
            dtype: in which elements travel.
            last_: what is done when all has arrived.
            buffers: for each of `rounds` the memory that its places are parts of, if they are; see
                `exchange.move` and `exchange.gather`.
        """
        incoming = [(at, place_of(matrix, box)) for at, matrix, box in self.rounds[0]]
        if self.gathered:
            tensors = [tensor for _, tensor in outgoing]
            exchange = gather(domain, tensors, incoming, dtype, self.gathered, buffers[0])
            return Pending(value, [exchange], last_)
        first = self._move(domain, outgoing, incoming, dtype, 0, buffers)
        late = self._late
        if late is None:
            return Pending(value, [first], last_)

        def pass_on() -> Exchange:
            sends, recvs = (
                [(at, place_of(matrix, box)) for at, matrix, box in some] for some in late
            )
            return self._move(domain, sends, recvs, dtype, 1, buffers)

        return Pending(value, [first], last_, start_late=pass_on)

    def _move(
        self,
        domain: Domain,
        outgoing: Sequence[tuple[int, Tensor]],
        incoming: Sequence[tuple[int, Tensor]],
        dtype: torch.dtype,
        number: int,
        buffers: Sequence[Tensor | None],
    ) -> Exchange:
        """A round, in several chunks where a rank's copies for all others would not fit in the cap;
        the last chunk is under way when this returns.
        """
        chunks = self._chunks[number]
        if chunks == 1:
            return move(domain, outgoing, incoming, dtype, self.moves, buffer=buffers[number])
        for chunk in range(chunks - 1):
            move(domain, outgoing, incoming, dtype, self.moves, (chunk, chunks)).wait()
        return move(domain, outgoing, incoming, dtype, self.moves, (chunks - 1, chunks))


def _to(transfers: Sequence[Transfer], position: int) -> tuple[Transfer, ...]:
    return tuple(each for each in transfers if each.position == position)


def _away(transfers: Sequence[Transfer], position: int) -> tuple[Transfer, ...]:
    return tuple(each for each in transfers if each.position != position)
