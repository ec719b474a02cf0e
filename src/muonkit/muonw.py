"""MuonW: one optimizer for a whole model, from the model, its routes, or a split by hand."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from muonkit._text import meant
from muonkit.groups import refuse_eps
from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER
from muonkit.optim import Muon
from muonkit.options import FILLS, OPTIONS
from muonkit.routing.routes import Rule, route
from muonkit.routing.table import Routes, is_models
from muonkit.scale import ROUTED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim.optimizer import ParamsT

    from muonkit.newton_schulz.coefficients import Coefficients, Schedule
    from muonkit.scale import Scale

__all__ = ["MuonW"]

# The learning rate of a routed `MuonW`, chosen by benchmarks/default_rate.py.
_LR = 2e-3


class MuonW(Muon):
    """One optimizer for a whole model: Muon for the hidden matrices, AdamW for the rest.

        optimizer = MuonW(model, lr=2e-3, weight_decay=0.1)  # routes the model itself
        optimizer = MuonW({"G": G, "D": D}, lr=2e-3)  # or several models by name
        optimizer = MuonW(route(model, rules), lr=2e-3)  # or takes routes made before
        optimizer = MuonW(muon_params, lr=0.02, adamw_params=rest, adamw_lr=3e-4)  # or by hand

    When it routes, lr is AdamW's: the scale is "unit_rms" unless `adjust_lr_fn` is given, so the
    entries of a hidden matrix move by lr (RMS), as under AdamW in its first steps. For a long
    training with AdamW's tuned learning rate and decay give adjust_lr_fn="match_rms_adamw", a fifth
    of that, as AdamW moves later (Moonlight). When the split is given by hand, the defaults are
    Keller Jordan's first version's: scale "original" and no decay.

    Args:
        model: a module, a dict of modules by name, `Routes`, or the parameters for Muon (then with
            adamw_params).
        lr, weight_decay, momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: as in
            `Muon`. lr None is 2e-3 when routed, and refused by hand; weight_decay None is 0.1 when
            routed and 0 by hand.
        eps: refused unless it is torch.optim.Muon's default: it has no effect on Muon's groups, and
            AdamW's is `adamw_eps`.
        rules: overrides for the routing (see `muonkit.Rule`).
        adamw_params: the parameters for AdamW, when the split is given by hand.
        adamw_lr, adamw_betas, adamw_eps, adamw_wd: AdamW's own hyperparameters; lr and weight decay
            are Muon's unless given.
        decay_1d: decay gains, biases and norms too (what no rule decides). For routes made before,
            give it to `route`.
        undecided: what becomes of parameters that routing cannot judge: "raise", or "adamw", which
            trains them with AdamW and warns (see `muonkit.route`).
        heads: the output heads by hand, where the search for them errs (see `muonkit.route`).
        per_head: make every attention head a matrix of its own (see `muonkit.route`).
        **options: any other keyword argument of `Muon`, those for several ranks among them
            (process_group, zero, exchange_dtype, replicas).

    What has several names (decay, decay_1d, weight_decay, adamw_wd; scale, adjust_lr_fn):
    [all of them](options.md#one-thing-several-names) stand in docs/api/options.md.

    Raises:
        RoutingError: parameters that nothing claims, a rule that matches nothing, an empty or
            wholly frozen model.
        TypeError, ValueError, RuntimeError: as `Muon`.

    Warns:
        UserWarning: no hidden matrix at all: AdamW trains everything; undecided="adamw" trains some
            that may be hidden matrices.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module] | Routes | ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | Schedule = KELLER,
        eps: float = 1e-7,
        ns_steps: int = DEFAULT_STEPS,
        adjust_lr_fn: str | Scale | None = None,
        *,
        rules: Rule | Iterable[Rule] | None = (),
        adamw_params: ParamsT | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
        decay_1d: bool = False,
        undecided: str = "raise",
        heads: Iterable[str | nn.Module] | None = None,
        per_head: bool = False,
        **options: Any,
    ) -> None:
        _refuse_unknown(options)
        refuse_eps(eps)
        if isinstance(model, nn.Module | Routes) or is_models(model):
            if adamw_params is not None:
                raise TypeError(
                    "MuonW got a model and adamw_params: pass the model alone (it routes itself; "
                    "rules=[...] overrides), or the Muon parameters with adamw_params"
                )
            rules = [rules] if isinstance(rules, Rule) else list(rules or ())
            asked = {"decay_1d": decay_1d, "undecided": undecided, "heads": heads}
            routes = _routes(model, rules, adjust_lr_fn, {**asked, "per_head": per_head})
            adjust_lr_fn = routes.scale
            lr = _LR if lr is None else lr
            weight_decay = 0.1 if weight_decay is None else weight_decay
            groups = routes.param_groups()
        else:
            routing = rules or decay_1d or undecided != "raise" or heads is not None or per_head
            if adamw_params is None or routing:
                raise TypeError(_no_module(model))
            if lr is None:
                raise TypeError(
                    "MuonW with adamw_params needs lr: without routes it is the spectral norm of "
                    "an update, for which Keller Jordan used 0.02; AdamW's rate is adamw_lr"
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which has to say its algorithm; see `Muon`. Nothing is added when it raises.

        A module is added as MuonW would route it by:

            for group in muonkit.route(module).param_groups():
                optimizer.add_param_group(group)
        """
        if isinstance(param_group, dict) and not {"algorithm", "use_muon"} & param_group.keys():
            raise ValueError(
                "the param group does not say which algorithm trains it, and MuonW routes modules, "
                "not parameters: add a module with 'for group in "
                "muonkit.route(module).param_groups(): optimizer.add_param_group(group)', or say "
                "'algorithm': 'muon' or 'adamw' in the group"
            )
        super().add_param_group(param_group)


# Arguments of torch.optim.AdamW that nothing here stands for.
_OF_TORCH = ("fused", "foreach", "capturable", "differentiable", "amsgrad")


# What others call it.
_OF_OTHERS = {
    "learning_rate": "lr",
    "muon_lr": "lr",
    "wd": "weight_decay",
    "mu": "momentum",
    "beta": "momentum",
    "beta1": "adamw_betas",
    "beta2": "adamw_betas",
    "epsilon": "adamw_eps",
}


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Refuse keyword arguments that nobody has, with the name that AdamW's have here.

    Raises:
        TypeError: there is one.
    """
    own = [name for name in inspect.signature(MuonW).parameters if name not in ("model", "options")]
    has = [*own, *(row.name for row in OPTIONS if row.name not in own), "variant"]
    for name in options.keys() - set(has):
        if name in FILLS:
            remedy = f"AdamW's is called {FILLS[name]}"
        elif name in _OF_TORCH:
            remedy = "nothing stands for it here, leave it out"
        elif name in _OF_OTHERS:
            remedy = f"it is called {_OF_OTHERS[name]}"
        elif name == "params":
            remedy = f"routing reads modules, and not parameters. {_INSTEAD}"
        else:
            hint = meant(name, has)
            it = f"{hint} It" if hint else "it"
            remedy = f"{it} has {', '.join(each for each in has if each != 'eps')}"
        raise TypeError(f"MuonW has no argument {name!r}; {remedy}")


def _routes(
    model: nn.Module | Mapping[str, nn.Module] | Routes,
    rules: Sequence[Rule],
    scale: str | Scale | None,
    asked: dict[str, Any],
) -> Routes:
    """The routes of what MuonW was given; `asked` are further arguments of `route`."""
    if isinstance(model, Routes):
        default = {"decay_1d": False, "undecided": "raise", "heads": None, "per_head": False}
        if rules or asked != default or scale not in (None, model.scale):
            also = "".join(f", {key}={value!r}" for key, value in asked.items())
            raise TypeError(
                f"MuonW got routes, and rules, {', '.join(asked)} or another scale beside them: "
                f"give these to route(model, rules, scale={scale or model.scale!r}{also})"
            )
        routes = model
    else:
        routes = route(model, rules, scale=scale or ROUTED, **asked)
    if not any(r.algorithm == "muon" for r in routes):
        matrices = [
            r.name
            for r in routes
            if r.algorithm == "adamw" and len(r.shape) == 2 and min(r.shape) > 1
            if "embedding" not in r.reason
        ]
        line = f": rules=[Rule({matrices[0]!r}, view='matrix')], say" if matrices else ""
        warnings.warn(
            "MuonW found no hidden matrix in the model: AdamW trains all of it. "
            f"print(muonkit.route(model)) gives the reasons; rules override them{line}",
            UserWarning,
            stacklevel=3,
        )
    return routes


_INSTEAD = (
    "Write MuonW(model); where a framework makes the optimizer of params, give it one that has the "
    "model: lambda params: MuonW(model); transformers' Trainer takes optimizer_cls_and_kwargs="
    "muonkit.integrations.transformers.muonw(args). For a split by hand add adamw_params= with "
    "what AdamW trains; for hidden matrices alone use Muon"
)


def _no_module(given: Any) -> str:
    """Why MuonW cannot route what is no module, and the lines that do."""
    what = type(given).__name__
    if isinstance(given, Tensor):
        what = "a parameter"
    elif isinstance(given, list | tuple) and any(isinstance(each, nn.Module) for each in given):
        return (
            f"MuonW got modules in a {what}, which gives the parameters no names: "
            'write MuonW({"G": G, "D": D}), a dict of them by name'
        )
    elif isinstance(given, dict | list | tuple | set | frozenset) or hasattr(given, "__next__"):
        what = f"parameters ({what})"
    return f"MuonW got {what}, which cannot be routed: routing reads modules. {_INSTEAD}"


def _hand_groups(params: Any, algorithm: str) -> list[dict[str, Any]]:
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if items and isinstance(items[0], dict):
        return [{**group, "algorithm": algorithm} for group in items]
    return [{"params": items, "algorithm": algorithm}] if items else []
