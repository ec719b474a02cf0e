"""Small modules and short readings that the routing tests share."""

from __future__ import annotations

import torch
from torch import nn

from muonkit.routing.routes import Route, route

D = 8


def by_name(model: nn.Module, **kwargs: object) -> dict[str, Route]:
    return {r.name: r for r in route(model, **{"scale": "match_rms_adamw", **kwargs})}  # type: ignore[arg-type]


def got(model: nn.Module, name: str) -> tuple[str, str | None, bool]:
    found = by_name(model)[name]
    return found.algorithm, found.view, found.decay


class Body(nn.Module):
    """The module under test before a head, so that its last layer is not taken for one."""

    def __init__(self, **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.last = nn.Linear(D, 2)


def raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class Holder(nn.Module):
    """A module of unknown class with these parameters, submodules and attributes."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
