"""The planned of a step over several ranks: what is this rank's own, what is shared, and the facts
in which all ranks have to agree before anything is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from muonkit.distributed.exchange import move
from muonkit.distributed.layout import cuts_experts_only, is_whole, local
from muonkit.distributed.plan import Plan, StepPlan, Stored, default_cap, make_gather
from muonkit.distributed.sharded import Param, ShardedGroup, own_plan
from muonkit.gradients import lies_elsewhere
from muonkit.groups import parameter_names, products_of
from muonkit.options import OPTION_KEYS, PLANNING, spelled
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from muonkit.distributed.layout import Layout, Layouts
    from muonkit.distributed.plan import Transfers

__all__ = [
    "Gather",
    "PlannedStep",
    "Present",
    "gradients",
    "options_facts",
    "plan_alone",
    "plan_key",
    "products_fact",
]


class Gradient(NamedTuple):
    """A gradient's dtype, and how it lies if that is not as its parameter."""

    dtype: torch.dtype
    placements: Any = None


# Per group: the parameters that have a gradient, by index.
Present: TypeAlias = "Sequence[Mapping[int, Gradient]]"


def gradients(groups: Sequence[Mapping[str, Any]], all_of_them: bool = False) -> Present:
    """What has a gradient now; or all that is trained, as if it had one of its own dtype."""
    if all_of_them:
        return [
            {i: Gradient(p.dtype) for i, p in enumerate(group["params"]) if p.requires_grad}
            for group in groups
        ]
    return [
        {i: _gradient(p) for i, p in enumerate(group["params"]) if p.grad is not None}
        for group in groups
    ]


def _gradient(p: Any) -> Gradient:
    grad = p.grad
    if lies_elsewhere(p):
        return Gradient(grad.dtype, grad.placements)
    # A sparse one is refused: by all ranks, if only one has it.
    return Gradient(grad.dtype, None if grad.layout == torch.strided else grad.layout)


def plan_key(groups: Sequence[Mapping[str, Any]], present: Present) -> tuple[Any, ...]:
    """Equal keys, equal planned steps (of one optimizer)."""
    return tuple(
        (
            tuple(repr(group.get(key)) for key in PLANNING),
            tuple(map(id, group["params"])),
            tuple(has.items()),
        )
        for group, has in zip(groups, present, strict=True)
    )


