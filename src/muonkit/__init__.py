"""muonkit: the Muon optimizer for a whole PyTorch model.

Muon trains the hidden weight matrices along an orthogonalized momentum, AdamW the rest::

    from muonkit import MuonW

    optimizer = MuonW(model, lr=3e-4, weight_decay=0.1)
"""

from muonkit._optim_hook import ddp_reduce_scatter_hook
from muonkit.optim import Muon, MuonW
from muonkit.orthogonalize import orthogonalize
from muonkit.routing import Route, Routes, RoutingError, Rule, route
from muonkit.views import View

__version__ = "0.1.0"

__all__ = [
    "Muon",
    "MuonW",
    "Route",
    "Routes",
    "RoutingError",
    "Rule",
    "View",
    "__version__",
    "ddp_reduce_scatter_hook",
    "orthogonalize",
    "route",
]
