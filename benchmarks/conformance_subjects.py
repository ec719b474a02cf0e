"""What conformance.py holds to the laws of `muonkit.testing`: ours, torch's, and others'.

Each is made as its package documents it, with its own defaults; what had to be adapted is said in
its `Entry`. What one claims is what its documentation says that it takes; where that says nothing,
nothing is claimed. A subject is found as users' are:

    pytest --pyargs muonkit.testing --optimizer benchmarks/conformance_subjects.py:keller

Nothing is imported before it is asked for; requirements-peers.txt has the versions.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from muonkit.testing import Subject

Params = Sequence[nn.Parameter]


def original(rows: int, cols: int) -> float:
    return math.sqrt(max(1.0, rows / cols))


def match_rms(rows: int, cols: int) -> float:
    return 0.2 * math.sqrt(max(rows, cols))


# --- ours ------------------------------------------------------------------------------------

VIEWS = {2: "matrix", 3: "experts", 4: "flatten"}


def _groups(params: Params) -> list[dict[str, Any]]:
    return [{"params": [p], "view": VIEWS[p.ndim]} for p in params]


def _blocks(params: Params, blocks: int) -> list[dict[str, Any]]:
    return [{"params": [p], "view": f"split(rows={blocks})"} for p in params]


def _world() -> Any:
    return torch.distributed.group.WORLD


def _ours(make: Callable[..., Optimizer], name: str) -> Subject:
    return Subject(
        lambda params, **options: make(_groups(params), **options),
        name,
        convolutions=True,
        experts=True,
        heads=lambda params, blocks, **options: make(_blocks(params, blocks), **options),
        scale=original,
        momentum=0.95,
        float64=True,
        products=torch.float32,
        ddp=lambda params, **options: make(_groups(params), process_group=_world(), **options),
        fsdp2=lambda params, **options: make(_groups(params), **options),
    )


def muon() -> Subject:
    from muonkit import Muon

    return _ours(functools.partial(Muon, ns_dtype="float32"), "muonkit.Muon")


def muonw() -> Subject:
    from muonkit import MuonW

    def make(groups: Any, **options: Any) -> Optimizer:
        spare = [nn.Parameter(torch.zeros(3))]  # AdamW's, never given a gradient
        rest = {"adamw_params": spare, "adamw_lr": options["lr"]}
        return MuonW(groups, ns_dtype="float32", **rest, **options)

    return _ours(make, "muonkit.MuonW")


# --- torch's, and what PyPI has ----------------------------------------------------------------


def _eps(name: str) -> tuple[str, str]:
    return "tiny_gradients_are_nothing", f"{name}, an argument of its own, is added to the norm"


def torch_muon() -> Subject:
    return Subject(
        torch.optim.Muon,
        "torch.optim.Muon",
        scale=original,
        momentum=0.95,
        deliberate=(_eps("eps"),),
    )


def torch_plain_momentum() -> Subject:
    make = functools.partial(torch.optim.Muon, nesterov=False)
    name = "torch.optim.Muon, nesterov=False"
    return Subject(
        make,
        name,
        scale=original,
        momentum=0.95,
        nesterov=False,
        deliberate=(_eps("eps"),),
    )


def pytorch_optimizer() -> Subject:
    from pytorch_optimizer import Muon

    def make(params: Params, **options: Any) -> Optimizer:
        return Muon([{"params": list(params), "use_muon": True}], **options)

    name = "pytorch_optimizer.Muon"
    return Subject(make, name, convolutions=True, scale=original, momentum=0.95)


def optimuon() -> Subject:
    from optimuon import Muon

    def split(u: torch.Tensor, blocks: int) -> list[torch.Tensor]:
        return list(u.chunk(blocks))

    def group(p: nn.Parameter, blocks: int | None) -> dict[str, Any]:
        if blocks is not None:
            by = functools.partial(split, blocks=blocks)
            return {"params": [p], "ns_split_fn": by, "ns_recombine_fn": torch.cat}
        if p.ndim == 3:
            by = lambda u: list(u.unbind(0))  # noqa: E731
            return {"params": [p], "ns_split_fn": by, "ns_recombine_fn": torch.stack}
        return {"params": [p]}

    def make(params: Params, blocks: int | None = None, **options: Any) -> Optimizer:
        groups = [group(p, blocks) for p in params]
        return Muon(groups, normuon=False, cautious_wd=False, **options)

    return Subject(
        make,
        "optimuon.Muon",
        convolutions=True,
        experts=True,
        heads=make,
        scale=original,
        momentum=0.95,
        products=torch.float16,
        deliberate=(_eps("ns_eps"),),
    )


def _by_shape(muon: Any, **more: Any) -> Callable[..., Optimizer]:
    """muonium's, and dtensor-muon's before it: convolutions are flattened, stacks are experts."""

    def make(params: Params, *, lr: float, weight_decay: float, **group: Any) -> Optimizer:
        groups = [{"params": [p], "flatten": p.ndim == 4, **group} for p in params]
        return muon(groups, lr=lr, wd=weight_decay, use_cautious_wd=False, **more)

    return make


def _without_triton(package: str) -> None:
    import importlib

    module = importlib.import_module(f"{package}.orthogonalize.orthogonalize")
    chosen = module._get_orthogonalization_fn
    if not isinstance(chosen, functools.partial):
        plain = functools.partial(lambda of, strategy, use_triton: of(strategy, False), chosen)
        module._get_orthogonalization_fn = plain  # type: ignore[attr-defined]


def _like_muonium(package: str, make: Callable[..., Optimizer], heads: Any = None) -> Subject:
    _without_triton(package)
    return Subject(
        make,
        f"{package}.Muon",
        convolutions=True,
        experts=True,
        heads=heads,
        scale=original,
        momentum=0.95,
        fsdp2=make,
    )


def muonium() -> Subject:
    from muonium import Muon

    make = _by_shape(Muon)

    def heads(params: Params, blocks: int, **options: Any) -> Optimizer:
        (p,) = params
        return make(params, split_sizes=[p.shape[0] // blocks] * blocks, **options)

    return _like_muonium("muonium", make, heads)


def dtensor_muon() -> Subject:
    from dtensor_muon import Muon

    return _like_muonium("dtensor_muon", _by_shape(Muon, fused_adam=False))


def gram_newton_schulz() -> Subject:
    from gram_newton_schulz import Muon

    return Subject(
        functools.partial(Muon, ns_use_kernels=False),
        "gram_newton_schulz.Muon",
        experts=True,
        scale=match_rms,
        momentum=0.95,
        products=torch.float16,
        deliberate=(_eps("ns_epsilon"),),
    )


def heavyball() -> Subject:
    import heavyball as package

    why = "consume_grad=True, its default, gives the gradients' memory back"
    return Subject(
        package.Muon,
        "heavyball.Muon",
        convolutions=True,
        deliberate=(("gradients_are_untouched", why),),
    )


def emerging() -> Subject:
    if not hasattr(typing, "override"):
        from typing_extensions import override

        typing.override = override  # type: ignore[attr-defined]
    from emerging_optimizers.orthogonalized_optimizers import Muon

    def scale(rows: int, cols: int) -> float:
        return math.sqrt(max(rows, cols))

    return Subject(
        Muon,
        "emerging_optimizers Muon",
        scale=scale,
        momentum=0.95,
        nesterov=False,
        bfloat16=False,
        deliberate=(
            ("closures_are_called_once", "it refuses closures, with an error that says so"),
        ),
    )


def keller() -> Subject:
    from muon import SingleDeviceMuonWithAuxAdam

    def make(params: Params, **options: Any) -> Optimizer:
        return SingleDeviceMuonWithAuxAdam([{"params": list(params), "use_muon": True, **options}])

    return Subject(
        make,
        "Keller Jordan's SingleDeviceMuonWithAuxAdam",
        convolutions=True,
        experts=True,
        scale=original,
        momentum=0.95,
    )


def omnimuon() -> Subject:
    from omnimuon import Muon

    def make(params: Params, *, lr: float, weight_decay: float) -> Optimizer:
        return Muon(params, lr=lr, matrix_lr=lr, weight_decay=weight_decay)

    return Subject(make, "omnimuon.Muon", products=torch.float32)


@dataclass(frozen=True)
class Entry:
    """What the page says of an implementation, beside what was found.

    Attributes:
        package: its name on PyPI; None for ours and torch's.
        adapted: what was done beside calling its constructor with its own defaults.
        known: law -> the address of a public report of it.
        notes: law -> what explains the finding.
    """

    package: str | None = None
    adapted: str = ""
    known: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


EAGER = "run without torch.compile (TORCHDYNAMO_DISABLE=1): it compiles for every shape"
LOOP = "on a CPU its Triton loop, the default, refuses: the plain one that it also has instead"
KELLERS = "https://github.com/KellerJordan/Muon"
CAUTIOUS = "cautious decay, its default, is off"

ENTRIES = {
    "muon": Entry(adapted="ns_dtype='float32'; a view by the number of dims"),
    "muonw": Entry(adapted="the split by hand; ns_dtype='float32'"),
    "torch_muon": Entry(),
    "torch_plain_momentum": Entry(
        known={
            "the_momentum_survives_in_bfloat16": "https://github.com/pytorch/pytorch/pull/194664"
        },
    ),
    "pytorch_optimizer": Entry("pytorch-optimizer", "groups with use_muon=True"),
    "optimuon": Entry(
        "optimuon",
        "normuon and cautious decay off; experts and blocks by its ns_split_fn",
    ),
    "muonium": Entry("muonium", f"{EAGER}; {CAUTIOUS}; {LOOP}; flatten=True for convolutions"),
    "dtensor_muon": Entry(
        "dtensor-muon", f"{EAGER}; {CAUTIOUS}; {LOOP}; flatten=True for convolutions"
    ),
    "gram_newton_schulz": Entry(
        "gram-newton-schulz",
        f"{EAGER}; ns_use_kernels=False",
        notes={
            "a_resumed_run_goes_on": "The new optimizer keeps the learning rate that it was made "
            "with; the saved one is dropped."
        },
    ),
    "heavyball": Entry("heavyball", EAGER),
    "emerging": Entry(
        "emerging-optimizers", "typing.override from typing_extensions: it asks for Python 3.12"
    ),
    "keller": Entry(
        "muon-optimizer",
        "groups with use_muon=True; its Muon for several ranks is not judged: it gathers tensors "
        "of unequal shapes, which NCCL does and gloo refuses",
        {
            "a_convolution_is_a_matrix": f"{KELLERS}/pull/34",
            "the_factor_of_a_convolution": f"{KELLERS}/pull/34",
            "no_gradient_no_change": f"{KELLERS}/issues/37",
            "no_gradient_no_decay": f"{KELLERS}/issues/37",
            "channels_last_is_nothing": "https://github.com/ultralytics/ultralytics/pull/26033",
        },
    ),
    "omnimuon": Entry(
        "omnimuon",
        "matrix_lr is given the lr",
        notes={
            "schedulers_reach_every_group": "The matrices' rate is matrix_lr, which torch's "
            "schedulers do not know.",
            "groups_are_added_later": "The same cause: the group was added with another lr.",
        },
    ),
}

# Looked at, and not judged: why.
NOT_JUDGED = {
    "muon-fsdp2 0.3.0": "a step on tensors of one process raises NameError: muon_update is not "
    "defined, and its step on shards ended in SIGABRT with gloo",
    "timm": "imports torchvision, whose CPU build was not to be had here",
    "triton-muon-adamw 1.0.0": "its kernels need a GPU",
    "automuon 0.1.0": "needs Python 3.12",
    "dion": "not on PyPI; what its Muon computes is compared in tests/convert, by a transcription "
    "that would hide what these laws look for",
    "Moonlight, DeepSpeed, Megatron": "part of training scripts or frameworks; as for Dion",
    "echomuon, trasmuon, tauon-optimizer": "they gate, rescale or approximate the update on "
    "purpose",
}
