"""What the options of a param group come to for each kind of matrix, every "auto" replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muonkit.batching import planned
from muonkit.groups import NS_OPTIONS, is_trained, momentum_dtype, scale_of, stage_names
from muonkit.newton_schulz.coefficients import resolve
from muonkit.newton_schulz.orthogonalizer import choose
from muonkit.selection import selected_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from muonkit.newton_schulz.orthogonalizer import Choice

__all__ = ["describe_group", "flops_of", "hardware_decides", "products_of"]


def describe_group(number: int, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `Muon.describe` for one group; frozen parameters are not counted."""
    params = list(filter(is_trained, group["params"]))
    if group["algorithm"] == "adamw":
        return [{"group": number, "algorithm": "adamw", "parameters": len(params)}]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for batch_rows, batch_cols, blocks in planned(params, group):
        for index, block, _ in blocks:
            p = params[index]
            choice = _choose(group, batch_rows, batch_cols, p.dtype, p.device)
            scale = scale_of(group, block.rows, block.cols)
            row = rows.setdefault(
                (block.rows, block.cols, p.dtype, p.device, batch_rows, batch_cols),
                {
                    "group": number,
                    "algorithm": "muon",
                    "view": group["view"],
                    "matrices": 0,
                    "rows": block.rows,
                    "cols": block.cols,
                    "computed_as": (batch_rows, batch_cols),
                    "ns_steps": "svd" if choice.exact else len(choice.triples),
                    "ns_form": choice.form,
                    "restarts": choice.restarts,
                    "blocks": choice.blocks,
                    "gflop": choice.flops / 1e9,
                    "ns_dtype": str(choice.dtype),
                    "ns_dtype_reason": choice.dtype_reason,
                    "momentum_dtype": str(momentum_dtype(group, p)),
                    **stage_names(group),
                    "selected": selected_shape(group, block.rows, block.cols),
                    "period": group["period"],
                    "scale": scale,
                    "lr": float(group["lr"]) * scale,
                },
            )
            row["matrices"] += block.batch
    return list(rows.values())


def hardware_decides(group: Mapping[str, Any]) -> bool:
    """Whether the dtype of the products of a group of Muon's depends on the hardware."""
    if str(group["ns_dtype"]) != "auto":
        return False
    iterations = resolve(group["ns_coefficients"], group["ns_steps"])
    if iterations.strict or iterations.exact:
        return False
    return any(p.dtype != torch.float64 and is_trained(p) for p in group["params"])


def flops_of(
    group: dict[str, Any], rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> int:
    """FLOPs of one matrix of this shape."""
    m, n = sorted((rows, cols))
    # The exact factor has no product of ours; an SVD takes about 20 times m^2 n.
    return _choose(group, rows, cols, dtype, device).flops or 20 * m * m * n


def products_of(
    group: dict[str, Any], rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> str:
    """The products of matrices of this shape in words, every "auto" replaced."""
    choice = _choose(group, rows, cols, dtype, device)
    blocks = f" in {choice.blocks} blocks" if choice.blocks > 1 else ""
    return f"{choice.form} in {str(choice.dtype).removeprefix('torch.')}{blocks}"


def _choose(
    group: dict[str, Any], rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    coefficients, steps, form, ns_dtype = (group[key] for key in NS_OPTIONS)
    return choose(coefficients, steps, form, ns_dtype, dtype, device, rows, cols)
