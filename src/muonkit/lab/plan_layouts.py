"""Layouts of a model on a mesh, as placements: what ``muonkit plan`` simulates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from muonkit.distributed.param_layout import Layout, with_state
from muonkit.distributed.placement import Axis, Placement
from muonkit.lab.errors import LabError, unknown
from muonkit.lab.shapes import ModelShape, ParameterShape

__all__ = ["LAYOUTS", "Mesh", "choose_layout", "parse_mesh", "place", "replicating"]

#: Axes of a mesh and what they are for.
AXES = {
    "dp": "data parallel: whole parameters (in fsdp, fsdp_tp and ep without an axis fsdp: shards)",
    "fsdp": "fully sharded data parallel; shard is the same",
    "tp": "tensor parallel",
    "ep": "expert parallel",
    "pp": "pipeline parallel, the first axis: every stage has an optimizer of its own",
}

#: More ranks than this are refused: a plan is made in a time that grows with them.
MOST_RANKS = 65_536


@dataclass(frozen=True)
class LayoutKind:
    """A layout by name.

    Attributes:
        summary: in a line.
        needs, may: axes that it has to have, and others that it may.
        shards: whether parameters are sharded over the data parallel ranks.
        given: whether ``dp`` is a process group, over which work is always divided.
        zero: whether the state is sharded over ``dp``.
    """

    summary: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    shards: bool = False
    given: bool = False
    zero: bool = False


LAYOUTS: dict[str, LayoutKind] = {
    "ddp": LayoutKind("parameters and state whole on every rank", ("dp",), given=True),
    "zero1": LayoutKind("parameters whole, state sharded (ZeRO-1)", ("dp",), given=True, zero=True),
    "fsdp": LayoutKind("parameters and state sharded (FSDP2)", ("fsdp",), shards=True),
    "hsdp": LayoutKind("sharded within a group, copied across", ("dp", "fsdp"), shards=True),
    "tp": LayoutKind("tensor parallel alone", ("tp",)),
    "fsdp_tp": LayoutKind("FSDP2 x TP (x copies)", ("fsdp", "tp"), ("dp",), shards=True),
    "dp_tp_zero1": LayoutKind(
        "DP x TP, state sharded over DP", ("dp", "tp"), given=True, zero=True
    ),
    "ep": LayoutKind(
        "experts on dim 0 over ep, the rest FSDP2 over fsdp and ep together (x TP)",
        ("ep",),
        ("dp", "fsdp", "tp"),
        shards=True,
    ),
}


@dataclass(frozen=True)
class Mesh:
    """Named axes from left to right; ranks are counted in row-major order, the last axis fastest.

    `stages` is the size of ``pp``, which is none of the axes.
    """

    axes: tuple[tuple[str, int], ...]
    stages: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def ranks(self) -> int:
        """The number of ranks in one pipeline stage."""
        return prod(size for _, size in self.axes)

    def __str__(self) -> str:
        stages = [f"pp={self.stages}"] if self.stages > 1 else []
        return ",".join(stages + [f"{name}={size}" for name, size in self.axes])


def parse_mesh(text: str) -> Mesh:
    """``dp=64,tp=8`` as a mesh.

    Raises:
        LabError: not written like that, an unknown axis, one twice, ``pp`` not first, or too many
            ranks.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        name = "fsdp" if name == "shard" else name
        if not equals or not number.isdecimal() or not int(number):
            raise LabError(
                f"--mesh {text!r}: {part.strip()!r} is no axis and its number of ranks, 1 or more; "
                "write --mesh dp=64,tp=8"
            )
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if name in sizes:
            raise LabError(f"--mesh {text!r}: {name} is there twice; give each axis once")
        sizes[name] = int(number)
    if "pp" in sizes and next(iter(sizes)) != "pp":
        raise LabError(
            f"--mesh {text!r}: pp comes after another axis, expected first: a stage's ranks are "
            "taken as neighbours; write --mesh pp=8,fsdp=64"
        )
    stages = sizes.pop("pp", 1)
    mesh = Mesh(tuple(sizes.items()) or (("dp", 1),), stages)
    if mesh.ranks * stages > MOST_RANKS:
        raise LabError(
            f"--mesh {text!r}: {mesh.ranks * stages:,} ranks, expected at most {MOST_RANKS:,}; "
            "leave out an axis that only repeats the others"
        )
    return mesh


def choose_layout(name: str | None, mesh: Mesh, model: ModelShape) -> tuple[str, Mesh]:
    """The layout, by default the one that the mesh's axes say, and the mesh in its terms.

    By default ``dp`` is for whole parameters with ZeRO-1 and ``fsdp`` for shards: {dp}: zero1,
    {fsdp}: fsdp, {dp, fsdp}: hsdp, {tp}: tp, {fsdp, tp}: fsdp_tp, {dp, tp}: dp_tp_zero1, anything
    with ep: ep.

    Raises:
        LabError: an unknown layout, axes that it does not have or lacks, or no experts.
    """
    if name is None:
        name = _default(mesh)
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    kind = LAYOUTS[name]
    if kind.shards and "fsdp" not in mesh.names and "dp" in mesh.names:
        renamed = tuple(("fsdp" if axis == "dp" else axis, size) for axis, size in mesh.axes)
        mesh = Mesh(renamed, mesh.stages)
    missing = [axis for axis in kind.needs if axis not in mesh.names]
    surplus = [axis for axis in mesh.names if axis not in (*kind.needs, *kind.may)]
    if missing or surplus:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(surplus)} besides"
        others = [f"--mesh {','.join(f'{axis}=8' for axis in kind.needs)}"]
        with suppress(LabError):
            others.append(f"--layout {_default(mesh)}")
        raise LabError(
            f"layout {name} needs the axes {', '.join(kind.needs)}"
            + (f" (and may have {', '.join(kind.may)})" if kind.may else "")
            + f", but the mesh {mesh} {wrong}: write {' or '.join(others)}"
        )
    if name == "ep":
        _check_experts(mesh, model)
    return name, mesh


