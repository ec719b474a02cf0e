"""Stages: what happens to a matrix around its orthogonalization, and to the weight's norm.

Three options take them, each a name, an object of one's own or several in a list:

- `before`: a `Stage` on the momentum, before it is orthogonalized;
- `after`: a `Stage` on the orthogonalized matrix, before scale and learning rate;
- `constraint`: a `Constraint` on the norms of the update and of the weight.

They see whole matrices in logical orientation (rows = outputs) and without padding, so the result
is the same in every layout. With U the momentum, O the orthogonalized matrix, W the weight, v zero
before the first step and every norm over one matrix:

    before
    muoneq           u_i <- u_i / ‖u_i‖, for every row                 no state
    after
    normuon          v <- lerp(v, mean over columns of O², 1 - β2)     one v per row, β2 = 0.95
                     Ô  = O / (√v + 1e-10);  O <- Ô · ‖O‖_F / ‖Ô‖_F
    adamuon          v <- lerp(v, O², 1 - β2)                          one v per entry, β2 = 0.999
                     Ô  = O / (√(v / (1 - β2ᵗ)) + 1e-8)
                     O <- Ô · √min(rows, cols) / ‖Ô‖_F
    muon_plus        O <- O · √min(rows, cols) / ‖O‖_F                 no state
    constraint
    hyperball        D = O · ‖W‖_F / ‖O‖_F;  W' = W - lr·D;  W <- W' · ‖W‖_F / ‖W'‖_F
    relative_update  D = O · ‖W‖_F / ‖O‖_F;  W <- W - lr·(decay·W + D)
    radial_brake     W' = W - lr·(decay·W + scale·O);  ‖W‖_F grows by half of what it would

Sources: MuonEq, arXiv 2603.28254 (the factor ‖U‖_F/√rows that all rows share there has no effect on
the orthogonalized matrix); NorMuon, arXiv 2510.05491 and its authors' normuon.py; AdaMuon, arXiv
2507.11005 and its authors' adamuon.py; Muon+, arXiv 2602.21545; hyperball (MuonH), relative update
and radial brake as NVIDIA's Emerging-Optimizers and public training logs have them.

Laws, for O as the orthogonalizer returns it (singular values of at most a few units), and for any
finite U: a zero matrix stays zero and nothing becomes infinite or NaN; a stack gives what its
matrices give one by one. `tests/optim/test_stages.py` holds every row of the tables to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch

from muonkit._text import unknown
from muonkit.views import row_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = [
    "AFTER",
    "BEFORE",
    "CONSTRAINTS",
    "STAGES",
    "Constraint",
    "Stage",
    "Stages",
    "check_stages",
    "constraints_of",
    "decays",
    "kept_by",
    "kept_shape",
    "kept_state",
    "listed",
    "sets_the_size",
    "stages_of",
]

State: TypeAlias = Literal["none", "rows", "entries"]

NORMUON_EPS = 1e-10
ADAMUON_EPS = 1e-8

# A smaller norm counts as none, so that a zero matrix is not 0/0 and no quotient overflows. In
# float32 a norm above it is exact: the square of 1e-15 is far from underflow.
NO_NORM = 1e-15


@dataclass(frozen=True)
class Stage:
    """A stage before or after the orthogonalization: a function on stacks of whole matrices.

    Attributes:
        name: an identifier. State dicts have it in the stage's place, ranks compare it, and
            `describe()` and the Monitor tell it.
        apply_: `apply_(O, v, beta2, step)` rewrites O and v in place:

            - O: `(N, rows, cols)`, any strides, any float dtype; computed in float32 at least;
            - v: `(N, rows, 1)` for "rows", `(N, rows, cols)` for "entries", None for "none";
              float32 or wider, any strides;
            - beta2: the group's `stage_beta2`, or the default below; 0.0 where there is neither;
            - step: how often v is updated with this call, 1 in the first, 0 where there is no v; a
              number, or a tensor (with torch.compile: a number is compiled in) that broadcasts to
              `(N, 1, 1)`. With `fraction` below 1, O and v are of the rows that a step takes, and
              `step` counts the steps.
        state: "none", "rows" (one number per row) or "entries" (one per entry); zero at first.
        beta2: the default weight of the past in v; None where it is no average.

    A new one is tried on small stacks of zeros on the CPU (a kernel for another device needs a way
    around it there): by the laws above, these stay zero.

    Raises:
        TypeError: `apply_` cannot be called like this, or returns another tensor than O.
        ValueError: no identifier, an unknown state, beta2 outside of [0, 1), or zero matrices do
            not stay zero.
    """

    name: str
    apply_: Callable[[Tensor, Tensor | None, float, float | Tensor], Any]
    state: State = "none"
    beta2: float | None = None

    def __post_init__(self) -> None:
        _check_name("stage", self.name)
        if self.state not in get_args(State):
            raise ValueError(unknown(f"state of stage {self.name!r}", self.state, get_args(State)))
        if self.beta2 is not None and not (
            isinstance(self.beta2, (int, float)) and 0 <= self.beta2 < 1
        ):
            raise ValueError(f"beta2 of stage {self.name!r} is in [0, 1), got {self.beta2!r}")
        _try(self)

    def __repr__(self) -> str:
        # Without the function's address: ranks compare this, and plans depend on the state.
        return f"Stage({self.name!r}, state={self.state!r}, beta2={self.beta2!r})"

    def __deepcopy__(self, memo: object) -> Stage:
        return self  # it cannot change


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a {what}'s name is an identifier, got {name!r:.80}")


def _try(stage: Stage) -> None:
    """Refuse a function of another form, on stacks of zeros in the dtypes that a step has."""
    form = f"stage {stage.name!r} is a function apply_(O, v, beta2, step), which rewrites O"
    sizes = {"rows": (2, 3, 1), "entries": (2, 3, 4)}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        O = torch.zeros(2, 3, 4, dtype=dtype, device="cpu")
        v = None
        if stage.state in sizes:
            kept = torch.promote_types(dtype, torch.float32)
            v = torch.zeros(sizes[stage.state], dtype=kept, device="cpu")
        try:
            returned = stage.apply_(O, v, stage.beta2 or 0.0, 1)
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"{form}, called with four arguments; on matrices in {dtype} it failed: {error}"
            ) from error
        if returned is not None and returned is not O:
            what = type(returned).__name__
            raise TypeError(f"{form} in place; it returned a {what}: write O.copy_(...) with it")
        if O.any() or (v is not None and not v.isfinite().all()):
            raise ValueError(
                f"stage {stage.name!r} makes of a matrix of zeros one that is not zero, or not "
                "finite: divide by a norm with .clamp_min(1e-15), which leaves zero at zero"
            )


@dataclass(frozen=True)
class Constraint:
    """A constraint on norms: how large the update is, and how large the weight is after it.

    It is given the Frobenius norms of a stack of whole matrices, `(N,)`, in float32 at least, over
    all ranks that have shards of them; it keeps no state.

    Attributes:
        name: an identifier, as a `Stage`'s.
        update: `update(w)`: the norm that the update gets, by the weight's norm w before the step.
            lr is then the update's relative size: there is no scale. None leaves the update.
        target: `target(old, new)`: the norm that the weight gets, by its norms before the step and
            after it. None leaves the weight.
        decays: False where weight decay has no place.

    Raises:
        TypeError: a function cannot be called like this, or does not give a tensor `(N,)`.
        ValueError: no identifier, neither function, one that writes to its arguments, or norms
            that are not finite or below 0.
    """

    name: str
    update: Callable[[Tensor], Tensor] | None = None
    target: Callable[[Tensor, Tensor], Tensor] | None = None
    decays: bool = True

    def __post_init__(self) -> None:
        _check_name("constraint", self.name)
        if self.update is None and self.target is None:
            raise ValueError(
                f"constraint {self.name!r} constrains nothing: give update(w), target(old, new) or "
                "both"
            )
        norms = torch.tensor([0.0, 1.0, 2.0], device="cpu")
        calls = {"update(w)": (self.update, 1), "target(old, new)": (self.target, 2)}
        for form, (function, count) in calls.items():
            if function is None:
                continue
            what = f"{form} of constraint {self.name!r} takes norms (N,) and gives norms (N,)"
            arguments = [norms.clone() for _ in range(count)]
            try:
                given = function(*arguments)
            except (TypeError, RuntimeError) as error:
                raise TypeError(f"{what}; called so it failed: {error}") from error
            if not isinstance(given, torch.Tensor) or given.shape != norms.shape:
                got = getattr(given, "shape", type(given).__name__)
                raise TypeError(f"{what}, and gave {got}")
            if not all(torch.equal(argument, norms) for argument in arguments):
                raise ValueError(f"{what}, and wrote to its arguments: return other tensors")
            if not (given.isfinite().all() and (given >= 0).all()):
                raise ValueError(f"{what}, finite and none below 0; for 0, 1 and 2 it gave {given}")

    def __repr__(self) -> str:
        return f"Constraint({self.name!r}, decays={self.decays!r})"

    def __deepcopy__(self, memo: object) -> Constraint:
        return self

    def holds_zero(self) -> bool:
        """Whether a weight of zeros would stay zero for ever."""
        zero, one = torch.zeros(1, device="cpu"), torch.ones(1, device="cpu")
        held = self.update is not None and not self.update(zero).any()
        return held or (self.target is not None and not self.target(zero, one).any())


def _muoneq_(U: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    # Every row by its largest magnitude first: the square of a small one would underflow. A common
    # factor has no effect: the orthogonalizer divides every matrix by its norm.
    largest = torch.maximum(U.amax(dim=-1, keepdim=True), -U.amin(dim=-1, keepdim=True))
    U.div_(largest.clamp_min_(torch.finfo(U.dtype).tiny))
    wide = torch.promote_types(U.dtype, torch.float32)
    norm = torch.linalg.vector_norm(U, dim=-1, keepdim=True, dtype=wide)
    U.div_(norm.clamp_min_(NO_NORM))


def _normuon_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    assert v is not None
    # Everything but the first and the last line is on one number per row: ‖O‖ and ‖Ô‖ follow from
    # the rows' norms, and O is read twice and written once.
    wide = torch.promote_types(O.dtype, v.dtype)
    norm = torch.linalg.vector_norm(O, dim=-1, keepdim=True, dtype=wide)
    v.lerp_((norm.square() / O.shape[-1]).to(v.dtype), 1 - beta2)
    divisor = v.sqrt().add_(NORMUON_EPS)
    before = torch.linalg.vector_norm(norm, dim=-2, keepdim=True)
    after = torch.linalg.vector_norm(norm / divisor, dim=-2, keepdim=True)
    O.mul_(before / after.clamp_min_(NO_NORM) / divisor)


def _adamuon_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    assert v is not None
    v.mul_(beta2).addcmul_(O, O, value=1 - beta2)
    # √(v / c) + ε = (√v + ε√c) / √c, and the norm takes the factor √c out again: the correction c
    # of the bias is left in ε alone.
    correction = 1 - beta2**step
    # One temporary, of v's dtype: fresh memory costs a CPU more than the arithmetic.
    quotient = v.sqrt().add_(ADAMUON_EPS * correction**0.5).reciprocal_().mul_(O)
    norm = torch.linalg.vector_norm(quotient, dim=(-2, -1), keepdim=True)
    target = min(O.shape[-2:]) ** 0.5
    O.copy_(quotient.mul_(target / norm.clamp_min_(NO_NORM)))


def _muon_plus_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    wide = torch.promote_types(O.dtype, torch.float32)
    norm = torch.linalg.vector_norm(O, dim=(-2, -1), keepdim=True, dtype=wide)
    O.mul_(min(O.shape[-2:]) ** 0.5 / norm.clamp_min_(NO_NORM))


def _norm_of_the_weight(w: Tensor) -> Tensor:
    return w


def _norm_before(old: Tensor, new: Tensor) -> Tensor:
    return old


def _half_of_the_growth(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(new > old, old + 0.5 * (new - old), new)


# The names that the options `before`, `after` and `constraint` accept. A row is all that a new
# stage needs: `muon_plus` is the shortest example.
BEFORE: dict[str, Stage] = {stage.name: stage for stage in (Stage("muoneq", _muoneq_),)}

AFTER: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("normuon", _normuon_, "rows", 0.95),
        Stage("adamuon", _adamuon_, "entries", 0.999),
        Stage("muon_plus", _muon_plus_),
    )
}

CONSTRAINTS: dict[str, Constraint] = {
    constraint.name: constraint
    for constraint in (
        Constraint("hyperball", _norm_of_the_weight, _norm_before, decays=False),
        Constraint("relative_update", _norm_of_the_weight),
        Constraint("radial_brake", None, _half_of_the_growth),
    )
}

# The table of each of the three options.
STAGES: dict[str, Mapping[str, Any]] = {
    "before": BEFORE,
    "after": AFTER,
    "constraint": CONSTRAINTS,
}

S = TypeVar("S", Stage, Constraint)


class Stages(NamedTuple):
    """What the three options of a group stand for."""

    before: tuple[Stage, ...]
    after: tuple[Stage, ...]
    constraint: tuple[Constraint, ...]


def stages_of(group: Mapping[str, Any]) -> Stages:
    """The stages of a group, whose options were checked."""
    return Stages(
        _looked_up(group["before"], BEFORE),
        _looked_up(group["after"], AFTER),
        constraints_of(group),
    )


def constraints_of(group: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """The constraints of a group, whose options were checked."""
    return _looked_up(group["constraint"], CONSTRAINTS)


def _looked_up(choice: Any, table: Mapping[str, S]) -> tuple[S, ...]:
    if not choice:
        return ()
    return tuple([table[each] if isinstance(each, str) else each for each in listed(choice)])


def listed(choice: Any) -> tuple[Any, ...]:
    """The value of one of the options as a tuple: of one that stands alone, or of none."""
    if choice is None:
        return ()
    return tuple(choice) if isinstance(choice, (tuple, list)) else (choice,)


def kept_by(group: Mapping[str, Any]) -> Stage | None:
    """The stage of a group that keeps a state, of which there is at most one."""
    before, after, _ = stages_of(group)
    for stage in (*before, *after):
        if stage.state != "none":
            return stage
    return None


def kept_state(group: Mapping[str, Any]) -> str:
    """What the stages of a group keep of a matrix: "none", "rows" or "entries"."""
    if not group["before"] and not group["after"]:  # asked for each parameter in each step
        return "none"
    stage = kept_by(group)
    return "none" if stage is None else stage.state


def sets_the_size(group: Mapping[str, Any]) -> bool:
    """Whether a constraint says how large an update is, and no scale applies."""
    return any([constraint.update is not None for constraint in constraints_of(group)])


def decays(group: Mapping[str, Any]) -> bool:
    """Whether weight decay has a place beside the constraints."""
    return all([constraint.decays for constraint in constraints_of(group)])


def kept_shape(state: str, view: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what a stage with this `state`, "rows" or "entries", keeps for a parameter."""
    return row_shape(view, shape) if state == "rows" else tuple(shape)