def options_facts(groups: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The hyperparameters; a tensor's value only where it is on the CPU."""
    return [
        (f"group {number}'s {key}", _shown(group[key]))
        for number, group in enumerate(groups)
        for key in OPTION_KEYS
        if key in group
    ]


def resolved_facts(layouts: Layouts, groups: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What this rank makes of options that leave a choice, or that no group has."""
    assert layouts.domain is not None
    device = layouts.domain.device
    facts = {"zero": str(layouts.zero), "the exchange's device": device.type}
    for number, group in enumerate(groups):
        if group["algorithm"] == "adamw":
            continue
        kinds = {
            (block.rows, block.cols, p.dtype)
            for p in group["params"]
            for block in blocks_of(group["view"], p.shape)
            if block.rows * block.cols
        }
        products = {products_of(group, rows, cols, dtype, device) for rows, cols, dtype in kinds}
        facts[products_fact(number)] = ", ".join(sorted(products))
    return facts


def products_fact(number: int) -> str:
    """The name of the fact of a group's products."""
    return f"group {number}'s products"


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(spelled(value) if callable(value) else value)
    # Reading it from another device would wait for all that is queued there.
    return repr(value.item()) if value.device.type == "cpu" else "a tensor"


class PlannedStep:
    """The plans of one step.

    Attributes:
        own: for each group, the indices of the parameters that are computed where they are.
        shares: for each group, those of Muon's others.
        gathers: AdamW's, where the state is shared out.
        plan: all of them, and what every rank computes of its own.
        facts: what has to be equal on all ranks, by name.
    """

    def __init__(
        self, layouts: Layouts, groups: Sequence[dict[str, Any]], present: Present
    ) -> None:
        assert layouts.domain is not None
        self.own: list[list[int]] = []
        self.sharded_groups: list[list[ShardedGroup]] = []
        self.gathers: list[Gather] = []
        self.facts: dict[str, str] = resolved_facts(layouts, groups)
        loads = [0] * layouts.domain.size
        plans: list[Plan] = []
        caps = [group["bytes_in_flight"] for group in groups if group["algorithm"] == "muon"]
        cap = caps[0] if caps else None
        for number, (group, has) in enumerate(zip(groups, present, strict=True)):
            own, shared = self._sort(layouts, number, group, has)
            self.own.append([param.number for param in own if param.number in has])
            self.sharded_groups.append([])
            if group["algorithm"] == "adamw":
                self.gathers += [Gather(layouts, params, cap) for params in shared]
                continue
            # Those without a gradient too: the owners of others may not depend on what one rank
            # has.
            trained = [param for param in own if param.p.requires_grad]
            plans.append(own_plan(layouts, group, trained, loads))
            self.sharded_groups[-1] += [
                ShardedGroup(layouts, group, params, loads) for params in shared
            ]
        exchanged = [share.plan for shares in self.sharded_groups for share in shares]
        for number, shares in enumerate(self.sharded_groups):
            if shares:
                again = {tensor.repeat for share in shares for tensor in share.plan.tensors} - {()}
                along = f"computed again along mesh axes {sorted(again)}" if again else "shared out"
                self.facts[f"group {number}'s replicas as chosen"] = along
        exchanged += [gather.plan for gather in self.gathers]
        self.plan = StepPlan(len(loads), (*plans, *exchanged))
        self.facts["the plan"] = StepPlan(len(loads), tuple(exchanged)).fingerprint()

    def _sort(
        self, layouts: Layouts, number: int, group: dict[str, Any], has: Mapping[int, Gradient]
    ) -> tuple[list[Param], list[list[Param]]]:
        """The group's parameters that are this rank's own, and the others by dtype."""
        own: list[Param] = []
        shared: dict[tuple[torch.dtype, ...], list[Param]] = {}
        named = zip(parameter_names(group), group["params"], strict=True)
        for index, (name, p) in enumerate(named):
            layout, grad = layouts.get(p), has.get(index)
            param = Param(index, name, p, p.dtype if grad is None else grad.dtype)
            together = layout is not None and not layout.alone
            is_own = layout is None or layout.alone or _is_own(layout, p, group)
            if layout is not None and together and not _on_its_own(layout, is_own, group, grad):
                known = name in self.facts or not group.get("param_names")
                what = f"group {number}'s {name}" if known else name
                self.facts[what] = _fact(p, layout, grad)
            if is_own:
                own.append(param)
            elif grad is not None:
                shared.setdefault((p.dtype, param.grad_dtype), []).append(param)
        return own, list(shared.values())


def plan_alone(layouts: Layouts, groups: Sequence[dict[str, Any]], present: Present) -> StepPlan:
    """What a step computes where no ranks share the parameters."""
    plans = []
    for group, has in zip(groups, present, strict=True):
        if group["algorithm"] == "muon":
            named = zip(parameter_names(group), group["params"], strict=True)
            params = [
                Param(i, name, p, has[i].dtype) for i, (name, p) in enumerate(named) if i in has
            ]
            plans.append(own_plan(layouts, group, params, [0]))
    return StepPlan(1, tuple(plans))


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
    if not cuts_experts_only(layout.stored.axes, p.ndim, group["view"]):
        return is_whole(layout, p.shape)
    # Copies along mesh axes: the same is computed in each, or the plan shares it out.
    others = [axis for axis in layout.stored.copies() if axis not in layout.implied]
    return not others or group["replicas"] == "recompute"


def _on_its_own(
    layout: Layout, is_own: bool, group: Mapping[str, Any], grad: Gradient | None
) -> bool:
    """Whether a rank may be without a gradient that others have: experts that nobody routed to."""
    copies = [axis for axis in layout.stored.copies() if axis not in layout.implied]
    cut = any(axis.dim is not None for axis in layout.stored.axes)
    whole_experts = is_own and cut and not copies and group["algorithm"] == "muon"
    return whole_experts and (grad is None or grad.placements is None)


def _fact(p: Tensor, layout: Layout, grad: Gradient | None) -> str:
    has = "no gradient" if grad is None else f"a gradient in {grad.dtype}"
    if grad is not None and grad.placements is not None:
        has += f" with {grad.placements}"
    return f"{tuple(p.shape)} in {p.dtype}, {layout.stored.described()}, {has}"


class Gather:
    """AdamW's parameters of which every rank updates a part, and gets the others' from them."""

    def __init__(self, layouts: Layouts, params: Sequence[Param], cap: int | None) -> None:
        assert layouts.domain is not None
        self.domain = layouts.domain
        self.params = [param.p for param in params]
        tensors = [
            Stored(name, tuple(p.shape), layouts[p].stored, layouts[p].lives)
            for _, name, p, _ in params
        ]
        self.dtype = self.params[0].dtype
        cap = cap or default_cap(self.domain.device.type)
        self.plan: Plan = make_gather(self.domain.size, tensors, self.dtype.itemsize, cap)
        me = self.domain.position
        self._transfers = [
            (self.plan.outbound(assignments, me), self.plan.moves(assignments, inward=False))
            for assignments in self.plan.buckets
        ]

    def tasks(self) -> list[Iterator[None]]:
        """The exchanges of a step, after this rank has updated its own parts."""
        return [self._task(transfers, moves) for transfers, moves in self._transfers]

    def _task(self, transfers: Transfers, moves: bool) -> Iterator[None]:
        me = self.domain.position
        outgoing, incoming = (
            [(at, self._piece(matrix, box)) for at, matrix, box in some if at != me]
            for some in (transfers.sends, transfers.recvs)
        )
        pending = move(self.domain, outgoing, incoming, self.dtype, moves)
        yield
        pending.wait()

    def _piece(self, matrix: int, box: Any) -> Tensor:
        number = self.plan.matrices[matrix].tensor
        tensor = self.plan.tensors[number]
        cut = tensor.stored.slices(tensor.shape, self.domain.position, box)
        return local(self.params[number])[cut]
