"""muP for Muon: tune the learning rate on a narrow model, keep it for a wide one.

::

    mup.init_(model)
    optimizer = MuonW(mup.route(model, base_width=128, lr=0.05, weight_decay=0.1))

A matrix of `out` outputs and `in` inputs learns features at every width when it and its updates
have spectral norms in proportion to sqrt(out / in) (Yang, Simon and Bernstein, arXiv 2310.17813,
condition 1). Muon's update has spectral norm 1 before its scale, so the condition on the update is
the scale "spectral", and the learning rate of hidden matrices needs no further factor. Embeddings,
heads and vectors are AdamW's; their rules are those of Tensor Programs V (arXiv 2203.03466,
table 3, rows Adam). `RULES` has all of them in one table. docs/mup.md explains them, and what a
model has to do itself: attention logits over d, not sqrt(d), where the head dimension grows, and a
multiplier on the logits where the embedding is tied to the head.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonkit import routing
from muonkit._text import unknown
from muonkit._torch import measurable
from muonkit.routing.judge import Undecided, is_vector, judge
from muonkit.routing.places import EMBEDDINGS, unwrap
from muonkit.routing.routes import Routes, RoutingError
from muonkit.routing.survey import survey
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from muonkit.routing.routes import Route, Rule
    from muonkit.routing.survey import Survey

__all__ = ["DECAYS", "INITS", "RULES", "TIED", "Powers", "coordinates", "init_", "roles", "route"]


@dataclass(frozen=True)
class Powers:
    """The powers of base_width / width by which a role's learning rate and decay are multiplied."""

    lr: int
    decay: int


# lr * weight_decay, the share of a weight that a step forgets, is the same in every role: a head's
# decay grows as its lr falls, or its memory would grow with the width (arXiv 2510.19093 finds that
# transfer needs this "independent" decay). With the same memory, a weight settles at a size that is
# proportional to its updates', so the conditions hold late in training too.
RULES: dict[str, Powers] = {
    "hidden": Powers(lr=0, decay=0),  # by Muon: the scale "spectral" is the whole rule
    "embedding": Powers(lr=0, decay=0),  # one-hot inputs: entries and their updates of order 1
    "head": Powers(lr=1, decay=-1),  # entries add up over the width: updates of order 1 / width
    "one output": Powers(lr=1, decay=-1),  # a gate's row: it adds up over the width as a head does
    "vector": Powers(lr=0, decay=0),  # gains, biases, and filters whose fan-in does not grow
}

# The power of base_width / width on every decay. Over a fixed number of steps it has to stay, see
# above; where the steps grow with the size of the model, as in compute-optimal training, arXiv
# 2512.05620 finds 1 / width nearly optimal for Muon too.
DECAYS: dict[str, int] = {"constant": 0, "width": 1}

# How a matrix that is embedding and head at once is treated. As an embedding it gives logits that
# grow with the width, so the model has to multiply them by base_width / width.
TIED = ("refuse", "embedding")


def _orthogonal(noise: Tensor) -> Tensor:
    wide = noise.shape[-2] < noise.shape[-1]
    q: Tensor
    q, r = torch.linalg.qr(noise.mT if wide else noise)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform, not as QR signs it
    return q.mT if wide else q


def _gaussian(noise: Tensor) -> Tensor:
    # The largest singular value of a large Gaussian matrix; times sqrt(out / in) this is, to a
    # factor of two, parametrization 1 of arXiv 2310.17813: min(1, sqrt(out / in)) / sqrt(in).
    return noise / (math.sqrt(noise.shape[-2]) + math.sqrt(noise.shape[-1]))


# Gaussian noise, (B, rows, cols), to matrices of spectral norm 1.
INITS: dict[str, Callable[[Tensor], Tensor]] = {"orthogonal": _orthogonal, "gaussian": _gaussian}