def check_stages(group: Mapping[str, Any]) -> None:
    """Compare the three options with what they may be; a graph may do so before each step.

    Raises:
        ValueError: neither a key of the option's table nor an object of its kind, one with the name
            of another, a name twice, or two stages that keep a state.
    """
    for option, table in STAGES.items():
        kind = Constraint if option == "constraint" else Stage
        names = []
        for choice in listed(group[option]):
            names.append(_check_one(option, choice, kind, table))
        if len(set(names)) < len(names):
            raise ValueError(f"{option}={names} has a name twice: each stage is applied once")
    before, after, _ = stages_of(group)
    keeping = [stage.name for stage in (*before, *after) if stage.state != "none"]
    if len(keeping) > 1:
        raise ValueError(
            f"{' and '.join(keeping)} keep a state each, and there is room for one: leave out all "
            "but one of them"
        )


def _check_one(option: str, choice: Any, kind: type, table: Mapping[str, Any]) -> str:
    if isinstance(choice, kind):
        name: str = choice.name  # type: ignore[attr-defined]
        if table.get(name, choice) != choice:
            raise ValueError(
                f"the name of {choice!r} is that of muonkit's own {table[name]!r}, and a state "
                "dict could not tell them apart: give it another name"
            )
        return name
    if isinstance(choice, str) and choice in table:
        return choice
    form = "update, target" if kind is Constraint else "function"
    also = (
        f", or a muonkit.{kind.__name__}(name, {form}), or several in a list. One that a state "
        f"dict names is given to the optimizer that loads it, as {option}="
    )
    raise ValueError(unknown(option, choice, table, also))
