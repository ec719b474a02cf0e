"""The Muons that `muonkit.convert` knows, written anew from their equations, as short as they go.

Products are in float32 (theirs are in bfloat16), so that a conversion is compared to rounding. What
is kept, and what options are called, is as in the sources that muonkit/convert/formats.py names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from muonkit import orthogonalize


def exactly(matrix: Tensor, coefficients: Any = "keller", steps: int = 5) -> Tensor:
    """Orthogonalize in float32, whatever the source does it in."""
    return orthogonalize(matrix, ns_coefficients=coefficients, ns_steps=steps, ns_dtype="float32")


class _Other(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.clone(), self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Keller(_Other):
    """SingleDeviceMuon, and SingleDeviceMuonWithAuxAdam where groups say `use_muon`."""

    def __init__(self, groups: Any) -> None:
        for group in (group for group in groups if isinstance(group, dict)):
            own = {"lr": 0.02, "momentum": 0.95}
            if not group["use_muon"]:
                own = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10}  # type: ignore[dict-item]
            group.update({**own, "weight_decay": 0, **group})
        alone = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0}
        super().__init__(groups, {} if isinstance(groups[0], dict) else alone)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group.get("use_muon", True):
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(g, 1 - group["momentum"])
            u = g.lerp(momentum, group["momentum"])
            o = exactly(u.flatten(1) if u.ndim == 4 else u).view_as(p)
            p.add_(o, alpha=-group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)
            return
        t = state["step"] = state.get("step", 0) + 1
        mean, square = _moments(state, "exp_avg", "exp_avg_sq", g, *group["betas"])
        corrected = [m / (1 - b**t) for m, b in zip((mean, square), group["betas"], strict=True)]
        p.add_(corrected[0] / (corrected[1].sqrt() + group["eps"]), alpha=-group["lr"])


class Moonlight(_Other):
    """Its Muon; of a convolution it keeps the matrix, as copies of it that take convolutions do."""

    def __init__(
        self, muon_params: Sequence[Tensor], adamw_params: Sequence[Tensor], **options: Any
    ) -> None:
        own = {"lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
        adamw = {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
        super().__init__([*muon_params, *adamw_params], {**own, **adamw, **options})
        for params, muon in ((muon_params, True), (adamw_params, False)):
            for p in params:
                self.state[p]["use_muon"] = muon

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr = group["lr"]
        p.mul_(1 - lr * group["wd"])
        if state["use_muon"]:
            g = g.flatten(1)
            total = state.setdefault("momentum_buffer", torch.zeros_like(g))
            total.mul_(group["momentum"]).add_(g)
            u = g + group["momentum"] * total if group["nesterov"] else total
            scale = 0.2 * math.sqrt(max(p.shape[:2]))
            p.add_(exactly(u).view_as(p), alpha=-lr * scale)
            return
        t = state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["adamw_betas"]
        mean, square = _moments(state, "moment1", "moment2", g, beta1, beta2)
        scale = (1 - beta1**t) / (1 - beta2**t) ** 0.5
        p.add_(mean / (group["adamw_eps"] + square.sqrt()), alpha=-lr / scale)


class Keller2024(Moonlight):
    """Keller Jordan's first version, which Moonlight's comes from."""

    def __init__(self, muon_params: Sequence[Tensor], adamw_params: Sequence[Tensor]) -> None:
        own = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
        own |= {"adamw_lr_ratio": 0.1, "adamw_betas": (0.95, 0.95), "adamw_wd": 0.1}
        super().__init__(muon_params, adamw_params, **own)
        del self.param_groups[0]["wd"]

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state["use_muon"]:  # its scale is that of the matrix
            rows, cols = p.flatten(1).shape
            theirs = 0.2 * math.sqrt(max(p.shape[:2]))
            lr = group["lr"] * max(1, rows / cols) ** 0.5 / theirs
            super().update(p, g, state, {**group, "lr": lr, "wd": 0})
        else:
            lr = group["lr"] * group["adamw_lr_ratio"]
            super().update(p, g, state, {**group, "lr": lr, "wd": group["adamw_wd"]})


class Dion(_Other):
    """Its Muon, or NorMuon by `algorithm`."""

    def __init__(self, groups: Any, algorithm: str = "muon", **options: Any) -> None:
        own = {"lr": 0.01, "mu": 0.95, "muon_beta2": 0.95, "beta1": 0.9, "beta2": 0.95}
        own |= {"weight_decay": 0.01, "cautious_wd": False, "algorithm": algorithm, "step": 0}
        own |= {"epsilon": 1e-8, "nesterov": False, "flatten": False, "adjust_lr": "spectral_norm"}
        super().__init__(groups, {**own, **options})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if group["algorithm"] == "adamw":
                    self.state[p] |= {"variance": torch.zeros_like(p), "step_dev": torch.zeros(())}
                if group["algorithm"] == "normuon":
                    self.state[p]["variance_neuron"] = torch.zeros_like(p[..., :1])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
        super().step(closure)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if group["algorithm"] == "adamw":
            p.mul_(1 - lr * decay)
            t = float(state["step_dev"].add_(1))
            beta1, beta2 = group["beta1"], group["beta2"]
            mean, square = _moments(state, "momentum", "variance", g, beta1, beta2)
            root = (square / (1 - beta2**t)).sqrt() + group["epsilon"]
            p.add_(mean / (1 - beta1**t) / root, alpha=-lr)
            return
        total = state["momentum"].mul_(group["mu"]).add_(g)
        u = g + group["mu"] * total if group["nesterov"] else total
        o, scale = torch.empty_like(p), torch.empty_like(p)
        for at in self._blocks(p, group):
            block = u[at].flatten(1) if group["flatten"] else u[at]
            o[at] = exactly(block, "polar_express_1.02").view_as(u[at])
            scale[at] = _dions_scale(group["adjust_lr"], *block.shape[-2:])
        if group["algorithm"] == "normuon":
            before, kept = o.norm(dim=(-2, -1), keepdim=True), state["variance_neuron"]
            kept.lerp_(o.square().mean(dim=-1, keepdim=True), 1 - group["muon_beta2"])
            o /= kept.sqrt() + 1e-8
            o *= before / o.norm(dim=(-2, -1), keepdim=True)
        keep = (o * p >= 0).float() if group["cautious_wd"] else 1.0
        p.sub_(lr * decay * p * keep + lr * scale * o)

    def _blocks(self, p: Tensor, group: dict[str, Any]) -> list[slice]:
        heads = group.get("num_heads") or 1
        sizes = list(group.get("split_sizes") or [p.shape[0] // heads] * heads)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _dions_scale(name: str | None, rows: int, cols: int) -> float:
    if name is None:
        return 1.0
    return {"spectral_norm": math.sqrt(rows / cols), "rms_norm": 0.2 * math.sqrt(max(rows, cols))}[
        name
    ]


def _moments(
    state: dict[str, Any], first: str, second: str, g: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    mean = state.setdefault(first, torch.zeros_like(g)).lerp_(g, 1 - beta1)
    square = state.setdefault(second, torch.zeros_like(g)).lerp_(g.square(), 1 - beta2)
    return mean, square


Make = Callable[[list[Tensor], list[Tensor]], list[Optimizer]]

# (format, how its optimizers are made of the hidden parameters and the rest, with convolutions).
SOURCES: dict[str, tuple[str, Make, bool]] = {
    "torch": (
        "torch",
        lambda hidden, rest: [
            torch.optim.Muon(hidden, lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            AdamW([{"params": rest[:1], "lr": 0.03}, {"params": rest[1:]}], betas=(0.9, 0.98)),
        ],
        False,
    ),
    "torch, as a sum would be": (
        "torch",
        lambda hidden, rest: [
            torch.optim.Muon(hidden, nesterov=False, ns_steps=4),
            AdamW(rest, weight_decay=0.1, maximize=True),
        ],
        False,
    ),
    "keller": ("keller", lambda hidden, rest: [Keller(hidden), AdamW(rest)], True),
    "keller with its Adam": (
        "keller",
        lambda hidden, rest: [
            Keller(
                [
                    {"params": rest[:1], "use_muon": False, "lr": 0.03, "betas": (0.8, 0.95)},
                    {"params": hidden, "use_muon": True, "lr": 0.05, "weight_decay": 0.1},
                    {"params": rest[1:], "use_muon": False, "weight_decay": 0.01},
                ]
            )
        ],
        True,
    ),
    "moonlight": ("moonlight", lambda hidden, rest: [Moonlight(hidden, rest)], True),
    "keller in 2024": (
        "keller_2024",
        lambda hidden, rest: [Keller2024(hidden, rest)],
        True,
    ),
    "dion": (
        "dion",
        lambda hidden, rest: [Dion([{"params": hidden}, {"params": rest, "algorithm": "adamw"}])],
        False,
    ),
    "dion, flattened": (
        "dion",
        lambda hidden, rest: [
            Dion(
                [{"params": hidden}, {"params": rest, "algorithm": "adamw", "cautious_wd": False}],
                nesterov=True,
                flatten=True,
                adjust_lr=None,
                cautious_wd=True,
            )
        ],
        True,
    ),
    "dion, in blocks": (
        "dion",
        lambda hidden, rest: [
            Dion(
                [
                    {"params": hidden[:1], "num_heads": 3},
                    {"params": hidden[1:2], "split_sizes": (8, 4, 4)},
                    {"params": hidden[2:]},
                    {"params": rest, "algorithm": "adamw"},
                ],
                adjust_lr="rms_norm",
            )
        ],
        False,
    ),
    "normuon": (
        "dion",
        lambda hidden, rest: [
            Dion([{"params": hidden}, {"params": rest, "algorithm": "adamw"}], "normuon")
        ],
        False,
    ),
}