def _default(mesh: Mesh) -> str:
    names = set(mesh.names)
    if "ep" in names:
        return "ep"
    for name in ("zero1", "fsdp", "hsdp", "tp", "fsdp_tp", "dp_tp_zero1"):
        kind = LAYOUTS[name]
        if set(kind.needs) <= names <= {*kind.needs, *kind.may}:
            return name
    raise LabError(
        f"no layout has exactly the axes of the mesh {mesh}: the layouts are "
        + "; ".join(f"{name} ({', '.join(kind.needs)})" for name, kind in LAYOUTS.items())
    )


def _check_experts(mesh: Mesh, model: ModelShape) -> None:
    if all(p.ep_dim is None for p in model.parameters):
        raise LabError(
            f"{model.name} has no experts for the axis ep of the mesh {mesh}: leave ep out, or "
            "choose qwen3-30b-a3b, deepseek-v3 or kimi-k2"
        )
    names = mesh.names
    if "fsdp" in names and abs(names.index("fsdp") - names.index("ep")) > 1:
        raise LabError(
            f"the mesh {mesh} has an axis between fsdp and ep, expected none: all but the experts "
            "is sharded over both as one; write them side by side, as fsdp=64,ep=8,tp=8"
        )


def place(p: ParameterShape, layout: str, mesh: Mesh) -> Layout:
    """The layout of a parameter.

    Stacks of experts are sharded on dim 0 over ``ep``, and over ``fsdp`` on dim 1 if there are more
    ranks than experts, as torchtitan does, else on dim 0, as FSDP2 does everything.

    Raises:
        LabError: a rank would store several parts of what two axes cut.
    """
    try:
        return _place(p.shape, p.tp_dim, p.ep_dim is not None, layout, mesh)
    except ValueError:
        raise LabError(
            f"{p.name} of shape {' x '.join(map(str, p.shape))} on the mesh {mesh} would lie in "
            "several parts on one rank, expected one rectangle: FSDP2 cuts what other axes have "
            "cut unevenly; take axes whose sizes divide it"
        ) from None


@lru_cache(maxsize=4096)
def _place(
    shape: tuple[int, ...], tp: int | None, experts: bool, layout: str, mesh: Mesh
) -> Layout:
    kind = LAYOUTS[layout]
    axes = dict(mesh.axes)
    fsdp: int | None = 0
    if experts and axes.get("fsdp", 1) * axes.get("ep", 1) > shape[0]:
        fsdp = 1
    dims = {"dp": None, "fsdp": fsdp if kind.shards else None, "tp": tp, "ep": 0}
    cuts = [_Cut(name, dims[name], size) for name, size in mesh.axes]
    if "ep" in axes and not experts:
        cuts = _merged(cuts)
    cuts = [cut if cut.size > 1 else cut._replace(dim=None) for cut in cuts]
    placement = Placement(
        tuple(cut.size for cut in cuts),
        tuple(Axis(cut.dim, _split(cut, cuts[i + 1 :])) for i, cut in enumerate(cuts)),
        range(mesh.ranks),
    )
    given = (mesh.names.index("dp"),) if kind.given else ()
    implied = tuple(i for i, cut in enumerate(cuts) if cut.axis == "tp" and tp is None)
    placement.check_order(shape)
    return with_state(placement, shape, int(kind.zero), given, implied)


class _Cut(NamedTuple):
    """The dim of a parameter that a mesh axis cuts, or none."""

    axis: str
    dim: int | None
    size: int


def _split(cut: _Cut, inner: Sequence[_Cut]) -> int:
    """FSDP shards what TP and EP have cut already, although its mesh axis stands to their left:
    DTensor's ``_StridedShard``.
    """
    if cut.axis != "fsdp" or cut.dim is None:
        return 1
    return prod(other.size for other in inner if other.dim == cut.dim)


def _merged(cuts: Sequence[_Cut]) -> list[_Cut]:
    """The cuts of a parameter that is no stack of experts: fsdp and ep are one axis on dim 0."""
    merged: list[_Cut] = []
    for cut in cuts:
        if cut.axis not in ("fsdp", "ep"):
            merged.append(cut)
        elif all(other.axis != "fsdp" for other in merged):
            size = prod(other.size for other in cuts if other.axis in ("fsdp", "ep"))
            merged.append(_Cut("fsdp", 0, size))
    return merged


def replicating(layout: str, mesh: Mesh) -> tuple[str, Mesh]:
    """The layout of AdamW's ZeRO-1 on the same ranks: data parallel ranks have whole parameters.

    Expert parallel ranks too, of everything: ZeRO-1 knows no experts.
    """
    tp = dict(mesh.axes).get("tp", 1)
    data = ("dp", mesh.ranks // tp)
    if tp > 1:
        return "dp_tp_zero1", Mesh((data, ("tp", tp)))
    return "zero1", Mesh((data,))
