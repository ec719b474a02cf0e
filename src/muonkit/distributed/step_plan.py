"""The planned step over several ranks: what this rank computes of its own, what ranks compute for
one another, and what has to be equal on all ranks before anything is sent.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from muonkit.describe import flops_of, hardware_decides, products_of
from muonkit.distributed.layout import local
from muonkit.distributed.machines import machine
from muonkit.distributed.outbound import Outbound
from muonkit.distributed.param_layout import ONE_RANK, computed_in_place
from muonkit.distributed.plan import StepPlan, fingerprint
from muonkit.distributed.plan_batches import cap_of
from muonkit.distributed.planner import GroupToPlan, ParamToPlan, check_blocks, plan_step
from muonkit.distributed.sharded import ShardedGroup, exchange_dtype, stage_dtype
from muonkit.gradients import lies_elsewhere
from muonkit.groups import is_trained, parameter_names
from muonkit.newton_schulz.dtypes import auto_in_words
from muonkit.options import OPTION_KEYS, PLANNING, spelled
from muonkit.period import PERIOD_STEP, has_period
from muonkit.selection import selected_shape
from muonkit.stages import kept_state
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.layout import Layouts
    from muonkit.distributed.param_layout import Layout
    from muonkit.distributed.planner import PlannedParams

__all__ = [
    "Gather",
    "PlannedStep",
    "Present",
    "options_to_compare",
    "plan_alone",
    "plan_key",
    "present_gradients",
    "products_label",
    "refuse_cut_rows",
]


class Gradient(NamedTuple):
    """A gradient's dtype, and how it lies if that is not as its parameter."""

    dtype: torch.dtype
    placements: Any = None


# Per group: the parameters that have a gradient, by index.
Present: TypeAlias = "Sequence[Mapping[int, Gradient]]"


def present_gradients(groups: Sequence[Mapping[str, Any]], all_of_them: bool = False) -> Present:
    """The gradients that are there now; or one in its parameter's dtype for all that is trained."""
    if all_of_them:
        return [
            {i: Gradient(p.dtype) for i, p in enumerate(group["params"]) if is_trained(p)}
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
            # A trained parameter counts where it is computed, also without a gradient.
            tuple([(id(p), p.requires_grad) for p in group["params"]]),
            tuple(has.items()),
        )
        for group, has in zip(groups, present, strict=True)
    )