def route(
    model: nn.Module,
    rules: Sequence[Rule] | None = (),
    *,
    base_width: int,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float = 0.1,
    width: int | None = None,
    decay: str = "constant",
    tied: str = "refuse",
    decay_1d: bool = False,
) -> Routes:
    """`muonkit.route` with the scale "spectral" and every group's lr and decay set by muP.

    `MuonW(mup.route(...))` takes them; an lr or decay given to `MuonW` beside them has no effect,
    as every group has its own.

    Args:
        model, rules, decay_1d: as in `muonkit.route`. A rule's own "lr" and "weight_decay" go
            before muP's.
        base_width: the width of the model that `lr` was tuned on; there all multipliers are 1.
        lr: of Muon: the RMS of an update's output, for an input of RMS 1, is at most this.
        adamw_lr: of AdamW's parameters at the base width: the change of an entry in a step. None is
            `lr`.
        weight_decay: of everything that is decayed, at the base width; each step takes lr times it.
        width: the model's width, in the units of `base_width`. None: the inputs of its output head
            (of a convolution its channels). A model without a head needs it given, unless nothing
            depends on the width.
        decay: how decay goes with width, a key of `DECAYS`.
        tied: what to do with an embedding that is the output head too, one of `TIED`.

    Raises:
        RoutingError: as `muonkit.route`; a parameter that muP has no rule for, and no rule's lr.
        TypeError: a learning rate or decay that is no number.
        ValueError: an option or a width out of range; a width that does not follow from the model.
    """
    _choice("decay", decay, DECAYS)
    _number("lr", lr)
    _number("adamw_lr", lr if adamw_lr is None else adamw_lr)
    _number("weight_decay", weight_decay)
    base_width = _whole("base_width", base_width)
    routes = routing.route(model, rules, scale="spectral", decay_1d=decay_1d)
    facts = survey(unwrap(model))
    found = _roles(routes, facts, tied)
    if width is None and not DECAYS[decay] and not any(map(_follows_width, found.values())):
        width = base_width  # nothing depends on it
    width = _whole("width", _width(routes, found, facts) if width is None else width)
    factor = base_width / width
    given = {"muon": lr, "adamw": lr if adamw_lr is None else adamw_lr}

    def scaled(r: Route, role: str) -> Route:
        powers = RULES[role]
        options: dict[str, object] = {"lr": given[r.algorithm] * factor**powers.lr}
        if r.algorithm == "muon":
            options["adjust_lr_fn"] = routes.scale  # the groups say it to a `Muon` made of them too
        if r.decay:
            options["weight_decay"] = weight_decay * factor ** (powers.decay + DECAYS[decay])
        return replace(r, options={**options, **r.options})

    changed = []
    for r in routes:
        if r.algorithm == "frozen":
            unfrozen = None
            if r.unfrozen is not None:
                with contextlib.suppress(RoutingError):  # muP has no rule for it: it stays frozen
                    unfrozen = scaled(r.unfrozen, _role(r.unfrozen, facts, tied))
            changed.append(replace(r, unfrozen=unfrozen))
        elif r.algorithm == "ignore":
            changed.append(r)
        else:
            changed.append(scaled(r, found[r.name]))
    return Routes(changed, routes.scale)


