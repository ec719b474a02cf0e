"""The conformance suite: any Muon can be held to the laws.

    pytest --pyargs muonkit.testing --optimizer mypackage:make

`make(params, *, lr, weight_decay)` returns the optimizer; a `Subject` says more of it: what it
claims, beside training 2-D parameters. A law that it does not claim is skipped. Without pytest:
`for finding in check(subject): print(finding)`.

- `adapter`: the subject, what it claims, and how it is found.
- `laws`: the laws in one process, and `check`. `rank_laws`: those on several ranks.
- `ranks`: processes that speak gloo, none of which is waited for for ever.
- `plugin`: the options of the command line; `test_laws`: what pytest collects.
"""

from __future__ import annotations

from muonkit.testing.adapter import Subject, load
from muonkit.testing.laws import LAWS, Finding, Law, check
from muonkit.testing.rank_laws import check_on_ranks

__all__ = ["LAWS", "Finding", "Law", "Subject", "check", "check_on_ranks", "load"]