def options_to_compare(groups: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The hyperparameters; a tensor's value only where it is on the CPU."""
    return [
        (f"group {number}'s {key}", _shown(group[key]))
        for number, group in enumerate(groups)
        for key in (*OPTION_KEYS, *((PERIOD_STEP,) if has_period(group) else ()))
        if key in group
    ]


def choices_to_compare(layouts: Layouts, groups: Sequence[dict[str, Any]]) -> dict[str, str]:
    """This rank's choices where options leave one, and options that no group has."""
    assert layouts.domain is not None
    device = layouts.domain.device
    compared = {"zero": str(layouts.zero), "the exchange's device": device.type}
    for number, group in enumerate(groups):
        if group["algorithm"] == "adamw":
            continue
        kinds = {
            (block.rows, block.cols, p.dtype)
            for p in filter(is_trained, group["params"])
            for block in blocks_of(group["view"], p.shape)
            if block.rows * block.cols
        }
        products = {
            products_of(group, *selected_shape(group, rows, cols), dtype, device)
            for rows, cols, dtype in kinds
        }
        said = sorted(products)
        if hardware_decides(group):
            # Of what is really computed (blocks, rows of shards) the shapes are others.
            said.append(f'"auto" is {auto_in_words(device)}')
        compared[products_label(number)] = ", ".join(said)
    return compared


def products_label(number: int) -> str:
    """The name under which ranks compare the products of a group."""
    return f"group {number}'s products"


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(spelled(value) if callable(value) else value)
    # Reading it from another device would wait for all that is queued there.
    return repr(value.item()) if value.device.type == "cpu" else "a tensor"


class PlannedStep:
    """The plan of one step, and what this rank needs to carry it out.

    Args:
        in_blocks: for each group, whether the step is one of blocks (see `muonkit.period`).

    Attributes:
        own: for each group, the indices of the parameters that are computed where they are.
        sharded_groups: for each group, Muon's other parameters, by dtypes.
        gathers: AdamW's parameters whose state is sharded and which themselves are not.
        plan: who computes and sends what.
        compared: what has to be equal on all ranks, by name.
    """

    def __init__(
        self,
        layouts: Layouts,
        groups: Sequence[dict[str, Any]],
        present: Present,
        in_blocks: Sequence[bool],
    ) -> None:
        domain = layouts.domain
        assert domain is not None
        rates = machine(domain.device.type, domain.node)
        to_plan = [
            _to_plan(layouts, groups, number, has, in_blocks[number])
            for number, has in enumerate(present)
        ]
        self.plan, planned = plan_step(to_plan, rates, domain.size)
        self.own = [list(group.own) for group in planned]
        self.sharded_groups: list[list[ShardedGroup]] = []
        self.gathers: list[Gather] = []
        self.compared: dict[str, str] = choices_to_compare(layouts, groups)
        for number, (group, part) in enumerate(zip(groups, planned, strict=True)):
            self._compare_params(layouts, number, group, present[number])
            adamw = group["algorithm"] == "adamw"
            grads = {index: grad.dtype for index, grad in present[number].items()}
            if adamw:
                self.gathers += [Gather(domain, group, shared) for shared in part.shared]
            self.sharded_groups.append(
                [] if adamw else [ShardedGroup(domain, group, grads, s) for s in part.shared]
            )
        for number, part in enumerate(planned):
            tensors = [tensor for shared in part.shared for tensor in shared.plan.tensors]
            if tensors and groups[number]["algorithm"] == "muon":
                again = {tensor.repeat for tensor in tensors} - {()}
                along = f"computed again along mesh axes {sorted(again)}" if again else "divided"
                self.compared[f"group {number}'s replicas as chosen"] = along
        exchanged = [shared.plan for part in planned for shared in part.shared]
        self.compared["the plan"] = fingerprint(exchanged)

    def _compare_params(
        self, layouts: Layouts, number: int, group: Mapping[str, Any], has: Mapping[int, Gradient]
    ) -> None:
        """Add what ranks have to have alike of each parameter that several of them have."""
        named = zip(parameter_names(group), group["params"], strict=True)
        view = None if group["algorithm"] == "adamw" else group["view"]
        for index, (name, p) in enumerate(named):
            layout, grad = layouts.get(p), has.get(index)
            if layout is None or layout.alone:
                continue
            replicas = group.get("replicas", "auto")
            in_place = computed_in_place(layout, tuple(p.shape), view, replicas)
            if view is not None and _may_lack_a_gradient(layout, in_place, grad):
                continue
            ours = name in self.compared or not group.get("param_names")
            self.compared[f"group {number}'s {name}" if ours else name] = _described(
                p, layout, grad
            )


def plan_alone(layouts: Layouts, groups: Sequence[dict[str, Any]], present: Present) -> StepPlan:
    """The plan of a step whose parameters no other rank shares."""
    to_plan = [_to_plan(layouts, groups, number, has) for number, has in enumerate(present)]
    plan, _ = plan_step(to_plan, machine("cpu", 1), ranks=1)
    return plan


def refuse_cut_rows(layouts: Layouts, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse groups whose steps of blocks would not have what a stage needs.

    Raises:
        ValueError: as `check_blocks`.
    """
    for number, group in enumerate(groups):
        if layouts.domain is not None and has_period(group) and kept_state(group) == "rows":
            check_blocks(_to_plan(layouts, groups, number, {}, in_blocks=True))


def _to_plan(
    layouts: Layouts,
    groups: Sequence[dict[str, Any]],
    number: int,
    has: Mapping[int, Gradient],
    in_blocks: bool = False,
) -> GroupToPlan:
    """A param group as the planner knows it: of its parameters those that are trained."""
    group, domain = groups[number], layouts.domain
    adamw = group["algorithm"] == "adamw"
    params: dict[int, ParamToPlan] = {}
    names = parameter_names(group)
    for index, p in enumerate(group["params"]):
        if index not in has and (domain is None or not p.requires_grad):
            continue
        grad_dtype = has[index].dtype if index in has else p.dtype
        device = p.device if domain is None else domain.device
        comm_dtype = p.dtype if adamw else exchange_dtype(p, grad_dtype, group)
        params[index] = ParamToPlan(
            names[index],
            tuple(p.shape),
            layouts.get(p) or ONE_RANK,
            (p.dtype, grad_dtype, device),
            comm_dtype.itemsize,
            stage_dtype(p).itemsize,
            has_grad=index in has,
        )
    kind = "cpu" if domain is None else domain.device.type
    if adamw:
        caps = [other["bytes_in_flight"] for other in groups if other["algorithm"] == "muon"]
        return GroupToPlan(params, None, _no_flops, cap_of(kind, caps[0] if caps else None))
    return GroupToPlan(
        params,
        group["view"],
        partial(_flops, group),
        cap_of(kind, group["bytes_in_flight"]),
        group["replicas"],
        kept_state(group),
        group["fraction"],
        group["selection"],
        in_blocks,
    )


def _flops(group: dict[str, Any], kind: Any, rows: int, cols: int) -> int:
    dtype, _, device = kind
    return flops_of(group, rows, cols, dtype, device)


def _no_flops(kind: Any, rows: int, cols: int) -> int:
    return 0


def _may_lack_a_gradient(layout: Layout, in_place: bool, grad: Gradient | None) -> bool:
    """Whether a rank may be without a gradient that others have: experts that nobody routed to."""
    copies = [axis for axis in layout.param_placement.copies() if axis not in layout.implied]
    cut = any(axis.dim is not None for axis in layout.param_placement.axes)
    return in_place and cut and not copies and (grad is None or grad.placements is None)


def _described(p: Tensor, layout: Layout, grad: Gradient | None) -> str:
    has = "no gradient" if grad is None else f"a gradient in {grad.dtype}"
    if grad is not None and grad.placements is not None:
        has += f" with {grad.placements}"
    return f"{tuple(p.shape)} in {p.dtype}, {layout.param_placement.described()}, {has}"


class Gather:
    """AdamW's parameters of which every rank updates one part and receives the other parts."""

    def __init__(self, domain: Domain, group: Mapping[str, Any], shared: PlannedParams) -> None:
        self.domain, self.plan = domain, shared.plan
        self.params: list[Tensor] = [group["params"][index] for index in shared.params]
        self.dtype = self.params[0].dtype
        self._buckets = [
            Outbound(self.plan, bucket, domain.position) for bucket in self.plan.buckets
        ]

    def tasks(self) -> list[Iterator[None]]:
        """The exchanges of a step, once this rank has updated its parts."""
        return [self._task(bucket) for bucket in self._buckets]

    def _task(self, bucket: Outbound) -> Iterator[None]:
        outgoing = [(at, self._piece(matrix, box)) for at, matrix, box in bucket.sends]
        pending = bucket.send(self.domain, None, outgoing, self._piece, self.dtype)
        yield from pending.arrive()
        pending.wait()

    def _piece(self, matrix: int, box: Any) -> Tensor:
        number = self.plan.matrices[matrix].tensor
        tensor = self.plan.tensors[number]
        cut = tensor.param_placement.slices(tensor.shape, self.domain.position, box)
        return local(self.params[number])[cut]
