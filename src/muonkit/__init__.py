"""muonkit: the Muon optimizer for a whole PyTorch model.

Muon trains the hidden weight matrices along an orthogonalized momentum, AdamW the rest::

    from muonkit import MuonW

    optimizer = MuonW(model, lr=2e-3, weight_decay=0.1)
"""

from typing import TYPE_CHECKING, Any

from muonkit.distributed.ddp_hook import ddp_reduce_scatter_hook
from muonkit.muonw import MuonW
from muonkit.newton_schulz.orthogonalizer import orthogonalize
from muonkit.optim import Muon
from muonkit.routing.routes import Route, Routes, RoutingError, Rule, route
from muonkit.stages import Constraint, Stage
from muonkit.views import View

if TYPE_CHECKING:
    from muonkit.monitor.monitor import Monitor
    from muonkit.qk_clip.clip import QKClip

__version__ = "0.1.0"

__all__ = [
    "Constraint",
    "Monitor",
    "Muon",
    "MuonW",
    "QKClip",
    "Route",
    "Routes",
    "RoutingError",
    "Rule",
    "Stage",
    "View",
    "__version__",
    "ddp_reduce_scatter_hook",
    "orthogonalize",
    "route",
]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: a training without it does not pay for it."""
    if name == "Monitor":
        from muonkit.monitor.monitor import Monitor

        return Monitor
    if name == "QKClip":
        from muonkit.qk_clip.clip import QKClip

        return QKClip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, those too that are imported when they are asked for."""
    return sorted({*globals(), *__all__})
