"""Where things are in this checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "muonkit"
TESTS = ROOT / "tests"
BENCHMARKS = ROOT / "benchmarks"
DOCS = ROOT / "docs"
# What a checkout may have beside it, and no test requires: data sets, reference trajectories.
SHARED = ROOT.parent / "shared"
