"""Seconds that `import muonkit` adds to `import torch`: `python benchmarks/import_time.py`.

Paired: each fresh process times both imports, one after the other, so a busy moment of the machine
falls on both. The budget is 0.1 s.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

PROCESSES = 11
BUDGET = 0.1  # seconds

MEASURE = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import muonkit
end = time.perf_counter()
print(json.dumps([middle - start, end - middle]))
"""


def measure() -> tuple[float, float]:
    """Seconds of `import torch`, and of `import muonkit` after it, in one fresh process."""
    shown = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    )
    torch_seconds, muonkit_seconds = json.loads(shown.stdout)
    return torch_seconds, muonkit_seconds


def main() -> int:
    measure()  # writes the .pyc files and warms the disk cache, for both
    torch_seconds, added = zip(*(measure() for _ in range(PROCESSES)), strict=True)
    median = statistics.median(added)
    print(f"import torch:   median {statistics.median(torch_seconds):.3f} s")
    print(
        f"import muonkit: median {median:.3f} s on top of it"
        f" (from {min(added):.3f} to {max(added):.3f}, {PROCESSES} processes; budget {BUDGET} s)"
    )
    return 0 if median < BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
