"""A sample as plain dicts and numbers, from what the ranks measured; None: not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from muonkit.distributed.step_plan import plan_alone, plan_key, present_gradients
from muonkit.groups import parameter_names, scale_of, stage_names
from muonkit.monitor.sample import KINDS, Key, matrices_of
from muonkit.monitor.spectra import SPECTRUM
from muonkit.stages import STAGES

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from muonkit.optim import Muon

__all__ = [
    "FIELDS",
    "TrafficRecords",
    "chosen",
    "groups_of",
    "header_of",
    "matrices_records",
    "parameters_records",
    "structure",
]

Measured: TypeAlias = "Sequence[tuple[int, Sequence[tuple[Key, str, list[float]]]]]"
Record: TypeAlias = dict[str, Any]

# The fields of a record that a monitor may be asked to keep.
_SPECTRA = tuple(f"spectra.{measure}" for measure in (*SPECTRUM, "quantiles"))
FIELDS = (
    "lr",
    *(f"{kind}_norm" for kind in KINDS),
    "update_rms",
    "update_to_weight",
    "decay_norm",
    "decay_share",
    "orthogonality_error",
    "nonfinite",
    "owners",
    "spectra",
    *_SPECTRA,
    "ranks",
)


def chosen(sample: Record, fields: Container[str]) -> Record:
    """The sample with those of its `FIELDS` alone; names, groups and counts of members stay."""
    kept = {
        part: [_chosen(record, fields) for record in sample[part]]
        for part in ("groups", "matrices", "parameters")
    }
    return {**sample, **kept, "ranks": sample["ranks"] if "ranks" in fields else []}


def _chosen(record: Record, fields: Container[str]) -> Record:
    kept = {key: value for key, value in record.items() if key not in FIELDS or key in fields}
    if "spectra" in record and "spectra" not in fields:
        measures = [field.partition(".")[2] for field in _SPECTRA if field in fields]
        if measures:
            kept["spectra"] = {
                kind: spectrum and {measure: spectrum[measure] for measure in measures}
                for kind, spectrum in record["spectra"].items()
            }
    return kept


def structure(optimizer: Muon) -> list[Any]:
    """The optimizer's groups as a header describes them, in a form that is compared cheaply."""
    keys = ("algorithm", "view", *STAGES, "adjust_lr_fn")
    return [
        (
            *(group.get(key) for key in keys),
            tuple(group.get("param_names") or ()),
            [tuple(p.shape) for p in group["params"]],
        )
        for group in optimizer.param_groups
    ]


def header_of(optimizer: Muon) -> Record:
    """The header of a recording: all that stays the same from sample to sample."""
    groups, matrices, parameters = [], [], []
    for g, group in enumerate(optimizer.param_groups):
        muon = group["algorithm"] == "muon"
        static = {"group": g, "algorithm": group["algorithm"], "parameters": len(group["params"])}
        groups.append({**static, **({"view": group["view"]} if muon else {})})
        for name, p in zip(_names(g, group), group["params"], strict=True):
            if not muon:
                parameters.append({"name": name, "shape": list(p.shape), "group": g})
                continue
            found = matrices_of(group, p)
            for index, (_, rows, cols) in enumerate(found):
                matrices.append(
                    {
                        "name": name,
                        "index": index,
                        "of": len(found),
                        "shape": [rows, cols],
                        "view": group["view"],
                        "group": g,
                        "scale": scale_of(group, rows, cols),
                        **stage_names(group),
                    }
                )
    return {"groups": groups, "matrices": matrices, "parameters": parameters}


