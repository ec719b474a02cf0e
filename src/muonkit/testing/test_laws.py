"""What pytest collects: one test for each law (see `muonkit.testing`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muonkit.testing.laws import Finding, Law
from muonkit.testing.plugin import FINDING, as_record


def test_law(
    law: Law,
    findings: Callable[[Law], Finding],
    record_property: Callable[[str, object], None],
) -> None:
    finding = findings(law)
    record_property(FINDING, as_record(finding))
    if finding.verdict == "does not claim":
        pytest.skip(f"does not claim {finding.message}")
    if finding.verdict == "fail":
        lines = [
            law.states,
            f"smallest input: {finding.input or 'see below'}",
            finding.message,
            f"on purpose: {finding.deliberate}" if finding.deliberate else "",
            f"elsewhere: {law.elsewhere}" if law.elsewhere else "",
        ]
        pytest.fail("\n".join(line for line in lines if line), pytrace=False)
