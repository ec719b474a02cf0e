"""Muon and MuonW: validate, own the state, take the step.

The step reads as the algorithm; see `_muon_step`. Hyperparameters live in the param groups only,
so schedulers, `add_param_group` and `state_dict` reach all of them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from muonkit._groups import complete_group, describe_group, parameter_names, validate_group
from muonkit.adamw import adamw_step_
from muonkit.coefficients import DEFAULT_STEPS, KELLER
from muonkit.exchange import LocalExchange
from muonkit.orthogonalize import orthogonalize
from muonkit.plan import Item, make_batches
from muonkit.routing import Routes, route
from muonkit.scale import scale_factor
from muonkit.views import Block, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.optim.optimizer import ParamsT

    from muonkit.coefficients import Coefficients
    from muonkit.exchange import Exchange
    from muonkit.routing import Rule

__all__ = ["Muon", "MuonW"]


class Muon(Optimizer):
    """Muon for the matrices it is given; a drop-in for `torch.optim.Muon`.

    With momentum M, gradient G and a matrix W of `out` rows and `in` columns (torch.optim.Muon's
    computation; Keller Jordan 2024)::

        M <- lerp(M, G, 1 - momentum)
        U  = lerp(G, M, momentum) if nesterov else M
        O  = orthogonalize(U)
        W <- W - lr * weight_decay * W - lr * scale(out, in) * O

    Args:
        params: parameters, named parameters or param groups. A group may hold any of the arguments
            below, and

            - ``view``: how its parameters are matrices (see `muonkit.View`); "matrix" for 2-D
              parameters unless given, needed for all others;
            - ``algorithm``: "muon" or "adamw". ``use_muon=True/False`` is accepted too.

            An AdamW group has lr, betas, eps and weight_decay; what it lacks comes from the
            ``adamw_`` arguments.
        lr: learning rate, a float or a one-element tensor. In units of spectral norm per update
            with the scale "original", of RMS per update (as AdamW's) with "match_rms_adamw".
        weight_decay: decoupled decay per unit of (unscaled) lr.
        momentum: weight of the past in the running average of gradients.
        nesterov: look ahead by one gradient.
        ns_coefficients: the schedule: a name (`muonkit.coefficients.SCHEDULES` or "svd"), one
            triple, or one triple per step.
        eps: lower bound of the norm divided by, after the largest magnitude was divided out: it
            keeps a zero gradient zero, and has no part in any other.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: the scale: "original" (also None), "match_rms_adamw" or "spectral".
        ns_form: how the polynomial is evaluated: "auto" or "standard".
        ns_dtype: dtype of the matrix products: "auto" (what the hardware multiplies natively),
            "float32", "bfloat16", "float16" or "float64". `describe()` tells what auto chose.
        maximize: step along the gradient instead of against it.
        cautious: decay only the entries that the update also shrinks (O * W > 0).
        nonfinite: what a NaN or infinite gradient does: "propagate" (nothing is checked; the
            parameter becomes NaN), "skip" (the whole step, momentum included, does not take place;
            `skipped_steps` counts) or "raise" (FloatingPointError naming the parameter, before
            anything is written). The last two wait for the device once per step.
        adamw_lr, adamw_betas, adamw_eps, adamw_wd: defaults of AdamW groups. lr and decay are
            Muon's unless given; with another scale than "match_rms_adamw" Muon's lr means nothing
            to AdamW, and its own must be given here or in the group.

    Raises:
        ValueError: an option out of range, a parameter that its view does not fit.
        TypeError: a parameter of integer dtype.
        RuntimeError: a complex or sparse parameter (on construction), a sparse gradient (in `step`,
            before anything is written).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = KELLER,
        eps: float = 1e-7,
        ns_steps: int = DEFAULT_STEPS,
        adjust_lr_fn: str | None = None,
        *,
        ns_form: str = "auto",
        ns_dtype: str | torch.dtype = "auto",
        maximize: bool = False,
        cautious: bool = False,
        nonfinite: str = "propagate",
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
    ) -> None:
        muon = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_form": ns_form,
            "ns_dtype": str(ns_dtype).removeprefix("torch."),
            "maximize": maximize,
            "cautious": cautious,
            "nonfinite": nonfinite,
        }
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_wd}
        validate_group({**muon, "algorithm": "muon", "params": []})
        # In `defaults` so that they survive pickling, under a name that is no group key.
        defaults = {**muon, "algorithm": "muon", "_adamw": adamw}
        self.skipped_steps = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys. Nothing is added when it raises."""
        named = "param_names" in self.param_groups[0] if self.param_groups else None
        group = complete_group(param_group, self.defaults, named)
        before = len(self.param_groups)
        super().add_param_group(group)
        added = self.param_groups[-1]
        del added["_adamw"]
        try:
            validate_group(added)
        except Exception:
            del self.param_groups[before:]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours, of `torch.optim.Muon` or of one with the same keys.

        Hyperparameters that it lacks keep their value here; view and algorithm are always kept.

        Raises:
            ValueError: other groups, other algorithms or other shapes than here; nothing is loaded.
        """
        saved_groups = state_dict["param_groups"]
        merged = []
        for number, (own, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            if saved.get("algorithm", own["algorithm"]) != own["algorithm"]:
                raise ValueError(
                    f"group {number} of the state dict is trained by {saved['algorithm']}, here by "
                    f"{own['algorithm']}; build the optimizer with the routes it was saved with"
                )
            kept = {key: value for key, value in own.items() if key not in ("params", *saved)}
            structure = {key: own[key] for key in ("algorithm", "view") if key in own}
            merged.append({**kept, **saved, **structure})
            _check_state_shapes(own, saved, state_dict["state"])
        if len(merged) == len(saved_groups) == len(self.param_groups):
            state_dict = {**state_dict, "param_groups": merged}
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's loss, if there is one.

        Parameters without a gradient are left alone, decay included.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, _with_gradients(group)) for group in self.param_groups]
        if not _finite(work):
            self.skipped_steps += 1
            return loss
        for group, params in work:
            if not params:
                continue
            if group["algorithm"] == "adamw":
                grads = [cast("Tensor", p.grad) for p in params]
                adamw_step_(params, grads, [self.state[p] for p in params], group)
            else:
                _muon_step(params, self._momenta(params), group, LocalExchange())
        return loss

    def _momenta(self, params: Sequence[Tensor]) -> list[Tensor]:
        momenta = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                # Row-major whatever the parameter's strides: the state is in logical shape.
                state["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.contiguous_format
                )
            # No copy, unless the model was moved or cast after the last step.
            state["momentum_buffer"] = state["momentum_buffer"].to(p.device, p.dtype)
            momenta.append(state["momentum_buffer"])
        return momenta

    def describe(self) -> list[dict[str, Any]]:
        """What each kind of matrix gets, with every "auto" replaced by what it chose.

        Returns:
            One dict per param group and matrix shape: group, algorithm, parameters; for Muon also
            view, matrices, rows, cols, ns_steps, ns_form, ns_dtype, scale, lr (after the scale).
        """
        return [
            row for n, group in enumerate(self.param_groups) for row in describe_group(n, group)
        ]


