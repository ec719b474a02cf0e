"""The schedule of a step over several ranks: what is this rank's own, what is shared, and the facts
in which all ranks have to agree before anything is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muonkit._groups import parameter_names
from muonkit._optim_layout import is_whole, local
from muonkit._optim_shared import Share
from muonkit.exchange import move
from muonkit.placement import slices
from muonkit.plan import Plan, Stored, make_gather
from muonkit.views import View

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from muonkit._optim_layout import Layout, Layouts

__all__ = ["Gather", "Schedule", "options_facts", "schedule_key"]

# What of a group a plan depends on.
_PLANNING = (
    "algorithm",
    "view",
    "variant",
    "ns_coefficients",
    "ns_steps",
    "ns_form",
    "ns_dtype",
    "momentum_dtype",
    "exchange_dtype",
    "replicas",
    "bytes_in_flight",
)


def schedule_key(work: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> tuple[Any, ...]:
    """Equal keys, equal schedules (of one optimizer)."""
    return tuple(
        (
            tuple(repr(group.get(key)) for key in _PLANNING),
            tuple((id(p), None if p.grad is None else p.grad.dtype) for p in group["params"]),
        )
        for group, _ in work
    )


def options_facts(groups: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The hyperparameters that are numbers and names; a tensor's value stays where it is."""
    return [
        (
            f"group {number}'s {key}",
            "a tensor" if isinstance(value, torch.Tensor) else repr(value),
        )
        for number, group in enumerate(groups)
        for key, value in sorted(group.items())
        if key not in ("params", "param_names", "initial_lr")
    ]


class Schedule:
    """The plans of one step.

    Attributes:
        own: for each group, the indices of the parameters that are computed where they are.
        shares: for each group, those of Muon's others.
        gathers: AdamW's, where the state is shared out.
        facts: what has to be equal on all ranks.
    """

    def __init__(
        self, layouts: Layouts, work: Sequence[tuple[dict[str, Any], list[Tensor]]]
    ) -> None:
        assert layouts.domain is not None
        self.own: list[list[int]] = []
        self.shares: list[list[Share]] = []
        self.gathers: list[Gather] = []
        self.facts: list[tuple[str, str]] = []
        loads = [0] * layouts.domain.size
        for group, _ in work:
            own: list[int] = []
            shared: dict[tuple[torch.dtype, ...], list[tuple[int, str, Tensor, torch.dtype]]] = {}
            for index, (name, p) in enumerate(
                zip(parameter_names(group), group["params"], strict=True)
            ):
                layout = layouts.get(p)
                if layout is None or _is_own(layout, p, group):
                    if p.grad is not None:
                        own.append(index)
                    continue
                self.facts.append((name, _fact(p, layout)))
                if p.grad is not None:
                    key = (p.dtype, p.grad.dtype)
                    shared.setdefault(key, []).append((index, name, p, p.grad.dtype))
            self.own.append(own)
            muon = group["algorithm"] == "muon"
            self.shares.append(
                [Share(layouts, group, params, loads) for params in shared.values() if muon]
            )
            self.gathers += [Gather(layouts, params) for params in shared.values() if not muon]
        plans = [share.plan for shares in self.shares for share in shares]
        plans += [gather.plan for gather in self.gathers]
        self.facts += [
            (f"the plan of exchange {i}", plan.fingerprint()) for i, plan in enumerate(plans)
        ]


def _is_own(layout: Layout, p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether every matrix is whole on the ranks that have it, and none waits for another's work:
    then a rank computes it as if it were alone.
    """
    if layout.lives != layout.stored:
        return False
    if group["algorithm"] == "adamw":
        return True
    if any(axis in layout.given for axis in layout.stored.copies()):
        return False
    cut = {axis.dim for axis in layout.stored.axes if axis.dim is not None}
    first = View.parse(group["view"]).steps[0]
    if cut and not (first == "experts" and max(cut) < p.ndim - 2):
        return is_whole(layout, p.shape)
    # Copies along mesh axes: the same is computed in each, or the plan shares it out.
    return not layout.stored.copies() or group["replicas"] == "recompute"


def _fact(p: Tensor, layout: Layout) -> str:
    grad = "no gradient" if p.grad is None else f"a gradient in {p.grad.dtype}"
    return f"{tuple(p.shape)} in {p.dtype}, {layout.stored.axes}, {grad}"


class Gather:
    """AdamW's parameters of which every rank updates a part, and gets the others' from them."""

    def __init__(
        self, layouts: Layouts, params: Sequence[tuple[int, str, Tensor, torch.dtype]]
    ) -> None:
        assert layouts.domain is not None
        self.domain = layouts.domain
        self.params = [p for _, _, p, _ in params]
        self.indices = [index for index, *_ in params]
        tensors = [
            Stored(name, tuple(p.shape), layouts[p].stored, layouts[p].lives)
            for _, name, p, _ in params
        ]
        self.dtype = self.params[0].dtype
        cap = 64 * 2**20 if self.domain.device.type == "cpu" else 256 * 2**20
        self.plan: Plan = make_gather(self.domain.size, tensors, self.dtype.itemsize, cap)
        me = self.domain.position
        self._errands = [
            (self.plan.outbound(jobs, me), self.plan.moves(jobs, inward=False))
            for jobs in self.plan.buckets
        ]
        self._own = [t.stored.box(t.shape, me) for t in tensors]

    def tasks(self) -> list[Iterator[None]]:
        """Of a step in which this rank's parts are updated already."""
        return [self._task(number) for number in range(len(self._errands))]

    def _task(self, number: int) -> Iterator[None]:
        errand, moves = self._errands[number]
        me = self.domain.position
        outgoing, incoming = (
            [(at, self._piece(matrix, box)) for at, matrix, box in parcels if at != me]
            for parcels in (errand.sends, errand.receives)
        )
        pending = move(self.domain, outgoing, incoming, self.dtype, moves)
        yield
        pending.wait()

    def _piece(self, matrix: int, box: Any) -> Tensor:
        tensor = self.plan.matrices[matrix].tensor
        return local(self.params[tensor])[slices(box, self._own[tensor])]
