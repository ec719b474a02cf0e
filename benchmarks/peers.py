"""The implementations that step.py times: ours, torch's, and what others publish.

All do the same work as far as they let themselves be asked: five iterations with Keller's
coefficients, Nesterov, momentum 0.95, decoupled weight decay 0.1, the scale sqrt(max(1, out/in)).
What differs is said in `Peer.differs`, and step.py prints how far the first step of each is from
ours, so that a peer that does something else (or nothing) does not pass for a fast one.

Most of them cast to a 16-bit dtype whatever the hardware. They run as shipped, and again with that
cast, a line of their own source, changed to float32. Nothing is imported before it is asked for;
requirements-peers.txt has the versions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from muonkit.newton_schulz.dtypes import fastest_dtype

LR = 0.02
DECAY = 0.1
MOMENTUM = 0.95
KELLER = (3.4445, -4.7750, 2.0315)

Given = Sequence[tuple[nn.Parameter, str]]
Patch = tuple[ModuleType, str, Any]


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        name: what is typed and printed.
        make: from parameters with their views to an object with `step()`.
        package: its name on PyPI; None for ours and torch's.
        products: the dtype of its matrix products on a CPU.
        views: what it takes as it is stored. All else it is given as separate 2-D matrices.
        patches: names that are replaced while it is made and while it steps; returns new objects,
            and is called once.
        compiled: torch.compile is part of it; the first step then takes seconds.
        differs: what is not as in ours.
    """

    name: str
    make: Callable[[Given], Any]
    package: str | None = None
    products: str = "float32"
    views: frozenset[str] = frozenset({"matrix"})
    patches: Callable[[], list[Patch]] = field(default=list)
    compiled: bool = False
    differs: str = ""


class Implementation:
    """A peer made for some parameters; `step()` is what is timed."""

    def __init__(self, peer: Peer, given: Given) -> None:
        self._given = [(p, p.grad) for p, _ in given]
        self._patches = peer.patches()
        with self._patched():
            self.optimizer = peer.make(given)

    def step(self) -> None:
        with self._patched():
            self.optimizer.step()

    def give_gradients(self) -> None:
        """Some optimizers drop the gradients of the parameters they have stepped."""
        for parameter, gradient in self._given:
            parameter.grad = gradient

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        shipped = [(module, name, getattr(module, name)) for module, name, _ in self._patches]
        for module, name, new in self._patches:
            setattr(module, name, new)
        try:
            yield
        finally:
            for module, name, old in shipped:
                setattr(module, name, old)


def distance(movement: list[Tensor], reference: list[Tensor]) -> float:
    """Of two movements of all weights, relative to the second (Frobenius)."""
    difference = torch._foreach_norm(torch._foreach_sub(movement, reference))
    size = torch._foreach_norm(reference)
    return float(torch.stack(list(difference)).norm() / torch.stack(list(size)).norm())


