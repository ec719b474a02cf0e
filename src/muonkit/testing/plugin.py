"""pytest's part: the options, the subject, and what became of each law in a file.

    pytest --pyargs muonkit.testing --optimizer mypackage.module:make --conformance-json FILE

An installed muonkit brings this plugin in (`muonkit_pytest`) where `muonkit.testing` is among the
arguments, and nowhere else; `-p muonkit.testing.plugin` does it by hand.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonkit.testing.adapter import Subject, load
from muonkit.testing.laws import LAWS, Finding, Law, judge, see_reasons
from muonkit.testing.rank_laws import check_on_ranks

FINDING = "conformance"
_SUBJECT = pytest.StashKey[Subject]()
_FOUND = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("muonkit.testing", "the laws of Muon")
    group.addoption(
        "--optimizer",
        metavar="WHERE:NAME",
        help="mypackage.module:make or path/to/file.py:make, a function make(params, *, lr, "
        "weight_decay) that returns the optimizer, or a muonkit.testing.Subject",
    )
    group.addoption(
        "--conformance-json", metavar="FILE", help="write what became of each law into this file"
    )


def pytest_configure(config: pytest.Config) -> None:
    spec = config.getoption("--optimizer")
    if config.getoption("help", default=False):
        return
    if spec is None:
        raise pytest.UsageError(
            "muonkit.testing needs --optimizer mypackage.module:make (or path/to/file.py:make): "
            "which optimizer is to be held to the laws? --optimizer torch.optim:Muon tries torch's"
        )
    if "muonkit.testing" in config.args and not config.getoption("pyargs"):
        raise pytest.UsageError("muonkit.testing is a module: put --pyargs before it")
    _see_file(config.getoption("--conformance-json"))
    try:
        config.stash[_SUBJECT] = load(spec)
        see_reasons(config.stash[_SUBJECT])
    except (ImportError, LookupError, TypeError, ValueError) as error:
        # A KeyError would show its message in quotes.
        raise pytest.UsageError(str(error.args[0] if error.args else error)) from error
    config.stash[_FOUND] = {}
    config.pluginmanager.register(_Reader(config.stash[_FOUND]))
    # The matrices are tiny: on a busy machine threads would wait for one another.
    torch.set_num_threads(1)


def _see_file(path: str | None) -> None:
    """Before the laws are tried, not after."""
    if path is None:
        return
    if Path(path).is_dir():
        raise pytest.UsageError(f"--conformance-json got the folder {path!r}, expected a file")
    if not Path(path).parent.is_dir():
        raise pytest.UsageError(
            f"--conformance-json got {path!r}, and there is no folder {str(Path(path).parent)!r}: "
            "make it first"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "law" in metafunc.fixturenames:
        metafunc.parametrize("law", LAWS.values(), ids=lambda law: law.name)


@pytest.fixture(scope="session")
def findings(request: pytest.FixtureRequest) -> Callable[[Law], Finding]:
    """From a law to what became of it; those on ranks are tried together, one group for each number
    of ranks."""
    config = request.config
    subject = config.stash[_SUBJECT]
    on_ranks: dict[int, dict[str, Finding]] = {}
    items: list[Any] = request.session.items
    params = [item.callspec.params.get("law") for item in items if hasattr(item, "callspec")]
    selected = [law for law in params if isinstance(law, Law)]

    def find(law: Law) -> Finding:
        if not law.world_size:
            return judge(law, subject)
        if law.world_size not in on_ranks:
            names = [each.name for each in selected if each.world_size == law.world_size]
            found = check_on_ranks(config.getoption("--optimizer"), law.world_size, names)
            on_ranks[law.world_size] = {finding.law: finding for finding in found}
        return on_ranks[law.world_size][law.name]

    return find


class _Reader:
    """Reads what became of each law in the reports of one run, whose hook is given no config."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """With xdist these come from all workers."""
        if report.when == "call" or report.skipped:
            for key, value in report.user_properties:
                if key == FINDING and isinstance(value, dict):
                    self.found[value["law"]] = value


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    path = config.getoption("--conformance-json")
    if path is None or hasattr(config, "workerinput"):
        return
    found = config.stash[_FOUND]
    written = {
        "kind": "conformance",
        "optimizer": config.getoption("--optimizer"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "laws": [found[name] for name in LAWS if name in found],
    }
    Path(path).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def as_record(finding: Finding) -> dict[str, str]:
    """What a file has of it: without what is empty."""
    return {key: value for key, value in dataclasses.asdict(finding).items() if value}
