"""What a param group may say: options in range, and parameters that its algorithm can train."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from muonkit._shards import WHOLE, unplaced_shard
from muonkit._text import unknown
from muonkit.distributed.layout import is_dtensor, local, own_layout
from muonkit.groups import ALGORITHMS, NS_OPTIONS, is_trained, keeps_int8, parameter_names
from muonkit.int8 import scale_shape
from muonkit.newton_schulz.orthogonalizer import check_choice
from muonkit.options import CHOICES, FILLS, OF_ALGORITHM
from muonkit.scale import check_scale
from muonkit.selection import check_selection
from muonkit.stages import check_stages, constraints_of
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "OF_PARAMETERS",
    "holds_zeros",
    "refuse_zero_weights",
    "validate_defaults",
    "validate_group",
    "validate_options",
    "validate_parameters",
]


def validate_defaults(defaults: dict[str, Any]) -> None:
    """Refuse constructor arguments out of range, before there is a group.

    Raises:
        ValueError, TypeError: as `validate_group`.
    """
    validate_group({**defaults, "algorithm": "muon", "params": []})
    adamw = {key: defaults[name] for key, name in FILLS.items()}
    given = {key: value for key, value in adamw.items() if value is not None}
    if isinstance(defaults["weight_decay"], Tensor):
        given.setdefault("weight_decay", 0.0)  # a group that takes Muon's is refused when it comes
    validate_group({**defaults, **given, "algorithm": "adamw", "params": []})


def validate_group(group: dict[str, Any]) -> None:
    """Refuse options out of range, and parameters that the group's algorithm cannot train.

    Raises:
        ValueError, TypeError, RuntimeError: as documented in `Muon`.
    """
    validate_options(group)
    validate_parameters(group)


# The options by which `validate_parameters` judges.
OF_PARAMETERS = ("algorithm", "view", "momentum_dtype", "adjust_lr_fn", "constraint")


def validate_parameters(group: dict[str, Any]) -> None:
    """Refuse parameters that the algorithm of the group cannot train with its options.

    Raises:
        ValueError, TypeError, RuntimeError: there is one.
    """
    for name, p in zip(parameter_names(group), group["params"], strict=True):
        _validate_parameter(name, p, group)


# A graph looks at these: classes stand in tuples, since torch 2.9's graphs have no `int | float`.
def validate_options(group: dict[str, Any]) -> None:
    """Refuse options out of range.

    Raises:
        ValueError, TypeError: there is one.
    """
    _validate_keys(group)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    # The first words are torch.optim.Muon's.
    _validate_number("Learning rate", lr)
    decay = group["weight_decay"]
    if isinstance(decay, Tensor) and (group["algorithm"] == "adamw" or decay.numel() != 1):
        raise TypeError(
            "weight decay is a number, or a 1-element tensor for Muon's groups, but is: "
            f"{decay!r}; AdamW's own is adamw_wd"
        )
    _validate_number("weight decay", decay)
    _validate_number("eps", group["eps"])
    _validate_choice(group, "nonfinite")
    for key in ("maximize", "nesterov", "cautious"):
        if key in group and not isinstance(group[key], (bool, int)):
            raise TypeError(f"{key} should be True or False but is: {group[key]!r}")
    if group["algorithm"] == "adamw":
        betas: Any = group.get("betas")
        two = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not two or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas should be two numbers in [0, 1) but are: {betas}")
        return
    _validate_number("momentum", group["momentum"], below=1.0)
    check_scale(group["adjust_lr_fn"])
    check_choice(*(group[key] for key in NS_OPTIONS))
    for key in ("momentum_dtype", "exchange_dtype", "replicas", "selection"):
        _validate_choice(group, key)
    check_stages(group)
    check_selection(group)
    period = group["period"]
    if isinstance(period, bool) or not isinstance(period, Integral):
        raise TypeError(f"period is a whole number of steps, got {period!r}")
    if period < 1:
        raise ValueError(
            f"period should be at least 1 (whole matrices in every step) but is: {period}"
        )
    if group["period"] > 1 and group["fraction"] < 1:
        raise ValueError(
            f"period={period} orthogonalizes blocks of matrices, and fraction={group['fraction']} "
            "some rows of whole ones: give one of them; selection='local' sends a fraction of the "
            "bytes too"
        )
    _validate_number("block_lr_factor", group["block_lr_factor"])
    if group["stage_beta2"] is not None:
        _validate_number("stage_beta2", group["stage_beta2"], below=1.0)
    cap = group["bytes_in_flight"]
    if isinstance(cap, bool) or not isinstance(cap, (Integral, type(None))):
        raise TypeError(f"bytes_in_flight is a whole number of bytes or None, got {cap!r}")
    if cap is not None and cap < 1:
        raise ValueError(f"bytes_in_flight should be at least 1 but is: {cap}")


def holds_zeros(group: Mapping[str, Any]) -> list[str]:
    """The constraints of a group that keep a matrix of zeros as it is."""
    if group["algorithm"] != "muon":
        return []
    return [c.name for c in constraints_of(group) if c.holds_zero()]


@torch.no_grad()
def refuse_zero_weights(group: Mapping[str, Any], together: bool = True) -> None:
    """Refuse matrices of zeros where a constraint would keep them so; frozen ones may be zero.

    Args:
        together: all ranks that have shards of a weight call this; else those are not looked at.
            Of a weight in shards a matrix is zero where all its parts are.

    Raises:
        ValueError: there is one.
    """
    holding = holds_zeros(group)
    if not holding:
        return
    by_mesh: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, p in zip(parameter_names(group), group["params"], strict=True):
        mesh = p.device_mesh if is_dtensor(p) else None
        if is_trained(p) and not p.is_meta and p.numel() and (together or mesh is None):
            by_mesh.setdefault(mesh, []).append((name, p))
    for mesh, named in by_mesh.items():
        each = [_filled(name, p, group["view"]) for name, p in named]
        filled = torch.cat(each).to(torch.int32)
        if mesh is not None:  # shards that are kept on the CPU are not where the ranks meet
            filled = filled.to(mesh.device_type)
            for axis in range(mesh.ndim):
                most = torch.distributed.ReduceOp.MAX
                torch.distributed.all_reduce(filled, most, group=mesh.get_group(axis))
        by_weight = torch.split(filled.to("cpu"), [len(one) for one in each])
        for (name, p), matrices in zip(named, by_weight, strict=True):
            if not matrices.all():
                part = "" if len(matrices) == 1 else f"matrix {int(matrices.argmin())} of "
                raise ValueError(
                    f"{part}{name} {tuple(p.shape)} is zero, and constraint={holding[0]!r} keeps "
                    "the size of its updates or of itself in proportion to it: it would stay zero. "
                    "Begin it at other values, or give it a group (or Rule) with another "
                    "constraint, as options={'constraint': ()}"
                )


def _filled(name: str, p: Tensor, view: str) -> Tensor:
    """For each matrix of a weight, whether this rank's part of it has an entry that is not zero
    (NaN is one), on the CPU.
    """
    shape, own = tuple(p.shape), local(p)
    blocks = blocks_of(view, shape)
    if not is_dtensor(p):
        regions = [block.to_matrices(block.region(p)) for block in blocks]
        return torch.cat([(matrices != 0).flatten(1).any(1) for matrices in regions]).cpu()
    layout = own_layout(name, p)
    at, placement = layout.at, layout.param_placement
    return torch.tensor(
        [
            any(
                bool((own[placement.slices(shape, at, part)] != 0).any())
                for part in placement.parts(shape, at, box)
            )
            for block in blocks
            for box in block.boxes()
        ],
        device="cpu",
    )


def _validate_choice(group: Mapping[str, Any], key: str) -> None:
    if group[key] not in CHOICES[key]:
        raise ValueError(unknown(key, group[key], CHOICES[key]))


def _validate_keys(group: dict[str, Any]) -> None:
    """Refuse a group whose algorithm was changed, or whose options were deleted, after it was made.

    Raises:
        ValueError: an option is missing.
    """
    if group["algorithm"] not in ALGORITHMS:
        raise ValueError(unknown("algorithm", group["algorithm"], ALGORITHMS))
    for key in OF_ALGORITHM[group["algorithm"]]:
        if key not in group:
            raise ValueError(
                f"a group of {group['algorithm']} has no {key!r}: put it back; for another "
                "algorithm make the optimizer anew"
            )


def _validate_number(what: str, value: Any, below: float = math.inf) -> None:
    # A float is asked nothing that would make it a constant of a graph.
    if not isinstance(value, (int, float, Tensor)) and not _is_numpy_number(value):
        cast = "; write float(...)" if hasattr(value, "__float__") else ""
        raise TypeError(f"{what} should be a number but is: {value!r}{cast}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{what} should be one number but has the shape {tuple(value.shape)}")
    if not 0.0 <= value < below:  # also false for NaN
        upper = f" and < {below:g}" if below < math.inf else ""
        raise ValueError(f"{what} should be >= 0{upper} but is: {value}")


def _is_numpy_number(value: Any) -> bool:
    """Whether it is a scalar of numpy's, which torch takes for a number, as it does no array."""
    return isinstance(value, Real) and hasattr(value, "dtype")


