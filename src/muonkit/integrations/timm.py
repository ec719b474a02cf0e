"""timm: the name "muonw" for its optimizer factory, for scripts that make optimizers by name::

    from muonkit.integrations.timm import register

    register()
    optimizer = timm.optim.create_optimizer_v2(model, opt="muonw", lr=1e-3, weight_decay=0.05)

Where the script's own lines can be changed, `MuonW(model, ...)` needs none of this.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from torch import nn

from muonkit.muonw import MuonW
from muonkit.routing.routes import Route, Routes, route
from muonkit.scale import ROUTED

__all__ = ["register"]


def register(registry: Any = None) -> None:
    """Add "muonw" to timm's registry of optimizers (or to another one of its class).

    timm gives an optimizer param groups, from which no model can be routed: from here on the
    registry hands over the model's routes where "muonw" is asked for. The routes include what the
    groups would have said: the model's `no_weight_decay()`, `weight_decay_exclude_1d`, and
    `layer_decay` (which needs lr). betas and eps are AdamW's; further keyword arguments are for
    `MuonW`.
    """
    from timm.optim import OptimInfo, _optim_factory

    registry = _optim_factory.default_registry if registry is None else registry
    if "muonw" in registry.list_optimizers():
        return
    words = "Muon for the hidden matrices, AdamW for the rest"
    registry.register(OptimInfo("muonw", _muonw, words, has_betas=True))
    create = registry.create_optimizer

    def create_optimizer(model_or_params: Any, opt: str, **options: Any) -> Any:
        name = opt.lower().split("_")[-1]  # "lookahead_muonw" is one too
        if name == "muonw" and isinstance(model_or_params, nn.Module):
            routes = _routes(model_or_params, options)
            options["param_group_fn"] = lambda _: routes
        return create(model_or_params, opt, **options)

    registry.create_optimizer = create_optimizer


def _muonw(routes: Any, betas: Any = None, eps: Any = None, **options: Any) -> MuonW:
    given = {"adamw_betas": betas, "adamw_eps": eps}
    return MuonW(routes, **{name: v for name, v in given.items() if v is not None}, **options)


def _routes(model: nn.Module, options: dict[str, Any]) -> Routes:
    """The model's routes, with what timm would have said in param groups."""
    rates = _rates(model, options)  # first, since timm freezes the lowest layers if it is told to
    asked = {key: options.pop(key) for key in ("undecided", "heads", "per_head") if key in options}
    routes = route(
        model,
        options.pop("rules", ()),
        scale=options.get("adjust_lr_fn") or ROUTED,
        decay_1d=options.pop("decay_1d", not options.get("weight_decay_exclude_1d", True)),
        **asked,
    )
    kept: Any = getattr(model, "no_weight_decay", set)()

    def told(r: Route) -> Route:
        lr = {"lr": rates[r.param]} if r.param in rates else {}
        decay = r.decay and not any(fnmatch(r.name, pattern) for pattern in kept)
        return replace(r, decay=decay, options={**lr, **r.options})

    return Routes([r if r.algorithm == "frozen" else told(r) for r in routes], routes.scale)


def _rates(model: nn.Module, options: dict[str, Any]) -> dict[nn.Parameter, float]:
    """The learning rate of every parameter under `layer_decay`; {} without it."""
    from timm.optim import param_groups_layer_decay

    decay, lr = options.get("layer_decay"), options.get("lr")
    if decay is None:
        return {}
    if lr is None:
        raise ValueError(f"layer_decay={decay} scales the learning rate of each layer: give lr too")
    groups = param_groups_layer_decay(
        model,
        layer_decay=decay,
        min_scale=options.get("layer_decay_min_scale", 0.0),
        no_opt_scale=options.get("layer_decay_no_opt_scale"),
    )
    return {p: lr * group["lr_scale"] for group in groups for p in group["params"]}