class MuonW(Muon):
    """One optimizer for a whole model: Muon for the hidden matrices, AdamW for the rest.

    ::

        optimizer = MuonW(model, lr=3e-4, weight_decay=0.1)     # routes the model itself
        optimizer = MuonW(route(model, rules), lr=3e-4)         # or takes routes made before
        optimizer = MuonW(muon_params, lr=0.02, adamw_params=rest, adamw_lr=3e-4)   # or by hand

    When it routes, the scale is "match_rms_adamw" unless `adjust_lr_fn` is given: a learning rate
    and decay tuned for AdamW carry over. When the split is given by hand, the defaults are Keller
    Jordan's first version's: scale "original" and no decay.

    Args:
        model: a module, the `Routes` of one, or the parameters for Muon (then with adamw_params).
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            `Muon`. weight_decay None is 0.1 when routed and 0 by hand.
        rules: overrides for the routing (see `muonkit.Rule`).
        adamw_params: the parameters for AdamW, when the split is given by hand.
        adamw_lr, adamw_betas, adamw_eps, adamw_wd: AdamW's own hyperparameters; lr and weight decay
            are Muon's unless given.
        decay_1d: decay gains, biases and norms too.
        **options: any other keyword argument of `Muon`.

    Raises:
        RoutingError: a parameter that nothing claims, a rule that matches nothing, an empty or
            wholly frozen model.
        TypeError, ValueError, RuntimeError: as `Muon`.

    Warns:
        UserWarning: no hidden matrix at all: AdamW trains everything.
    """

    def __init__(
        self,
        model: nn.Module | Routes | ParamsT,
        lr: float | Tensor = 3e-4,
        weight_decay: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = KELLER,
        eps: float = 1e-7,
        ns_steps: int = DEFAULT_STEPS,
        adjust_lr_fn: str | None = None,
        *,
        rules: Iterable[Rule] = (),
        adamw_params: ParamsT | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
        decay_1d: bool = False,
        **options: Any,
    ) -> None:
        groups: Any
        if isinstance(model, nn.Module | Routes):
            if adamw_params is not None:
                raise TypeError(
                    "MuonW got a model and adamw_params: pass the model alone (it routes itself; "
                    "rules=[...] overrides), or the Muon parameters with adamw_params"
                )
            adjust_lr_fn = adjust_lr_fn or "match_rms_adamw"
            weight_decay = 0.1 if weight_decay is None else weight_decay
            routes = _routes(model, list(rules), adjust_lr_fn)
            groups = _routed_groups(routes, decay_1d)
        else:
            if adamw_params is None or rules:
                raise TypeError(
                    f"MuonW got {type(model).__name__}, which cannot be routed: pass the model "
                    "(MuonW(model)), or adamw_params= for what AdamW trains; for hidden matrices "
                    "alone use Muon"
                )
            weight_decay = 0.0 if weight_decay is None else weight_decay
            groups = _hand_groups(model, "muon") + _hand_groups(adamw_params, "adamw")
        super().__init__(
            groups,
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_wd=adamw_wd,
            **options,
        )