def recast(function: Callable[..., Any], **changes: str) -> Any:
    """`function` made anew from its source, with pieces of the text replaced and nothing else.

    Args:
        function: decorators in its source are applied again.
        changes: not keywords but pairs, old text to new text: `recast(f, **{"x.half()": "x"})`.

    Raises:
        LookupError: a text is not in the source: another version than the one that was read.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes.items():
        if old not in source:
            raise LookupError(f"{function.__qualname__} has no {old!r} in its source any more")
        source = source.replace(old, new)
    module = sys.modules[function.__module__]
    scope = dict(vars(module))
    # The file keeps its name: torch.compile asks for it.
    exec(compile(source, str(module.__file__), "exec", dont_inherit=True), scope)
    return scope[function.__name__]


def groups_by_view(given: Given) -> list[dict[str, Any]]:
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter, view in given:
        groups.setdefault(view, []).append(parameter)
    return [{"params": params, "view": view} for view, params in groups.items()]


# --- ours ------------------------------------------------------------------------------------


def muonkit(given: Given, form: str = "auto", dtype: str = "auto") -> Any:
    from muonkit import Muon

    return Muon(groups_by_view(given), lr=LR, weight_decay=DECAY, ns_dtype=dtype, ns_form=form)


# --- torch -----------------------------------------------------------------------------------


def torch_muon(given: Given) -> Any:
    return torch.optim.Muon([p for p, _ in given], lr=LR, weight_decay=DECAY)


def torch_patches() -> list[Patch]:
    from torch.optim import _muon

    # .clone(): the loop divides in place, which bfloat16() made safe by its copy.
    changed = recast(
        _muon._zeropower_via_newtonschulz, **{"grad.bfloat16()": "grad.float().clone()"}
    )
    return [(_muon, "_zeropower_via_newtonschulz", changed)]


# --- pytorch_optimizer -----------------------------------------------------------------------


def pytorch_optimizer(given: Given, method: str = "newton_schulz") -> Any:
    from pytorch_optimizer import Muon

    group = {"params": [p for p, _ in given], "use_muon": True}
    return Muon([group], lr=LR, weight_decay=DECAY, ns_method=method)


def pytorch_optimizer_patches() -> list[Patch]:
    from pytorch_optimizer.optimizer.muon import base

    return [
        (base, name, functools.partial(getattr(base, name), dtype=torch.float32))
        for name in ("zero_power_via_newton_schulz_5", "zero_power_via_gram_newton_schulz")
    ]


# --- optimuon --------------------------------------------------------------------------------


def optimuon(given: Given, gram: bool, **dtype: Any) -> Any:
    from optimuon import Muon

    groups: list[dict[str, Any]] = []
    for group in groups_by_view(given):
        if group.pop("view") == "experts":  # or it would take all experts as one matrix
            group["ns_split_fn"] = lambda u: list(u.unbind(0))
            group["ns_recombine_fn"] = torch.stack
        groups.append(group)
    return Muon(
        groups,
        lr=LR,
        weight_decay=DECAY,
        ns_coefficients=KELLER,
        ns_norm_scale=1.0,
        gram_ns=gram,
        normuon=False,
        cautious_wd=False,
        **dtype,
    )


# --- gram-newton-schulz ----------------------------------------------------------------------


def gram_newton_schulz(given: Given, kernels: bool) -> Any:
    from gram_newton_schulz import Muon

    return Muon(
        [p for p, _ in given],
        lr=LR,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        adjust_lr=lambda lr, shape: lr * math.sqrt(max(1.0, shape[-2] / shape[-1])),
        ns_coefficients=[KELLER] * 5,
        gram_newton_schulz_restart_iterations=[2],
        ns_use_kernels=kernels,
    )


def gram_newton_schulz_patches() -> list[Patch]:
    from gram_newton_schulz import gram_newton_schulz as maths
    from gram_newton_schulz.muon import muon

    half, brain, full = "torch.float16", "torch.bfloat16", "torch.float32"
    return [
        (maths, "_make_compiled_gram", recast(maths._make_compiled_gram, **{half: full})),
        (maths, "_make_compiled_standard", recast(maths._make_compiled_standard, **{half: full})),
        (
            muon,
            "muon_update_pre_orthogonalize",
            recast(muon.muon_update_pre_orthogonalize, **{brain: full}),
        ),
    ]


# --- heavyball -------------------------------------------------------------------------------


def heavyball(given: Given) -> Any:
    import heavyball

    return heavyball.Muon(
        [p for p, _ in given],
        lr=LR,
        betas=(MOMENTUM, 0.99),
        weight_decay=DECAY,
        # By default it drops the gradients, and a second step without new ones would do nothing.
        consume_grad=False,
    )


def heavyball_patches() -> list[Patch]:
    from heavyball import utils

    changed = recast(utils.zeropower_via_newtonschulz5, **{"stochastic_round_(G)": "G"})
    return [(utils, "zeropower_via_newtonschulz5", changed)]


# --- muonium ---------------------------------------------------------------------------------


def muonium(given: Given) -> Any:
    from muonium import Muon

    groups: list[dict[str, Any]] = []
    for group in groups_by_view(given):
        group["flatten"] = group.pop("view") == "flatten"
        groups.append(group)
    return Muon(
        groups,
        lr=LR,
        wd=DECAY,
        use_cautious_wd=False,
        orthogonalization_strategy="newton_schulz",
    )


def muonium_patches() -> list[Patch]:
    from muonium.optim.algorithms import base

    # Its CPU path asks for the Triton kernel, which refuses: the plain loop it also has instead.
    changed = recast(
        base.zeropower,
        **{"use_triton: bool = True": "use_triton: bool = False", "G.bfloat16()": "G.float()"},
    )
    return [(base, "zeropower", changed)]


ALL_VIEWS = frozenset({"matrix", "flatten", "experts"})
CONVOLUTIONS = frozenset({"matrix", "flatten"})
EXPERTS = frozenset({"matrix", "experts"})

# What "auto" is to all but small matrices: muonkit too runs as shipped.
OUR_PRODUCTS = str(fastest_dtype("cpu", None).dtype).removeprefix("torch.")

EXPERT_SCALE = "the scale of experts is taken from the whole stack's shape"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("muonkit", muonkit, products=OUR_PRODUCTS, views=ALL_VIEWS),
        Peer("muonkit fp32", functools.partial(muonkit, dtype="float32"), views=ALL_VIEWS),
        Peer(
            "muonkit standard",
            functools.partial(muonkit, form="standard"),
            products=OUR_PRODUCTS,
            views=ALL_VIEWS,
        ),
        Peer("torch", torch_muon, products="bfloat16"),
        Peer("torch fp32", torch_muon, patches=torch_patches),
        Peer(
            "pytorch_optimizer",
            pytorch_optimizer,
            "pytorch_optimizer",
            products="bfloat16",
            views=CONVOLUTIONS,
        ),
        Peer(
            "pytorch_optimizer fp32",
            pytorch_optimizer,
            "pytorch_optimizer",
            views=CONVOLUTIONS,
            patches=pytorch_optimizer_patches,
        ),
        Peer(
            "pytorch_optimizer gram fp32",
            functools.partial(pytorch_optimizer, method="gram_newton_schulz"),
            "pytorch_optimizer",
            views=CONVOLUTIONS,
            patches=pytorch_optimizer_patches,
        ),
        Peer(
            "optimuon",
            functools.partial(optimuon, gram=True),
            "optimuon",
            products="float16",
            views=ALL_VIEWS,
            differs=EXPERT_SCALE,
        ),
        Peer(
            "optimuon fp32",
            functools.partial(optimuon, gram=False, ns_dtype=None),
            "optimuon",
            views=ALL_VIEWS,
            differs="float32 by its own option; " + EXPERT_SCALE,
        ),
        Peer(
            "optimuon gram fp32",
            functools.partial(optimuon, gram=True, ns_dtype=None),
            "optimuon",
            views=ALL_VIEWS,
            differs="float32 by its own option; restarts after the third iteration; "
            + EXPERT_SCALE,
        ),
        Peer(
            "gram-newton-schulz",
            functools.partial(gram_newton_schulz, kernels=True),
            "gram-newton-schulz",
            products="float16",
            views=EXPERTS,
            compiled=True,
        ),
        Peer(
            "gram-newton-schulz plain",
            functools.partial(gram_newton_schulz, kernels=False),
            "gram-newton-schulz",
            products="float16",
            views=EXPERTS,
            compiled=True,
            differs="ns_use_kernels=False",
        ),
        Peer(
            "gram-newton-schulz fp32",
            functools.partial(gram_newton_schulz, kernels=False),
            "gram-newton-schulz",
            views=EXPERTS,
            patches=gram_newton_schulz_patches,
            compiled=True,
            differs="ns_use_kernels=False",
        ),
        Peer(
            "heavyball",
            heavyball,
            "heavyball",
            products="bfloat16",
            views=CONVOLUTIONS,
            compiled=True,
            differs="coefficients 'you'; rounds stochastically",
        ),
        Peer(
            "heavyball fp32",
            heavyball,
            "heavyball",
            views=CONVOLUTIONS,
            patches=heavyball_patches,
            compiled=True,
            differs="coefficients 'you'",
        ),
        Peer("muonium", muonium, "muonium", "bfloat16", ALL_VIEWS, compiled=True),
        Peer(
            "muonium fp32",
            muonium,
            "muonium",
            views=ALL_VIEWS,
            patches=muonium_patches,
            compiled=True,
            differs="its loop for devices without Triton; decay times the scale",
        ),
    )
}