@torch.no_grad()
def init_(
    model: nn.Module,
    rules: Sequence[Rule] | None = (),
    *,
    init: str = "gaussian",
    embedding_std: float | None = 1.0,
    head_std: float = 1.0,
    tied: str = "refuse",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialise matrices, embeddings and heads as muP wants them, in place.

    - Every matrix of a hidden parameter, one block of its view at a time, gets spectral norm
      sqrt(out / in) (arXiv 2310.17813, condition 1).
    - Embeddings are normal with deviation `embedding_std`: a row looked up has RMS 1. None leaves
      them. The row `padding_idx` is zero, as torch has it.
    - Output heads are normal with deviation `head_std` / in (Tensor Programs V, table 3).
    - Gains, biases and filters with a fan-in that does not grow stay as they are, and frozen
      parameters too.

    Args:
        rules: those that the optimizer gets: views are what is initialised.
        init: a key of `INITS`: "gaussian" (the largest singular value is sqrt(out / in), to a few
            percent), or "orthogonal" (all of them are).
        tied: as in `route`; a tied embedding is initialised as an embedding with deviation
            `embedding_std`.
        generator: on the parameters' device; None is torch's default.

    Returns:
        The model.

    Raises:
        RoutingError: as `route`; a parameter on the meta device, sharded (a DTensor), or
            parametrized. Nothing has been changed.
        TypeError: a deviation that is no number.
        ValueError: no such choice, or a deviation out of range.
    """
    _choice("init", init, INITS)
    routes = routing.route(model, rules, scale="spectral")
    facts = survey(unwrap(model))
    found = _roles(routes, facts, tied)
    if embedding_std is not None:
        _number("embedding_std", embedding_std)
    _number("head_std", head_std)
    for r in routes:
        if found[r.name] in ("hidden", "embedding", "head"):
            _refuse_unreachable(r)
    padding = _padding_rows(model)
    for r in routes:
        role = found[r.name]
        if role == "hidden":
            _init_hidden_(r, INITS[init], generator)
        elif role == "embedding" and embedding_std is not None:
            r.param.normal_(std=embedding_std, generator=generator)
            r.param[padding.get(id(r.param), [])] = 0
        elif role == "head":
            r.param.normal_(std=head_std / _fan_in(r, facts), generator=generator)
    return model


def _padding_rows(model: nn.Module) -> dict[int, list[int]]:
    """Rows of embeddings that have no gradient and are zero, by the parameter's id."""
    rows: dict[int, list[int]] = {}
    for module in model.modules():
        if isinstance(module, EMBEDDINGS) and module.padding_idx is not None:
            rows.setdefault(id(module.weight), []).append(module.padding_idx)
    return rows


def _init_hidden_(
    r: Route, make: Callable[[Tensor], Tensor], generator: torch.Generator | None
) -> None:
    assert r.view is not None
    for block in blocks_of(r.view, r.shape):
        region = block.region(r.param)
        count = region.numel() // (block.rows * block.cols)
        # No QR in 16 bits; what is stored is rounded once, at the end.
        noise = torch.randn(
            (count, block.rows, block.cols),
            dtype=torch.promote_types(r.param.dtype, torch.float32),
            device=r.param.device,
            generator=generator,
        )
        matrices = make(noise).mul_(math.sqrt(block.rows / block.cols))
        region.copy_(block.to_regions(matrices)[0])


def _refuse_unreachable(r: Route) -> None:
    name = r.name.rpartition(".")[2]
    if r.param.is_meta:
        raise RoutingError(
            f"{r.name} {r.shape} is on the meta device: call model.to_empty(device=...) before "
            "mup.init_"
        )
    if hasattr(r.param, "device_mesh"):
        raise RoutingError(
            f"{r.name} {r.shape} is sharded (a DTensor), and its matrices lie on several ranks: "
            "call mup.init_ before sharding, on every rank with the same seed, or load a full "
            "state dict"
        )
    if ".parametrizations." in f".{r.name}" or name in ("weight_v", "weight_orig"):
        raise RoutingError(
            f"{r.name} {r.shape} is a part of a parametrized weight: call mup.init_ before "
            "parametrizing"
        )


def roles(model: nn.Module, routes: Routes, *, tied: str = "refuse") -> dict[str, str]:
    """The role of every parameter, by its route's name: a key of `RULES`, "frozen"
    or "ignore".

    Raises:
        RoutingError: a parameter that no rule of muP is for.
        ValueError: no such choice.
    """
    return _roles(routes, survey(unwrap(model)), tied)


def _roles(routes: Routes, facts: Survey, tied: str) -> dict[str, str]:
    _choice("tied", tied, TIED)
    return {r.name: _role(r, facts, tied) for r in routes}


def _role(r: Route, facts: Survey, tied: str) -> str:
    if r.algorithm in ("frozen", "ignore"):
        return r.algorithm
    if r.algorithm == "muon":
        if r.options.get("adjust_lr_fn", "spectral") != "spectral":
            raise RoutingError(
                f"a rule gives {r.name} adjust_lr_fn={r.options['adjust_lr_fn']!r}, and muP's is "
                "'spectral': drop it"
            )
        return "hidden"
    key, sites = id(r.param), facts.sites[id(r.param)]
    looked_up = any(isinstance(site.owner, EMBEDDINGS) for site in sites)
    if key in facts.heads:
        if looked_up and tied == "refuse":
            raise RoutingError(
                f"{r.name} {r.shape} is embedding and output head at once, which muP scales "
                "differently: untie them, or multiply the logits by base_width / width in the "
                "model and give tied='embedding'"
            )
        return "embedding" if looked_up else "head"
    if looked_up:
        return "embedding"
    if "lr" in r.options:
        return "vector"
    if _has_one_output(r, facts):
        return "one output"
    if not _grows(r, facts):
        return "vector"
    raise RoutingError(
        f"muP has no rule for {r.name} {r.shape} trained by AdamW ({r.reason}): give its lr with "
        f"Rule({r.name!r}, algorithm='adamw', options={{'lr': ...}}), or leave it to Muon"
    )


def _grows(r: Route, facts: Survey) -> bool:
    """Whether AdamW trains a matrix whose fan-in may grow with the width."""
    sites = facts.sites[id(r.param)]
    if is_vector(r.param):
        return False
    if isinstance(sites[0].owner, nn.Bilinear) or sites[0].adapter is not None:
        return True
    try:
        return judge(sites, r.param, facts).algorithm == "muon"  # so a rule sent it to AdamW
    except Undecided:
        return True


def _has_one_output(r: Route, facts: Survey) -> bool:
    """Whether it is the weight of a hidden layer with one output: a vector of its inputs."""
    site = facts.sites[id(r.param)][0]
    widths = site.linears.widths(site.owner)
    return site.label == "weight" and widths is not None and (1, r.param.numel()) == widths


def _fan_in(r: Route, facts: Survey) -> int:
    """How many inputs add up in an output of a head: the columns of its matrix; of one that is no
    layer of its own, whose storage nothing says, what is left beside the first dim.
    """
    with contextlib.suppress(Undecided):
        view = judge(facts.sites[id(r.param)], r.param, facts, hidden=True).view
        if view is not None:
            return blocks_of(view, r.shape)[0].cols
    return r.param.numel() // max(1, r.shape[0])


def _inputs(r: Route, facts: Survey) -> int:
    """The width that a head takes: of a convolution its channels."""
    site = facts.sites[id(r.param)][0]
    widths = site.linears.widths(site.owner)
    return _fan_in(r, facts) if widths is None else widths[1]


def _follows_width(role: str) -> bool:
    return role in RULES and RULES[role] != Powers(lr=0, decay=0)


def _width(routes: Routes, found: dict[str, str], facts: Survey) -> int:
    """The inputs of the model's output heads."""
    heads = {r.name: _inputs(r, facts) for r in routes if found[r.name] == "head"}
    if len(set(heads.values())) == 1:
        return next(iter(heads.values()))
    shown = ", ".join(f"{name} has {inputs}" for name, inputs in heads.items())
    problem = f"its output heads differ in inputs ({shown})" if heads else "it has no output head"
    raise ValueError(
        f"the model's width does not follow from it: {problem}; give width=, and base_width= as "
        "the same quantity of the model that lr was tuned on"
    )


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{what} should be a whole number of at least 1 but is: {value!r}")
    return int(value)


def _number(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} should be a number but is: {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} should be >= 0 and finite but is: {value!r}")


def _choice(what: str, value: object, options: Any) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(unknown(what, value, options))


@torch.no_grad()
def coordinates(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, float]:
    """The coordinate check's numbers: the RMS of the output of every module in one forward pass.

    Compare them at two widths, before training and after a few steps: under muP each stays of one
    order; one that grows or shrinks with the width points to the layer (or, in attention, to what
    the model does before it) that is scaled otherwise (Tensor Programs V, appendix D.1).

    The pass is the model's own, in the mode that it is in: while training, dropout draws random
    numbers and BatchNorm notes the batch. `model.eval()` before it has neither.

    Args:
        inputs, keywords: what the model is called with.

    Returns:
        Dotted module name ("" is the model) -> RMS over all entries of its output. Modules that
        give no floating-point tensor are left out; one called several times counts all calls.
    """
    squares: dict[str, list[float]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                total = squares.setdefault(name, [0.0, 0.0])
                total[0] += measurable(output.detach()).double().square().sum().item()
                total[1] += output.numel()

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(total / count) for name, (total, count) in squares.items()}