def _routes(model: nn.Module | Routes, rules: Sequence[Rule], scale: str) -> Routes:
    if isinstance(model, Routes):
        if rules:
            raise TypeError("MuonW got routes and rules: give the rules to route(model, rules)")
        routes = model
    else:
        routes = route(model, rules, scale=scale)
    if not any(r.algorithm == "muon" for r in routes):
        warnings.warn(
            "MuonW found no hidden matrix in the model: AdamW trains all of it. "
            "print(muonkit.route(model)) gives the reasons; rules=[...] overrides them",
            UserWarning,
            stacklevel=3,
        )
    return routes


def _routed_groups(routes: Routes, decay_1d: bool) -> list[dict[str, Any]]:
    groups = []
    for group in routes.param_groups():
        decays = group.pop("decay")
        if not decays and not decay_1d:
            group.setdefault("weight_decay", 0.0)
        groups.append(group)
    return groups


def _hand_groups(params: Any, algorithm: str) -> list[dict[str, Any]]:
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if items and isinstance(items[0], dict):
        return [{**group, "algorithm": algorithm} for group in items]
    return [{"params": items, "algorithm": algorithm}] if items else []


def _with_gradients(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters that have a gradient; refuses what no algorithm here can take."""
    for name, p in zip(parameter_names(group), group["params"], strict=True):
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"Muon does not support sparse gradients: {name} {tuple(p.shape)} has one; "
                "build its embedding with sparse=False, or train it with torch.optim.SparseAdam"
            )
    return [p for p in group["params"] if p.grad is not None]


def _finite(work: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> bool:
    """Whether the step may take place, by each group's `nonfinite`; raises for "raise"."""
    for group, params in work:
        if group["nonfinite"] == "propagate" or not params:
            continue
        # The largest magnitude: a 2-norm would overflow on large finite gradients.
        norms = torch._foreach_norm([cast("Tensor", p.grad) for p in params], float("inf"))
        finite = [bool(norm.isfinite()) for norm in _to_host(norms)]
        if all(finite):
            continue
        if group["nonfinite"] == "skip":
            return False
        broken = {id(p) for p, ok in zip(params, finite, strict=True) if not ok}
        names = zip(parameter_names(group), group["params"], strict=True)
        bad = [name for name, p in names if id(p) in broken]
        raise FloatingPointError(
            f"the gradient of {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''} is not "
            "finite; nothing was changed. Lower lr or clip gradients; nonfinite='skip' leaves such "
            "steps out"
        )
    return True


def _to_host(scalars: Sequence[Tensor]) -> list[Tensor]:
    """0-dim tensors on the CPU, waiting once per device and not once per tensor."""
    position: dict[int, Tensor] = {}
    for device in {scalar.device for scalar in scalars}:
        here = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        values = torch.stack([scalars[i].float() for i in here]).cpu()
        position.update(zip(here, values.unbind(), strict=True))
    return [position[i] for i in range(len(scalars))]


class _Piece(NamedTuple):
    """One block of one parameter: its regions of parameter, gradient and momentum."""

    block: Block
    param: Tensor
    grad: Tensor
    momentum: Tensor


def _muon_step(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    group: dict[str, Any],
    exchange: Exchange,
) -> None:
    for batch in _batches(params, momenta, group):
        u = _momentum_(batch, group)  # elementwise, where the state lives
        u = exchange.to_owners(u)  # whole matrices, (B, m, n)
        o = orthogonalize(
            u,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            ns_form=group["ns_form"],
            ns_dtype=group["ns_dtype"],
            eps=group["eps"],
        )
        d = exchange.to_params(o)
        _apply_(batch, d, group)


def _batches(
    params: Sequence[Tensor], momenta: Sequence[Tensor], group: dict[str, Any]
) -> list[list[_Piece]]:
    """Blocks of equal matrices together, under the cap on bytes in flight."""
    # Plain loops: torch.compile cannot trace comprehensions that nest.
    items: list[Item] = []
    pieces: list[_Piece] = []
    for p, momentum in zip(params, momenta, strict=True):
        grad = cast("Tensor", p.grad)
        for block in blocks_of(group["view"], tuple(p.shape)):
            elements = block.batch * block.rows * block.cols
            if elements:
                key = (block.rows, block.cols, p.dtype, p.device)
                items.append(Item(len(pieces), key, elements * p.element_size()))
                regions = block.region(p), block.region(grad), block.region(momentum)
                pieces.append(_Piece(block, *regions))
    return [[pieces[item.position] for item in batch] for batch in make_batches(items)]


def _momentum_(batch: Sequence[_Piece], group: dict[str, Any]) -> Tensor:
    """M <- lerp(M, G, 1 - mu); U = lerp(G, M, mu) if nesterov else M.

    Returns U as whole matrices, `(B, m, n)`. Without Nesterov it may share the momentum's memory,
    so nobody writes to it; gradients are never written to.
    """
    grads = [piece.grad for piece in batch]
    momenta = [piece.momentum for piece in batch]
    if any(g.dtype != m.dtype for g, m in zip(grads, momenta, strict=True)):  # Tensor.grad_dtype
        grads = [g.to(m.dtype) for g, m in zip(grads, momenta, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    mu = group["momentum"]
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    updates = torch._foreach_lerp(grads, momenta, mu) if group["nesterov"] else momenta
    matrices = [piece.block.to_matrices(u) for piece, u in zip(batch, updates, strict=True)]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _apply_(batch: Sequence[_Piece], d: Tensor, group: dict[str, Any]) -> None:
    """W <- W - lr * weight_decay * W - lr * scale * D, D as `(B, m, n)`."""
    params = [piece.param for piece in batch]
    block = batch[0].block
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.to(d.device).reshape(())
    matrices = torch.split(d, [piece.block.batch for piece in batch])
    updates = [p.block.to_region(o) for p, o in zip(batch, matrices, strict=True)]
    if decay != 0:
        if group["cautious"]:
            shrinks = [(o * p > 0).to(p.dtype) for o, p in zip(updates, params, strict=True)]
            factors = [1 - lr * decay * mask for mask in shrinks]
            torch._foreach_mul_(params, factors)
        else:
            torch._foreach_mul_(params, 1 - lr * decay)
    step = -lr * scale_factor(group["adjust_lr_fn"], block.rows, block.cols)
    if isinstance(step, Tensor):
        # A tensor as alpha would be read back to the host; multiplying keeps it on the device.
        torch._foreach_add_(params, torch._foreach_mul(updates, step))
    else:
        torch._foreach_add_(params, updates, alpha=step)


def _check_state_shapes(own: dict[str, Any], saved: dict[str, Any], state: dict[Any, Any]) -> None:
    for name, p, key in zip(parameter_names(own), own["params"], saved["params"], strict=False):
        for kind in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            value = state.get(key, {}).get(kind)
            if value is not None and value.shape != p.shape:
                raise ValueError(
                    f"the state dict's {kind} for {name} has shape {tuple(value.shape)}, the "
                    f"parameter {tuple(p.shape)}; it was saved from another model"
                )