def _names(g: int, group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters, different from other groups' even where none were given."""
    names = parameter_names(group)
    return names if group.get("param_names") else [f"{name} of group {g}" for name in names]


def matrices_records(optimizer: Muon, measured: Measured) -> list[Record]:
    """One for each matrix that took part in the step, in the header's order."""
    found: dict[Key, dict[str, list[float]]] = {}
    owners: dict[Key, list[int]] = {}
    for rank, some in measured:
        for key, kind, numbers in some:
            if kind != "adamw":
                found.setdefault(key, {}).setdefault(kind, numbers)
                if kind == "update":
                    owners.setdefault(key, []).append(rank)
    names = [_names(g, group) for g, group in enumerate(optimizer.param_groups)]
    records = []
    at: tuple[int, int] | None = None
    places: Sequence[tuple[Any, int, int]] = ()
    for key in sorted(found):
        if at != key[:2]:  # once for each parameter: experts have many
            group = optimizer.param_groups[key.group]
            at, places = key[:2], matrices_of(group, group["params"][key.param])
        _, rows, cols = places[key.number]
        record = {"name": names[key.group][key.param], "index": key.number, "group": key.group}
        records.append({**record, **_matrix(found[key], rows * cols), "owners": owners[key]})
    return records


def _matrix(numbers: Mapping[str, list[float]], size: int) -> Record:
    decayed, lr = numbers["applied"]
    squares = {kind: _square(numbers[kind][0]) for kind in KINDS}
    squares["update"] *= _square(lr)
    record = _tensors(squares, _square(decayed), size)
    return {
        "lr": _number(lr),
        **record,
        "orthogonality_error": _number(numbers["error"][0]),
        "nonfinite": {kind: round(numbers[kind][1]) for kind in KINDS},
        "spectra": {
            kind: _spectrum(numbers[f"{kind} spectrum"])
            for kind in KINDS
            if f"{kind} spectrum" in numbers
        },
    }


def _tensors(squares: Mapping[str, float], decayed: float, size: int) -> Record:
    """Norms and their quotients, from squares: of the update and the decay as applied."""
    root = {kind: math.sqrt(square) for kind, square in squares.items()}
    both = root["update"] + math.sqrt(decayed)
    return {
        **{f"{kind}_norm": _number(root[kind]) for kind in KINDS},
        "update_rms": _number(_over(root["update"], math.sqrt(size))),
        "update_to_weight": _number(_over(root["update"], root["weight"])),
        "decay_norm": _number(math.sqrt(decayed)),
        "decay_share": _number(_over(math.sqrt(decayed), both)),
    }


def _spectrum(numbers: Sequence[float]) -> Record | None:
    if not all(math.isfinite(number) for number in numbers):
        return None
    n = len(SPECTRUM)
    return {**dict(zip(SPECTRUM, numbers[:n], strict=True)), "quantiles": list(numbers[n:])}


def parameters_records(optimizer: Muon, measured: Measured) -> list[Record]:
    """One for each of AdamW's parameters that took part in the step."""
    sums: dict[Key, list[float]] = {}
    for _, some in measured:
        for key, kind, numbers in some:
            if kind == "adamw":
                before = sums.get(key, [0.0] * len(numbers))
                sums[key] = [a + b for a, b in zip(before, numbers, strict=True)]
    records = []
    for key in sorted(sums):
        group = optimizer.param_groups[key.group]
        numbers, n = sums[key], len(KINDS)
        squares = dict(zip(KINDS, numbers[:n], strict=True))
        lr = float(group["lr"])
        decayed = _square(lr * float(group["weight_decay"])) * squares["weight"]
        records.append(
            {
                "name": _names(key.group, group)[key.param],
                "group": key.group,
                "lr": lr,
                **_tensors(squares, decayed, group["params"][key.param].numel()),
                "nonfinite": dict(zip(KINDS, map(round, numbers[n:]), strict=True)),
            }
        )
    return records


def groups_of(
    optimizer: Muon, matrices: Sequence[Record], parameters: Sequence[Record]
) -> list[Record]:
    """One for each group with records: all its matrices, or parameters, as one vector."""
    groups = []
    members: dict[int, list[Record]] = {}
    for record in (*matrices, *parameters):
        members.setdefault(record["group"], []).append(record)
    for g, group in enumerate(optimizer.param_groups):
        mine = members.get(g)
        if not mine:
            continue
        squares = {kind: sum(_square(r[f"{kind}_norm"]) for r in mine) for kind in KINDS}
        decayed = sum(_square(r["decay_norm"]) for r in mine)
        groups.append(
            {
                "group": g,
                "algorithm": group["algorithm"],
                "lr": float(group["lr"]),
                "weight_decay": float(group["weight_decay"]),
                "members": len(mine),
                **_tensors(squares, decayed, _elements(g, group, mine)),
                "nonfinite": {kind: sum(r["nonfinite"][kind] for r in mine) for kind in KINDS},
            }
        )
    return groups


def _elements(g: int, group: Mapping[str, Any], records: Sequence[Record]) -> int:
    params = dict(zip(_names(g, group), group["params"], strict=True))
    if group["algorithm"] == "adamw":
        return sum(params[record["name"]].numel() for record in records)
    places = {name: matrices_of(group, p) for name, p in params.items()}
    boxes = [places[record["name"]][record["index"]] for record in records]
    return sum(rows * cols for _, rows, cols in boxes)


def _square(number: float | None) -> float:
    # Not a power: that raises where a product is infinite.
    return math.nan if number is None else number * number


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class TrafficRecords:
    """FLOPs and bytes of every rank in a step, by the plan for the parameters with a gradient."""

    def __init__(self, optimizer: Muon) -> None:
        self._optimizer = optimizer
        self._known: tuple[Any, list[Record]] = None, []

    def records(self, rank: int) -> list[Record]:
        """Args:
        rank: this one's, where it shares its parameters with no other.
        """
        optimizer = self._optimizer
        present = present_gradients(optimizer.param_groups)
        # With the shapes: a parameter that was replaced may have the memory, and the id, of the old
        key = plan_key(optimizer.param_groups, present), structure(optimizer)
        if self._known[0] != key:
            self._known = key, self._count(rank, present)
        return self._known[1]

    def _count(self, rank: int, present: Any) -> list[Record]:
        layouts, groups = self._optimizer._layouts, self._optimizer.param_groups
        if layouts.domain is None:
            ranks, plan = [rank], plan_alone(layouts, groups, present)
        else:
            ranks = torch.distributed.get_process_group_ranks(layouts.domain.group)
            plan = self._optimizer._planned_step(present).plan
        traffic = plan.traffic()
        return [
            {
                "rank": ranks[at],
                "matrices": traffic.matrices[at],
                "gflop": traffic.flops[at] / 1e9,
                "bytes_to_owners": traffic.sent_in[at],
                "bytes_to_parameters": traffic.sent_out[at],
            }
            for at in range(plan.ranks)
        ]
