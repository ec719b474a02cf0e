"""What of the suite depends on what a CPU multiplies fastest, on the other kind of CPU too.

The suite runs on whatever this CPU is. What compares at float32's tolerance has to say so, or fails
where "auto" is bfloat16; what says something of bfloat16 has to hold where "auto" is float32. Here
the tests that failed on the other kind once, and the optimizer's own, run as there
(`tests/startup/sitecustomize.py`); `MUONKIT_TEST_CPU=bfloat16 make unit` runs all of them so.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from muonkit import Muon
from muonkit.newton_schulz.dtypes import resolve_dtype
from tests.helpers.paths import ROOT, TESTS

VARIABLE = "MUONKIT_TEST_CPU"
SENSITIVE = [
    "lab/test_plan.py::test_the_simulated_step_is_what_the_optimizer_plans",
    "package/test_machines.py::test_every_process_of_the_suite_is_told",
    "optim/test_muonw.py",
    "optim/test_step_cost.py::test_a_wider_momentum_does_not_widen_the_products",
    "optim/test_step_cost.py::test_transforms_of_torch_func",
    "optim/test_torch_parity.py",
]


def auto() -> str:
    dtype = resolve_dtype("auto", torch.float32, torch.device("cpu"), small=False)
    return str(dtype).removeprefix("torch.")


@pytest.mark.timeout(900)  # a run of pytest in itself
@pytest.mark.skipif(VARIABLE in os.environ, reason="the whole suite is told what the CPU is")
def test_the_sensitive_part_passes_on_the_other_kind_of_cpu() -> None:
    other = {"float32": "bfloat16", "bfloat16": "float32"}[auto()]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--no-header"]
    command += ["-k", "not normuon and not adamuon"]  # of the plans: one variant is enough
    done = subprocess.run(
        [sys.executable, *command, *(str(TESTS / name) for name in SENSITIVE)],
        env={**os.environ, VARIABLE: other},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_process_of_the_suite_is_told() -> None:
    """A command that a test starts multiplies as the test does."""
    row = Muon([torch.nn.Parameter(torch.ones(4, 4))]).describe()[0]
    code = (
        "import torch, muonkit\n"
        "print(muonkit.Muon([torch.nn.Parameter(torch.ones(4, 4))]).describe()[0])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.strip() == str(row)
    asked = os.environ.get(VARIABLE)
    assert asked is None or row["ns_dtype"] == f"torch.{asked}"