def _is_expanded(p: Tensor) -> bool:
    if p.layout != torch.strided or is_dtensor(p):
        return False
    return any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride(), strict=True))


def _validate_parameter(name: str, p: Tensor, group: dict[str, Any]) -> None:
    if isinstance(p, UninitializedParameter):
        raise ValueError(
            f"{name} is not initialized: run one batch through the lazy module before the "
            "optimizer is made"
        )
    shape = tuple(p.shape)
    if is_trained(p) and _is_expanded(p):
        raise ValueError(
            f"{name} of shape {shape} is expanded: several of its entries are one number in "
            "memory, which cannot be written to entry by entry. Make it of a copy, "
            "nn.Parameter(tensor.clone()), or train the smaller tensor that it was expanded from"
        )
    if p.is_complex() and group["algorithm"] == "muon":
        raise RuntimeError(
            f"Muon does not support complex parameters: {name} of shape {shape} is {p.dtype}; "
            "AdamW trains it ('algorithm': 'adamw' in its group, Rule(name, algorithm='adamw')); "
            "Rule(name, algorithm='ignore') leaves it out"
        )
    if p.is_complex():
        return
    if not p.is_floating_point() or p.dtype.itemsize < 2:
        raise TypeError(
            f"{name} of shape {shape} is {p.dtype}: only floating-point parameters of at least 16 "
            "bits are trained; leave it out, or make it a buffer"
        )
    if p.layout != torch.strided:
        raise RuntimeError(
            f"Muon does not support sparse parameters: {name} has layout {p.layout}; "
            "make it dense, or train it with torch.optim.SparseAdam"
        )
    shard = unplaced_shard(p)
    # AdamW may train any part of a parameter; ZeRO-3's parameters hold nothing yet.
    if shard is not None and (group["algorithm"] == "muon" or hasattr(p, "ds_id")):
        raise ValueError(f"{name} of shape {shape} is {shard}")
    if group["algorithm"] == "muon":
        if p.ndim != 2 and group["view"] == "matrix":
            hint = (
                f"train it with AdamW, unless it is a flat shard (FSDP1, DeepSpeed's ZeRO): {WHOLE}"
                if p.ndim < 2
                else "give its group a view: 'flatten' (convolution), 'experts' (E x m x n)"
            )
            raise ValueError(
                "Muon only supports 2D parameters without a view whereas we found a parameter "
                f"with size: {shape} ({name}); {hint}"
            )
        try:
            blocks = blocks_of(group["view"], shape)
            if keeps_int8(group):
                scale_shape(group["view"], shape)
        except ValueError as error:
            hint = f"; if it is a flat shard (FSDP1, DeepSpeed's ZeRO): {WHOLE}" * (p.ndim < 2)
            raise ValueError(f"{name}: {error}{hint}") from None
        holding = [c.name for c in constraints_of(group) if c.target is not None]
        if holding and p.dtype.itemsize == 2:
            raise ValueError(
                f"{name} {shape} is {p.dtype}, which constraint={holding[0]!r} cannot hold to a "
                "norm: a correction of less than 2^-9 is rounded away. Keep the weights in "
                "float32, as FSDP2's MixedPrecisionPolicy and autocast do, or give it a group (or "
                "Rule) with another constraint"
            )
        for block in blocks:
            check_scale(group["adjust_lr_fn"], block.rows, block.cols)
