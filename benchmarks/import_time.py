"""Seconds that `import muonkit` adds to `import torch`: `python benchmarks/import_time.py`.

Paired: each fresh process times both imports, one after the other, so a busy moment of the machine
falls on both. The budget is 0.1 s: exit code 1 beyond it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import harness
import machine

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
    options = harness.parser(__doc__, rounds=11, threads=False).parse_args()
    measure()  # writes the .pyc files and warms the disk cache, for both
    pairs = harness.column(harness.paired({"both": measure}, options.rounds), "both")
    low, torch_seconds, high = harness.quartiles([one for one, _ in pairs])
    print(f"import torch:   median {torch_seconds:.3f} s [{low:.3f}, {high:.3f}]")
    low, added, high = harness.quartiles([other for _, other in pairs])
    print(
        f"import muonkit: median {added:.3f} s [{low:.3f}, {high:.3f}] on top of it"
        f" ({options.rounds} processes; budget {BUDGET} s)"
    )
    record = {"kind": "import", "machine": machine.facts(), "seconds": pairs}
    harness.write(options.json, harness.rounded(record))
    return 0 if added < BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
