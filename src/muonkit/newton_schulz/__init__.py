"""Newton-Schulz: the (nearly) closest semi-orthogonal matrix, by matrix products alone.

Nothing here knows of optimizers, parameters or ranks.
"""

from muonkit.newton_schulz.coefficients import SCHEDULES
from muonkit.newton_schulz.forms import FORMS
from muonkit.newton_schulz.orthogonalizer import orthogonalize

__all__ = ["FORMS", "SCHEDULES", "orthogonalize"]
