"""Param groups: completed with defaults, and refused with the remedy when they make no sense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muonkit.coefficients import resolve
from muonkit.orthogonalize import resolve_dtype, resolve_form
from muonkit.scale import scale_factor
from muonkit.views import View, blocks_of

__all__ = ["complete_group", "describe_group", "parameter_names", "validate_group"]

ALGORITHMS = ("muon", "adamw")
NONFINITE = ("propagate", "skip", "raise")


def complete_group(
    group: dict[str, Any], defaults: dict[str, Any], named: bool | None = None
) -> dict[str, Any]:
    """A copy of the group with its algorithm, view and AdamW's own defaults filled in.

    Muon's defaults are left to `Optimizer.add_param_group`.

    Args:
        named: whether the optimizer's other groups have names, which torch wants to be equal in
            all; None if there are none yet.

    Raises:
        KeyError: no "params".
        ValueError: unknown or contradictory algorithm; an AdamW group whose lr would be Muon's in
            units that mean nothing to it.
        TypeError: not a dict.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a param group is a dict, got {type(group).__name__}")
    group = {**group, "params": _named(group["params"], named)}
    if "use_muon" in group:  # Keller Jordan's spelling
        said = "muon" if group["use_muon"] else "adamw"
        if group.setdefault("algorithm", said) != said:
            raise ValueError(
                f"a group says use_muon={group['use_muon']} and algorithm={group['algorithm']!r}; "
                "give one of them"
            )
    algorithm = group.setdefault("algorithm", "muon")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; it is one of 'muon', 'adamw'")
    if algorithm == "muon":
        group["view"] = str(View.parse(group.get("view", "matrix")))
        if "ns_dtype" in group:
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        return group
    own = defaults["_adamw"]
    if "lr" not in group and own["lr"] is None and defaults["adjust_lr_fn"] != "match_rms_adamw":
        raise ValueError(
            "an AdamW group has no lr of its own, and Muon's is in other units unless "
            "adjust_lr_fn='match_rms_adamw'; add 'lr' to the group or give adamw_lr"
        )
    for key, value in own.items():
        if value is not None:
            group.setdefault(key, value)
    return group


def _named(params: Any, named: bool | None) -> list[Any]:
    """The parameters with names, without, or as they are (None)."""
    if isinstance(params, set):
        raise TypeError(
            "parameters need an order that is the same every time: give a list, not a set"
        )
    items = [params] if isinstance(params, Tensor) else list(params)
    if named is None:
        return items
    bare = [item[1] if isinstance(item, tuple) else item for item in items]
    if not named:
        return bare
    names = [item[0] if isinstance(item, tuple) else f"added.{i}" for i, item in enumerate(items)]
    return list(zip(names, bare, strict=True))


def validate_group(group: dict[str, Any]) -> None:
    """Refuse options out of range, and parameters that the group's algorithm cannot train.

    Raises:
        ValueError, TypeError, RuntimeError: as documented in `Muon`.
    """
    _validate_options(group)
    for name, p in zip(parameter_names(group), group["params"], strict=True):
        _validate_parameter(name, p, group)


def _validate_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    # torch.optim.Muon's words; `not 0 <= x` also catches NaN.
    if not 0.0 <= lr:
        raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"weight decay should be >= 0 but is: {group['weight_decay']}")
    if not 0.0 <= group["eps"]:
        raise ValueError(f"eps should be >= 0 but is: {group['eps']}")
    if group["nonfinite"] not in NONFINITE:
        options = ", ".join(map(repr, NONFINITE))
        raise ValueError(f"unknown nonfinite {group['nonfinite']!r}; it is one of {options}")
    if group["algorithm"] == "adamw":
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas should be two numbers in [0, 1) but are: {betas}")
        return
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum should be >= 0 and < 1 but is: {group['momentum']}")
    scale_factor(group["adjust_lr_fn"], 1, 1)
    iterations = resolve(group["ns_coefficients"], group["ns_steps"])
    resolve_form(group["ns_form"])
    resolve_dtype(group["ns_dtype"], torch.float32, torch.device("cpu"), iterations.strict)


def _validate_parameter(name: str, p: Tensor, group: dict[str, Any]) -> None:
    shape = tuple(p.shape)
    if p.is_complex():
        raise RuntimeError(
            f"Muon does not support complex parameters: {name} of shape {shape} is {p.dtype}; "
            "train torch.view_as_real of it with AdamW"
        )
    if not p.is_floating_point():
        raise TypeError(
            f"{name} of shape {shape} is {p.dtype}: only floating-point parameters are trained; "
            "leave it out, or make it a buffer"
        )
    if p.layout != torch.strided:
        raise RuntimeError(
            f"Muon does not support sparse parameters: {name} has layout {p.layout}; "
            "make it dense, or train it with torch.optim.SparseAdam"
        )
    if group["algorithm"] == "muon":
        if p.ndim != 2 and group["view"] == "matrix":
            hint = (
                "train it with AdamW"
                if p.ndim < 2
                else "give its group a view: 'flatten' (convolution), 'experts' (E x m x n)"
            )
            raise ValueError(
                "Muon only supports 2D parameters without a view whereas we found a parameter "
                f"with size: {shape} ({name}); {hint}"
            )
        try:
            blocks_of(group["view"], p.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def parameter_names(group: dict[str, Any]) -> list[str]:
    """A name for every parameter of the group, for errors."""
    names = group.get("param_names")
    return list(names) if names else [f"parameter {i}" for i in range(len(group["params"]))]


def describe_group(number: int, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `Muon.describe` for one group."""
    if group["algorithm"] == "adamw":
        return [{"group": number, "algorithm": "adamw", "parameters": len(group["params"])}]
    iterations = resolve(group["ns_coefficients"], group["ns_steps"])
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in group["params"]:
        for block in blocks_of(group["view"], p.shape):
            scale = scale_factor(group["adjust_lr_fn"], block.rows, block.cols)
            row = rows.setdefault(
                (block.rows, block.cols, p.dtype, p.device),
                {
                    "group": number,
                    "algorithm": "muon",
                    "view": group["view"],
                    "matrices": 0,
                    "rows": block.rows,
                    "cols": block.cols,
                    "ns_steps": "svd" if iterations.exact else len(iterations.triples),
                    "ns_form": "svd" if iterations.exact else resolve_form(group["ns_form"]),
                    "ns_dtype": str(
                        resolve_dtype(group["ns_dtype"], p.dtype, p.device, iterations.strict)
                    ),
                    "scale": scale,
                    "lr": float(group["lr"]) * scale,
                },
            )
            row["matrices"] += block.batch
    return list(rows.values())
