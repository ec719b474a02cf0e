"""What every test relies on: one thread per worker, no network, no window, reproducible draws."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported: OpenMP and MKL read these once. Two pytest workers with two threads each
# on two cores spend their time waiting for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "MUONKIT_TEST_CPU" in os.environ:  # see the file that is imported, here and in all children
    _startup = str(Path(__file__).parent / "startup")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [_startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sys.path.insert(0, _startup)
    sys.modules.pop("sitecustomize", None)  # the system's own, which has run
    import sitecustomize  # noqa: F401

import pytest
import torch
from hypothesis import settings

from tests.helpers import sampling
from tests.helpers.ranks import Ranks

torch.set_num_threads(1)

# The same examples on every run, and no deadline: a machine that is busy is not a failure.
settings.register_profile("muonkit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("muonkit")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{sampling.MARK}(together=2): a product of cases in part, see tests/helpers/sampling.py",
    )
    config.addinivalue_line("markers", f"{sampling.LONG}: runs in `make test-all`, or when named")


@pytest.hookimpl(trylast=True)  # after -k and -m: a case that they name runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[sampling.COLLECTED] = list(items)
    if not sampling.is_whole():
        kept = sampling.sampled_items(items, any("::" in argument for argument in config.args))
        kept_ones = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept_ones])
        items[:] = kept


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The outcomes of the module's `CASES` on several ranks: see tests/helpers/ranks.py."""
    return Ranks(request, tmp_path_factory)
