"""muonkit: the Muon optimizer for a whole PyTorch model."""

from muonkit.orthogonalize import orthogonalize
from muonkit.views import View

__all__ = ["View", "orthogonalize"]
