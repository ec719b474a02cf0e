"""The options that a param group may have, by the algorithm that reads them.

Group keys, what a `Rule` may say, and what a step looks at again are all derived from these.
"""

from __future__ import annotations

__all__ = ["ADAMW", "BOTH", "MUON", "OF_ALGORITHM", "OPTION_KEYS", "STRUCTURE"]

# How a group's parameters are trained at all: never taken from a state dict, nor from a rule.
STRUCTURE = ("algorithm", "view")

# Read by both algorithms; Muon keeps eps for torch.optim.Muon's signature.
BOTH = ("lr", "weight_decay", "eps", "maximize", "nonfinite")

ADAMW = ("betas",)

MUON = (
    "momentum",
    "nesterov",
    "ns_coefficients",
    "ns_steps",
    "adjust_lr_fn",
    "ns_form",
    "ns_dtype",
    "momentum_dtype",
    "bytes_in_flight",
    "variant",
    "variant_beta2",
    "exchange_dtype",
    "replicas",
    "cautious",
)

OF_ALGORITHM = {"muon": (*BOTH, *MUON), "adamw": (*BOTH, *ADAMW)}

# All that a group may say, beside its parameters.
OPTION_KEYS = (*STRUCTURE, *BOTH, *ADAMW, *MUON)
